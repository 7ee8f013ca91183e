"""How likely a model holds a continuation of a context: the sum of its tokens' log-probabilities.

Where a text is cut into context and continuation, its tokens are cut too, in one of two ways that give different
numbers with most tokenizers:

* `apart`: context and continuation are tokenised each by itself, as in training, scoring and generation here
  (`lit_rlhf/data/prompt_template.py`).
* `joint`: the whole text is tokenised, and what the context alone would have taken is the context; white space at its
  end goes over to the continuation. So does lm-eval, and its numbers are met.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.prompt_template import bos_ids, encode_texts
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left, pad_right, position_ids, token_logprobs
from lit_rlhf.models.loading import max_positions

Boundary = Literal["apart", "joint"]
TextPair = tuple[str, str]  # context, continuation
Encoded = tuple[list[int], list[int]]  # their tokens; the context's are never empty

MAX_BATCH_TOKENS = 16384
MAX_BATCH_LOGITS = 2**27  # half a gibibyte in float32


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    logprob: float  # sum over its tokens, nats
    tokens: int  # of the continuation
    greedy: bool  # whether each of its tokens is the likeliest one
    cut: int  # tokens of the context left out in front, because the model has no more positions

    @property
    def per_token(self) -> float:
        """The mean log-probability of a token, nats."""
        return self.logprob / self.tokens


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[TextPair], boundary: Boundary) -> list[Encoded]:
    """Return the tokens of contexts and continuations.

    A context begins with what the tokenizer begins a text with. Where that leaves it empty (an empty context of a
    tokenizer without BOS), it is the BOS or else the end token: the first token of a text needs something before it.

    Raises:
        UserError: a continuation without tokens, which has no likelihood.
    """
    start = bos_ids(tokenizer)
    first = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    if boundary == "joint":
        pairs = [move_space(context, continuation) for context, continuation in pairs]
    contexts = encode_texts(tokenizer, [context for context, _ in pairs])
    if boundary == "apart":
        rests = encode_texts(tokenizer, [continuation for _, continuation in pairs])
    else:
        wholes = encode_texts(tokenizer, [context + continuation for context, continuation in pairs])
        rests = [whole[len(context) :] for whole, context in zip(wholes, contexts)]
    for (_, continuation), rest in zip(pairs, rests):
        if not rest:
            raise UserError(f"the continuation {continuation!r} has no tokens, so it has no likelihood")
    return [((start + context) or first, rest) for context, rest in zip(contexts, rests)]


def move_space(context: str, continuation: str) -> TextPair:
    """Move white space from the end of a context to the start of its continuation."""
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    pad_id: int,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    wanted: set[int] | None = None,
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the likelihood of each pair, longest context first, with its place in `encoded`.

    A context that several pairs of a batch share, as the options of a question do, is computed once.

    Args:
        model: a causal language model; its log-softmax is taken in float32 whatever its own type is.
        encoded: tokens of contexts and continuations.
        pad_id: what stands on padding.
        max_batch_tokens: most tokens of a forward pass, padding included (one row at least).
        wanted: places that are needed; None for all. Batches are cut over all pairs, so that a pair has the same
            neighbours, and to the last bit the same number, whatever is wanted beside it.

    Raises:
        UserError: a continuation that is longer than the model has positions.
    """
    limit, vocabulary = max_positions(model.config), model.config.get_text_config().vocab_size
    rows = [(fit(context, rest, limit), rest) for context, rest in encoded]
    order = sorted(range(len(rows)), key=lambda place: (-len(rows[place][0]), rows[place][0], len(rows[place][1])))
    start = 0
    while start < len(order):
        places = [order[start]]
        width, longest = len(rows[order[start]][0]), len(rows[order[start]][1])
        for place in order[start + 1 :]:
            longest = max(longest, len(rows[place][1]))
            count = len(places) + 1
            if count * (width + longest) > max_batch_tokens or count * longest * vocabulary > MAX_BATCH_LOGITS:
                break
            places.append(place)
        start += len(places)
        if wanted is not None and wanted.isdisjoint(places):
            continue
        sums, greedy = forward(model, [rows[place] for place in places], pad_id)
        for place, logprob, likeliest in zip(places, sums.tolist(), greedy.tolist()):
            cut = len(encoded[place][0]) - len(rows[place][0])
            if wanted is None or place in wanted:
                yield place, Likelihood(logprob, len(rows[place][1]), likeliest, cut)


def fit(context: list[int], continuation: list[int], limit: int | None) -> list[int]:
    """Return the context, cut in front so that both fit the model's positions."""
    if limit is None or len(context) + len(continuation) <= limit:
        return context
    if len(continuation) >= limit:
        raise UserError(f"a continuation of {len(continuation)} tokens does not fit a model of {limit} positions")
    return context[len(continuation) - limit :]


def forward(model: PreTrainedModel, rows: list[Encoded], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each continuation (B,) float64, and whether all its tokens are likeliest.

    The contexts, padded in front, go first, each once; their keys and values are then repeated for the continuations,
    which are padded behind.
    """
    contexts = list(dict.fromkeys(tuple(context) for context, _ in rows))  # C different ones
    number = {context: place for place, context in enumerate(contexts)}
    own = torch.tensor([number[tuple(context)] for context, _ in rows], device=model.device)  # (B,)
    ids, mask = (tensor.to(model.device) for tensor in pad_left([list(each) for each in contexts], pad_id))  # (C, P)
    rests, rest_mask = (tensor.to(model.device) for tensor in pad_right([rest for _, rest in rows], pad_id))  # (B, R)
    cache: Any = DynamicCache(config=model.config)
    first = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[own]  # (B, 1, V): the logits at a position predict the token after it
    sums, greedy = summed(first, rests[:, :1], rest_mask[:, :1])
    if rests.shape[1] == 1:
        return sums, greedy
    cache.batch_select_indices(own)
    whole = torch.cat([mask[own], rest_mask[:, :-1]], 1)  # (B, P + R - 1)
    later = model(
        input_ids=rests[:, :-1],
        attention_mask=whole,
        position_ids=position_ids(whole)[:, mask.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).logits  # (B, R - 1, V)
    more, likeliest = summed(later, rests[:, 1:], rest_mask[:, 1:])
    return sums + more, greedy & likeliest


def summed(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of the targets that the mask chooses (B,) float64, and whether all are likeliest."""
    own = mask.bool()
    # nan would spread from padding through a sum; where() keeps it out
    logprobs = torch.where(own, token_logprobs(logits, targets), 0.0)
    return logprobs.double().sum(1), ((logits.argmax(-1) == targets) | ~own).all(1)
