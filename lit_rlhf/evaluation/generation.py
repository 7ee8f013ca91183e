"""Answers of a model to prompts, by the engine that PPO's rollouts use; cut as the paper cuts them (App. D)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.models.loading import maximum_length
from lit_rlhf.rollout.endings import text_ends
from lit_rlhf.rollout.generation import CachedGenerator
from lit_rlhf.rollout.sampling import Sampling

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
    sampling: Sampling,
    uniforms: Tensor,
    stops: Sequence[str] = NEWLINE,
    batch_size: int = 64,
) -> list[Answer]:
    """Answer each prompt.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: B lists of tokens.
        sampling: length and temperature; 0 is greedy decoding, as the paper's public benchmarks have it.
        uniforms: (B, R), the noise; unused where the temperature is 0.
        stops: texts at the first of which an answer is cut; what follows is not part of it.
        batch_size: prompts decoded at once.

    Raises:
        UserError: the model has no positions for a prompt of one token and the answer.
    """
    limit = maximum_length(model.config)
    room = None if limit is None else limit - sampling.response_length
    if room is not None and room < 1:
        raise UserError(
            f"answers of {sampling.response_length} tokens leave no room for a prompt in a model of {limit} positions"
        )
    kept = [prompt if room is None else prompt[-room:] for prompt in prompts]
    ids, mask = (tensor.to(model.device) for tensor in pad_left(kept, tokenizer.pad_token_id))
    rollout = CachedGenerator(batch_size).generate(model, ids, mask, uniforms, sampling, text_ends(tokenizer, sampling))
    lengths = rollout.response_mask.sum(1).tolist()
    rows = [row[:length] for row, length in zip(rollout.response_ids.tolist(), lengths)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    answers = []
    for text, ended, tokens, prompt, fitted in zip(texts, rollout.ended.tolist(), lengths, prompts, kept):
        short = cut_at(text, stops)
        answers.append(Answer(short, ended or short != text, tokens, len(prompt) - len(fitted)))
    return answers


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return what stands before the first stop text."""
    places = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def no_noise(rows: int, length: int) -> Tensor:
    """Return the noise of greedy decoding: none."""
    return torch.zeros(rows, length, dtype=torch.float64)
