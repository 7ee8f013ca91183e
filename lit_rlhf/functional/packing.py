"""Which sequences are laid behind each other in one row, so that little of a batch is padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], shares: int, limit: int) -> list[list[int]]:
    """Sequences dealt to as few rows as hold them, the rows about equally long.

    The longest goes first, each to the row that is shortest so far. Rows of like length waste less than full rows and
    a rest: a batch is as wide as its widest row.

    Args:
        lengths: Tokens of each sequence.
        shares: How many micro-batches the rows are for: there is a row for each, and the same number for all where
            there are sequences enough.
        limit: The most tokens of a row; no sequence is longer.

    Returns:
        Rows, as places in `lengths`; the longest row first, none empty.
    """
    assert max(lengths) <= limit, (max(lengths), limit)
    each = max(1, -(-sum(lengths) // (limit * shares)))
    while True:
        rows = min(each * shares, len(lengths))
        dealt = _deal(lengths, rows)
        if rows == len(lengths) or max(total for total, _ in dealt) <= limit:
            return [places for _, places in sorted(dealt, key=lambda row: (-row[0], row[1]))]
        each += 1


def _deal(lengths: Sequence[int], rows: int) -> list[tuple[int, list[int]]]:
    """The rows with their totals."""
    heap: list[tuple[int, int, list[int]]] = [(0, row, []) for row in range(rows)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        total, row, places = heap[0]
        places.append(place)
        heapq.heapreplace(heap, (total + lengths[place], row, places))
    return [(total, places) for total, _, places in heap]
