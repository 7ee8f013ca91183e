"""Completions of prompts by the generator of PPO's rollouts, truncated at stop strings as in the paper (App. D)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.models.loading import max_positions

NEWLINE = ("\n",)


class Completion(NamedTuple):
    """One completion of a prompt."""

    text: str
    finished: bool  # by the end token or a stop string, not by the length limit
    num_tokens: int  # generated, the end token or stop string included
    num_truncated: int = 0  # prompt tokens removed on the left
    end: str = ""  # the special tokens at its end, as text, such as "<|im_end|></s>"; not in `text`


def generate_completions(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
    uniforms: Tensor,
    stop_strings: Sequence[str] = NEWLINE,
) -> list[Completion]:
    """Generate one completion per prompt, all in one batch.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: B lists of token ids, left-truncated where they exceed the model's positions.
        sampling: length and temperature; 0 is greedy decoding, as in the paper's public benchmarks.
        uniforms: (B, max_new_tokens), the sampling noise; unused if the temperature is 0.
        stop_strings: texts at the first of which a completion is truncated, excluding the text itself.

    Raises:
        UserError: the model has fewer positions than one prompt token and `max_new_tokens` need.
    """
    limit = max_positions(model.config)
    max_prompt_tokens = None if limit is None else limit - sampling.max_new_tokens
    if max_prompt_tokens is not None and max_prompt_tokens < 1:
        raise UserError(
            f"answers of {sampling.max_new_tokens} tokens leave no positions for a prompt: the model has {limit}"
        )
    truncated = [prompt if max_prompt_tokens is None else prompt[-max_prompt_tokens:] for prompt in prompts]
    stops = [*sampling.stop_strings, *filter(None, stop_strings)]
    sampling = replace(sampling, stop_strings=stops)
    batch = PromptBatch.from_tokens(*pad_left(truncated, tokenizer.pad_token_id)).to(model.device)
    rollout = CachedGenerator(len(prompts)).generate(
        model, batch, sampling, uniforms, stop_string_matcher(tokenizer, sampling)
    )
    lengths = rollout.response_mask.sum(1).tolist()
    rows = [row[:length] for row, length in zip(rollout.response_ids.tolist(), lengths)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    completions = []
    for text, finished, row, prompt, kept in zip(texts, rollout.finished.tolist(), rows, prompts, truncated):
        stopped = truncate_at_stop(text, stop_strings)
        finished, end = finished or stopped != text, decode_end(tokenizer, row)
        completions.append(Completion(stopped, finished, len(row), len(prompt) - len(kept), end))
    return completions


def decode_end(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Return the special tokens at the end of a response as text."""
    special = set(tokenizer.all_special_ids)
    end = list(takewhile(special.__contains__, reversed(ids)))
    return tokenizer.decode(end[::-1]) if end else ""


def truncate_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    positions = [text.find(stop) for stop in stop_strings if stop]
    return text[: min((position for position in positions if position >= 0), default=len(text))]
