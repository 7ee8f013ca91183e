"""Log-likelihood of a continuation given a context: the sum of its tokens' log-probabilities.

There are two ways to tokenize, which give different numbers with most tokenizers:

* `apart`: context and continuation are tokenized separately, as in training, scoring and generation here
  (`lit_rlhf/data/prompt_template.py`).
* `joint`: the concatenated text is tokenized and split after as many tokens as the context alone has; trailing white
  space of the context moves to the continuation. lm-eval does the same, and the numbers agree with it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.prompt_template import encode_texts, find_bos_ids, prepend_bos
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left, pad_right, position_ids, token_logprobs
from lit_rlhf.models.loading import max_positions

Boundary = Literal["apart", "joint"]
TextPair = tuple[str, str]  # context, continuation
EncodedPair = tuple[list[int], list[int]]  # token ids of context and continuation; the context is never empty

MAX_BATCH_TOKENS = 16384
MAX_BATCH_LOGITS = 2**27  # half a gibibyte in float32


class LogLikelihood(NamedTuple):
    """Log-likelihood of a continuation."""

    logprob: float  # sum over its tokens, nats
    num_tokens: int  # of the continuation
    is_greedy: bool  # whether greedy decoding would generate the continuation
    num_truncated: int  # context tokens removed on the left to fit the model's positions

    @property
    def per_token(self) -> float:
        """Mean log-probability per token, in nats."""
        return self.logprob / self.num_tokens


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[TextPair], boundary: Boundary) -> list[EncodedPair]:
    """Return the token ids of contexts and continuations.

    A context starts with the tokenizer's BOS tokens. A context that would be empty (an empty text, and a tokenizer
    that adds no BOS) is the BOS token or else the end token: the first token is predicted from something.

    Raises:
        UserError: a continuation without tokens.
    """
    bos = find_bos_ids(tokenizer)
    fallback = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    if boundary == "joint":
        pairs = [move_trailing_space(context, continuation) for context, continuation in pairs]
    contexts = encode_texts(tokenizer, [context for context, _ in pairs])
    if boundary == "apart":
        continuations = encode_texts(tokenizer, [continuation for _, continuation in pairs])
    else:
        texts = encode_texts(tokenizer, [context + continuation for context, continuation in pairs])
        continuations = [ids[len(context) :] for ids, context in zip(texts, contexts)]
    for (_, continuation), ids in zip(pairs, continuations):
        if not ids:
            raise UserError(f"the continuation {continuation!r} has no tokens, so it has no likelihood")
    return [(prepend_bos(context, bos) or fallback, ids) for context, ids in zip(contexts, continuations)]


def move_trailing_space(context: str, continuation: str) -> TextPair:
    """Move trailing white space of a context to the start of its continuation."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


@torch.no_grad()
def iter_loglikelihoods(
    model: PreTrainedModel,
    encoded: Sequence[EncodedPair],
    pad_id: int,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    needed: set[int] | None = None,
) -> Iterator[tuple[int, LogLikelihood]]:
    """Yield the log-likelihood of each pair with its index in `encoded`, longest context first.

    A context that several pairs of a batch share, as the options of a question do, is computed once.

    Args:
        model: a causal language model; its log-softmax is taken in float32 whatever its dtype is.
        encoded: token ids of contexts and continuations.
        pad_id: token id of the padding.
        max_batch_tokens: maximum tokens per forward pass, padding included (at least one row).
        needed: indices of the pairs to compute; None for all. Batches are formed over all pairs, so that a pair has the
            same batch, and bitwise the same result, whatever else is needed.

    Raises:
        UserError: a continuation is longer than the model's positions.
    """
    limit, vocab_size = max_positions(model.config), model.config.get_text_config().vocab_size
    rows = [(truncate_context(context, continuation, limit), continuation) for context, continuation in encoded]
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index][0]), rows[index][0], len(rows[index][1])))
    start = 0
    while start < len(order):
        batch = [order[start]]
        context_length, longest = len(rows[order[start]][0]), len(rows[order[start]][1])
        for index in order[start + 1 :]:
            longest = max(longest, len(rows[index][1]))
            size = len(batch) + 1
            if size * (context_length + longest) > max_batch_tokens or size * longest * vocab_size > MAX_BATCH_LOGITS:
                break
            batch.append(index)
        start += len(batch)
        if needed is not None and needed.isdisjoint(batch):
            continue
        logprobs, is_greedy = score_continuations(model, [rows[index] for index in batch], pad_id)
        for index, logprob, greedy in zip(batch, logprobs.tolist(), is_greedy.tolist()):
            num_truncated = len(encoded[index][0]) - len(rows[index][0])
            if needed is None or index in needed:
                yield index, LogLikelihood(logprob, len(rows[index][1]), greedy, num_truncated)


def truncate_context(context: list[int], continuation: list[int], limit: int | None) -> list[int]:
    """Return the context, left-truncated so that context and continuation fit the model's positions."""
    if limit is None or len(context) + len(continuation) <= limit:
        return context
    if len(continuation) >= limit:
        raise UserError(f"a continuation of {len(continuation)} tokens does not fit a model of {limit} positions")
    return context[len(continuation) - limit :]


def score_continuations(model: PreTrainedModel, rows: list[EncodedPair], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each continuation, (B,) float64, and whether it is greedy, (B,) bool.

    Each distinct context is prefilled once, left-padded; its KV cache is then repeated for its continuations, which are
    right-padded.
    """
    contexts = list(dict.fromkeys(tuple(context) for context, _ in rows))  # C distinct ones
    position = {context: index for index, context in enumerate(contexts)}
    context_index = torch.tensor([position[tuple(context)] for context, _ in rows], device=model.device)  # (B,)
    ids, mask = (tensor.to(model.device) for tensor in pad_left([list(each) for each in contexts], pad_id))  # (C, P)
    targets, target_mask = (tensor.to(model.device) for tensor in pad_right([ids for _, ids in rows], pad_id))  # (B, R)
    cache: Any = DynamicCache(config=model.config)
    first_logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[context_index]  # (B, 1, V): the logits at a position predict the token after it
    logprobs, is_greedy = sum_target_logprobs(first_logits, targets[:, :1], target_mask[:, :1])
    if targets.shape[1] == 1:
        return logprobs, is_greedy
    cache.batch_select_indices(context_index)
    full_mask = torch.cat([mask[context_index], target_mask[:, :-1]], 1)  # (B, P + R - 1)
    later_logits = model(
        input_ids=targets[:, :-1],
        attention_mask=full_mask,
        position_ids=position_ids(full_mask)[:, mask.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    ).logits  # (B, R - 1, V)
    later_logprobs, is_later_greedy = sum_target_logprobs(later_logits, targets[:, 1:], target_mask[:, 1:])
    return logprobs + later_logprobs, is_greedy & is_later_greedy


def sum_target_logprobs(logits: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed log-probability of the unmasked targets, (B,) float64, and whether all are greedy, (B,) bool.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64.
        mask: (B, T), nonzero at real tokens.
    """
    is_target = mask.bool()
    # nan of padding would spread through a product with the mask
    logprobs = torch.where(is_target, token_logprobs(logits, targets), 0.0)
    return logprobs.double().sum(1), ((logits.argmax(-1) == targets) | ~is_target).all(1)
