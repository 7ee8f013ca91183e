"""The token batches that the data modules yield.

Shapes: `B` sequences, `T` tokens, `P` prompt tokens, `N` completions of all `G` rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.records import Message


class TokenBatch(NamedTuple):
    """A batch of demonstrations or pretraining text."""

    input_ids: Tensor  # (B, T) int64, right-padded
    attention_mask: Tensor  # (B, T) int64, 1 = real token
    loss_mask: Tensor  # (B, T) bool, True where the token is a target of the loss; column 0 is never True
    normalizer: Tensor  # () float32, targets in the full minibatch: over all accumulated micro-batches and ranks
    sequence_lengths: tuple[int, ...] | None = None  # only if packed (B = 1): tokens per sequence, their sum is T


class RankingBatch(NamedTuple):
    """A batch of comparisons: the K completions of a ranking are never split across batches."""

    input_ids: Tensor  # (N, T) int64, right-padded: prompt + completion + EOS
    attention_mask: Tensor  # (N, T) int64, 1 = real token
    prompt_length: Tensor  # (N,) int64, tokens of the prompt, which all rows of a ranking share
    ranking_index: Tensor  # (N,) int64, the ranking that a row belongs to: 0 .. G-1
    ranks: Tensor  # (N,) int64, 0 = best; equal = tie
    normalizer: Tensor  # () float32, rankings in the full minibatch: over all accumulated micro-batches and ranks


class PromptBatch(NamedTuple):
    """A batch of prompts for generation."""

    input_ids: Tensor  # (B, P) int64, LEFT-padded
    attention_mask: Tensor  # (B, P) int64, 1 = real token
    rows: list[dict[str, Any]]  # the dataset rows: "prompt" (the rendered text) and every metadata column
    index: Tensor  # type: ignore[assignment]  # (B,) int64, index in the iteration's global batch, seeds sampling noise
    messages: Sequence[list[Message]] = ()  # the prompts as conversations; empty if they are text alone

    @classmethod
    def from_tokens(cls, input_ids: Tensor, attention_mask: Tensor) -> PromptBatch:
        """Return prompts without dataset rows, numbered from 0; both (B, P), left-padded."""
        index = torch.arange(len(input_ids), device=input_ids.device)
        return cls(input_ids, attention_mask, [{} for _ in range(len(input_ids))], index)

    def to(self, device: torch.device | str) -> PromptBatch:
        """Return the batch with its token tensors on a device."""
        return self._replace(input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))


class PretrainingBatch(TokenBatch):
    """A batch of the pretraining mix: a type of its own, because it goes through the stage's `training_step`."""
