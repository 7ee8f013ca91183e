"""Tokenized rows to padded or packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from lit_rlhf.data.batches import PromptBatch, RankingBatch, TokenBatch
from lit_rlhf.data.records import Message, to_messages
from lit_rlhf.functional.padding import pad_left, pad_right


class TokenizedExample(NamedTuple):
    """One sequence and which of its tokens are targets of the loss."""

    input_ids: list[int]
    loss_mask: list[bool]


class TokenizedRanking(NamedTuple):
    """One ranking; prompt and completions are separate, so that the prompt's forward pass can be shared."""

    prompt: list[int]
    completions: list[list[int]]
    ranks: list[int]  # 0 = best; equal = tie
    labeler: str | None = None


class TokenizedPrompt(NamedTuple):
    """One prompt, with its row: "prompt" (the rendered text) and every metadata column."""

    input_ids: list[int]
    row: dict[str, Any]
    messages: list[Message] | None = None  # the prompt as a conversation, whatever the template


def collate_tokens(rows: Sequence[TokenizedExample], normalizer: float, pad_id: int) -> TokenBatch:
    """Right-pad sequences and their loss masks to (B, T)."""
    input_ids, attention_mask = pad_right([row.input_ids for row in rows], pad_id)
    loss_mask, _ = pad_right([[int(target) for target in row.loss_mask] for row in rows], 0)
    loss_mask[:, 0] = 0  # no logits predict the first token
    return TokenBatch(input_ids, attention_mask, loss_mask.bool(), torch.tensor(normalizer, dtype=torch.float32))


def collate_packed(rows: Sequence[TokenizedExample], normalizer: float) -> TokenBatch:
    """Concatenate sequences to one row (1, T) without padding."""
    input_ids = torch.tensor([list(chain.from_iterable(row.input_ids for row in rows))], dtype=torch.int64)
    # the first token of a sequence is never a target: the logits before it belong to another sequence
    loss_mask = torch.tensor([list(chain.from_iterable([False, *row.loss_mask[1:]] for row in rows))])
    lengths = tuple(len(row.input_ids) for row in rows)
    count = torch.tensor(normalizer, dtype=torch.float32)
    return TokenBatch(input_ids, torch.ones_like(input_ids), loss_mask, count, lengths)


def collate_rankings(rows: Sequence[TokenizedRanking], normalizer: float, pad_id: int) -> RankingBatch:
    """Right-pad prompt + completion of every completion; the rows of a ranking are adjacent."""
    input_ids, attention_mask = pad_right([row.prompt + each for row in rows for each in row.completions], pad_id)
    prompt_length = [len(row.prompt) for row in rows for _ in row.completions]
    ranking_index = [number for number, row in enumerate(rows) for _ in row.completions]
    ranks = [rank for row in rows for rank in row.ranks]
    return RankingBatch(
        input_ids,
        attention_mask,
        torch.tensor(prompt_length),
        torch.tensor(ranking_index),
        torch.tensor(ranks),
        torch.tensor(normalizer, dtype=torch.float32),
    )


def collate_prompts(prompts: Sequence[TokenizedPrompt], index: Sequence[int], pad_id: int) -> PromptBatch:
    """Left-pad prompts to (B, P), so that every response begins in the same column."""
    input_ids, attention_mask = pad_left([prompt.input_ids for prompt in prompts], pad_id)
    rows = [prompt.row for prompt in prompts]
    messages = [prompt.messages or to_messages(prompt.row.get("prompt", "")) for prompt in prompts]
    return PromptBatch(input_ids, attention_mask, rows, torch.tensor(list(index), dtype=torch.int64), messages)
