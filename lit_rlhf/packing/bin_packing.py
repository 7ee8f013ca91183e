"""Bin packing: which sequences to concatenate in one row, so that little of a batch is padding."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack_balanced(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Pack sequences into as few rows as hold them, the rows about equally long.

    Longest first, each into the shortest row so far: a batch is as wide as its widest row, so rows of similar length
    waste less than full rows and a remainder. Where that makes a row longer than the limit, by best fit decreasing.

    Args:
        lengths: Tokens of each sequence.
        limit: Most tokens per row; no sequence is longer.

    Returns:
        Rows, as indices into `lengths`; the longest row first, none empty.
    """
    assert max(lengths) <= limit, (max(lengths), limit)
    num_rows = -(-sum(lengths) // limit)
    while True:
        balanced = _partition(lengths, num_rows)
        if max(total for total, _ in balanced) <= limit:
            return _longest_first(balanced)
        filled = _best_fit_decreasing(lengths, limit)
        if len(filled) <= num_rows:
            return _longest_first(filled)
        num_rows += 1


def partition_balanced(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Partition sequences into parts of about equally many tokens: longest first, each into the shortest part so far.

    Args:
        lengths: Tokens of each sequence.
        num_parts: How many parts.

    Returns:
        Parts, as indices into `lengths`; the longest part first. Some are empty where parts outnumber sequences.
    """
    return _longest_first(_partition(lengths, num_parts))


def forward_flops(rows: int, width: int, hidden_size: int) -> int:
    """Estimate the cost of a forward pass, for comparing batches: `rows * width * (6 D + width)`.

    In units of 4 D multiplications per layer: 6 D per token for the linear layers, `width` for its attention.

    Args:
        rows: Rows of the batch.
        width: Tokens per row.
        hidden_size: D, of the model.
    """
    return rows * width * (6 * hidden_size + width)


def _longest_first(rows: list[tuple[int, list[int]]]) -> list[list[int]]:
    return [indices for _, indices in sorted(rows, key=lambda row: (-row[0], row[1]))]


def _partition(lengths: Sequence[int], num_parts: int) -> list[tuple[int, list[int]]]:
    """Return total length and indices of each part."""
    heap: list[tuple[int, int, list[int]]] = [(0, part, []) for part in range(num_parts)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        total, part, indices = heap[0]
        indices.append(index)
        heapq.heapreplace(heap, (total + lengths[index], part, indices))
    return [(total, indices) for total, _, indices in heap]


def _best_fit_decreasing(lengths: Sequence[int], limit: int) -> list[tuple[int, list[int]]]:
    """Return total length and indices of each row: longest first, each into the fullest row that still holds it."""
    rows: list[tuple[int, list[int]]] = []
    remaining: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        found = bisect.bisect_left(remaining, (length, -1))
        if found == len(remaining):
            rows.append((length, [index]))
            bisect.insort(remaining, (limit - length, len(rows) - 1))
        else:
            free, row = remaining.pop(found)
            total, indices = rows[row]
            rows[row] = (total + length, [*indices, index])
            bisect.insort(remaining, (free - length, row))
    return rows
