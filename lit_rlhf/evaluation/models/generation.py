"""Answers of a model to prompts, by the engine that PPO's rollouts use; cut as the paper cuts them (App. D)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.generation.generators import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.models.loading import max_positions

NEWLINE = ("\n",)


class Answer(NamedTuple):
    """One answer."""

    text: str
    ended: bool  # by the end token or a stop text, not by the limit
    tokens: int  # the model wrote, the end token included
    cut: int = 0  # tokens of the prompt left out in front


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    uniforms: Tensor,
    stop_strings: Sequence[str] = NEWLINE,
    batch_size: int = 64,
) -> list[Answer]:
    """Answer each prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: B lists of tokens.
        sampling: length and temperature; 0 is greedy decoding, as the paper's public benchmarks have it.
        uniforms: (B, R), the noise; unused where the temperature is 0.
        stop_strings: texts at the first of which an answer is cut; what follows is not part of it.
        batch_size: prompts decoded at once.

    Raises:
        UserError: the model has no positions for a prompt of one token and the answer.
    """
    limit = max_positions(model.config)
    room = None if limit is None else limit - sampling.max_new_tokens
    if room is not None and room < 1:
        raise UserError(
            f"answers of {sampling.max_new_tokens} tokens leave no room for a prompt in a model of {limit} positions"
        )
    kept = [prompt if room is None else prompt[-room:] for prompt in prompts]
    ids, mask = (tensor.to(model.device) for tensor in pad_left(kept, tokenizer.pad_token_id))
    rollout = CachedGenerator(batch_size).generate(
        model, ids, mask, uniforms, sampling, stop_string_matcher(tokenizer, sampling)
    )
    lengths = rollout.response_mask.sum(1).tolist()
    rows = [row[:length] for row, length in zip(rollout.response_ids.tolist(), lengths)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    answers = []
    for text, ended, tokens, prompt, fitted in zip(texts, rollout.finished.tolist(), lengths, prompts, kept):
        short = cut_at(text, stop_strings)
        answers.append(Answer(short, ended or short != text, tokens, len(prompt) - len(fitted)))
    return answers


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first stop text."""
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def greedy_uniforms(rows: int, length: int) -> Tensor:
    """Return the noise of greedy decoding: none."""
    return torch.zeros(rows, length, dtype=torch.float64)
