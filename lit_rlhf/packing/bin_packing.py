"""Which sequences are laid behind each other in one row, so that little of a batch is padding."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack_balanced(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Sequences dealt to as few rows as hold them, the rows about equally long.

    The longest goes first, each to the row that is shortest so far. Rows of like length waste less than full rows and
    a rest: a batch is as wide as its widest row. Where rows of like length would be too long, each sequence goes to the
    fullest row that has room for it.

    Args:
        lengths: Tokens of each sequence.
        limit: The most tokens of a row; no sequence is longer.

    Returns:
        Rows, as places in `lengths`; the longest row first, none empty.
    """
    assert max(lengths) <= limit, (max(lengths), limit)
    rows = -(-sum(lengths) // limit)
    while True:
        dealt = _partition(lengths, rows)
        if max(total for total, _ in dealt) <= limit:
            return _longest_first(dealt)
        filled = _best_fit_decreasing(lengths, limit)
        if len(filled) <= rows:
            return _longest_first(filled)
        rows += 1


def partition_balanced(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Sequences dealt to shares about equally long: the longest goes first, each to the share that is shortest so far.

    Args:
        lengths: Tokens of each sequence.
        num_parts: How many.

    Returns:
        Shares, as places in `lengths`; the longest share first. Some are empty where there are more than sequences.
    """
    return _longest_first(_partition(lengths, num_parts))


def forward_flops(rows: int, width: int, hidden_size: int) -> int:
    """What a pass over rows takes: 6 D a token, and the width for its attention, times 4 D multiplications a layer.

    Args:
        rows: How many.
        width: Tokens of each.
        hidden_size: D, the model's hidden size.
    """
    return rows * width * (6 * hidden_size + width)


def _longest_first(rows: list[tuple[int, list[int]]]) -> list[list[int]]:
    return [places for _, places in sorted(rows, key=lambda row: (-row[0], row[1]))]


def _partition(lengths: Sequence[int], rows: int) -> list[tuple[int, list[int]]]:
    """The rows with their totals."""
    heap: list[tuple[int, int, list[int]]] = [(0, row, []) for row in range(rows)]
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        total, row, places = heap[0]
        places.append(place)
        heapq.heapreplace(heap, (total + lengths[place], row, places))
    return [(total, places) for total, _, places in heap]


def _best_fit_decreasing(lengths: Sequence[int], limit: int) -> list[tuple[int, list[int]]]:
    """The rows with their totals, by best fit: the longest first, each to the row with the least room that holds it."""
    rows: list[tuple[int, list[int]]] = []
    room: list[tuple[int, int]] = []  # of each row: what is left, and which it is; in increasing order
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        length = lengths[place]
        found = bisect.bisect_left(room, (length, -1))
        if found == len(room):
            rows.append((length, [place]))
            bisect.insort(room, (limit - length, len(rows) - 1))
        else:
            left, number = room.pop(found)
            total, places = rows[number]
            rows[number] = (total + length, [*places, place])
            bisect.insort(room, (left - length, number))
    return rows
