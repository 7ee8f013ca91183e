"""The token batches that the data modules yield. `B` sequences, `T` and `P` widths, `N` completions of all rankings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class TokenBatch(NamedTuple):
    """Demonstrations and pretraining text."""

    input_ids: Tensor  # (B, T) int64, right-padded
    attention_mask: Tensor  # (B, T) int64, 1 = real token
    loss_mask: Tensor  # (B, T) bool, True where the token is a target of the loss; column 0 is never True
    normalizer: Tensor  # () float32, targets in the whole minibatch: accumulation and ranks included
    sequence_lengths: tuple[int, ...] | None = None  # packed: tokens of each sequence of the one row, T together


class RankingBatch(NamedTuple):
    """Comparisons: one ranking = K rows that stay together."""

    input_ids: Tensor  # (N, T) int64, right-padded: prompt + completion + EOS
    attention_mask: Tensor  # (N, T) int64
    prompt_length: Tensor  # (N,) int64, how many of a row's tokens are its prompt, which the rows of a ranking share
    ranking_index: Tensor  # (N,) int64, which ranking of this batch a row belongs to: 0 .. G-1
    ranks: Tensor  # (N,) int64, 0 = best; equal = tie
    normalizer: Tensor  # () float32, rankings in the whole minibatch


class PromptBatch(NamedTuple):
    """Prompts to be answered."""

    input_ids: Tensor  # (B, P) int64, LEFT-padded
    attention_mask: Tensor  # (B, P) int64
    rows: list[dict[str, Any]]  # the dataset rows: "prompt" (the text as the model sees it) and every metadata column
    index: Tensor  # type: ignore[assignment]  # (B,) int64, place in the iteration's global batch: sampling noise is keyed on it


class PretrainingBatch(TokenBatch):
    """A batch of the pretraining mix, which goes through the same `training_step` beside the stage's own batches."""
