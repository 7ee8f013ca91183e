"""Responses of an iteration that were sampled while the update of the one before ran.

Shapes: `B` episodes of all ranks, `R` response.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.collation import TokenizedPrompt
from lit_rlhf.generation.base import GenerationOutput
from lit_rlhf.generation.sampling import SamplingParams


class RolloutKey(NamedTuple):
    """What responses were sampled to; responses in a checkpoint are used only for the same."""

    iteration: int
    prompts: str  # a hash of their tokens
    samples_per_prompt: int
    sampling: str
    seed: int


def rollout_key(
    iteration: int, prompts: Sequence[TokenizedPrompt], samples_per_prompt: int, sampling: SamplingParams, seed: int
) -> RolloutKey:
    """Return the key of an iteration's rollout, over all ranks."""
    tokens = hashlib.sha256(str([list(each.input_ids) for each in prompts]).encode()).hexdigest()
    settings = sampling.distribution() | {"length": sampling.max_new_tokens, "stop": sampling.stop_strings}
    return RolloutKey(iteration, tokens, samples_per_prompt, str(settings), seed)


def gather_output(output: GenerationOutput, gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the responses of all ranks for a checkpoint, (B, ...) on the CPU."""
    return {name: gather(value).cpu() for name, value in output._asdict().items()}


def select_output(
    stored: dict[str, Tensor], prompts: Tensor, samples_per_prompt: int, device: torch.device
) -> GenerationOutput:
    """Return the responses of a rank from those of all.

    Args:
        stored: of `gather_output`.
        prompts: (P,) int64, the indices of the rank's prompts.
        samples_per_prompt: consecutive rows of a prompt.
        device: of the result.
    """
    rows = (prompts[:, None] * samples_per_prompt + torch.arange(samples_per_prompt)).flatten()
    return GenerationOutput(**{name: value[rows].to(device) for name, value in stored.items()})
