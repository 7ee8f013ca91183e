"""Tokenised rows to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch, RankingBatch, TokenBatch


class TokenizedExample(NamedTuple):
    """One sequence and which of its tokens are targets of the loss."""

    input_ids: list[int]
    loss_mask: list[bool]


class TokenizedRanking(NamedTuple):
    """One ranking; prompt and completions are kept apart, so that a prompt can be computed once for all of them."""

    prompt: list[int]
    completions: list[list[int]]
    ranks: list[int]  # 0 = best; equal = tie
    labeler: str | None = None


class TokenizedPrompt(NamedTuple):
    """One prompt, with its row: "prompt" (the text as the model sees it) and every metadata column."""

    input_ids: list[int]
    row: dict[str, Any]


def pad(sequences: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Sequences as one matrix.

    Args:
        sequences: B sequences of token ids.
        value: What fills the gaps.
        side: Where the gaps are, "right" or "left".

    Returns:
        The ids (B, T) int64, and the attention mask (B, T) int64 with 1 at real tokens.
    """
    assert side in ("right", "left"), side
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), value, dtype=torch.int64)  # (B, T)
    mask = torch.zeros_like(ids)  # (B, T)
    for line, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[line, place] = torch.as_tensor(sequence, dtype=torch.int64)
        mask[line, place] = 1
    return ids, mask


def collate_tokens(rows: Sequence[TokenizedExample], normalizer: float, pad_id: int) -> TokenBatch:
    """Right-padded sequences with their targets."""
    ids, attention = pad([row.input_ids for row in rows], pad_id)
    targets, _ = pad([row.loss_mask for row in rows], False)
    targets[:, 0] = 0  # nothing predicts the first token
    return TokenBatch(ids, attention, targets.bool(), torch.tensor(normalizer, dtype=torch.float32))


def collate_packed(rows: Sequence[TokenizedExample], normalizer: float) -> TokenBatch:
    """Sequences behind each other in one row; `sequences` says how long each is."""
    ids = torch.tensor([list(chain.from_iterable(row.input_ids for row in rows))])
    # nothing predicts the first token of a sequence: what stands before it is another's
    targets = torch.tensor([list(chain.from_iterable([False, *row.loss_mask[1:]] for row in rows))])
    lengths, count = tuple(len(row.input_ids) for row in rows), torch.tensor(normalizer, dtype=torch.float32)
    return TokenBatch(ids, torch.ones_like(ids), targets, count, lengths)


def collate_rankings(rows: Sequence[TokenizedRanking], normalizer: float, pad_id: int) -> RankingBatch:
    """Every completion of every ranking behind its prompt, right-padded; the N lines of a ranking lie together."""
    ids, attention = pad([row.prompt + each for row in rows for each in row.completions], pad_id)
    prompt_length = [len(row.prompt) for row in rows for _ in row.completions]
    ranking = [number for number, row in enumerate(rows) for _ in row.completions]
    ranks = [rank for row in rows for rank in row.ranks]
    return RankingBatch(
        ids,
        attention,
        torch.tensor(prompt_length),
        torch.tensor(ranking),
        torch.tensor(ranks),
        torch.tensor(normalizer, dtype=torch.float32),
    )


def collate_prompts(prompts: Sequence[TokenizedPrompt], index: Sequence[int], pad_id: int) -> PromptBatch:
    """Left-padded prompts, so that every response begins in the same column."""
    ids, attention = pad([prompt.input_ids for prompt in prompts], pad_id, side="left")
    return PromptBatch(ids, attention, [prompt.row for prompt in prompts], torch.tensor(list(index), dtype=torch.int64))
