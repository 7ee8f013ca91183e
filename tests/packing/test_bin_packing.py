"""Bin packing: every sequence once, rows within the limit, little padding."""

import random

from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.packing import pack_balanced, partition_balanced

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@given(lengths, st.integers(0, 30))
def test_every_sequence_is_once_in_a_row_within_the_limit(lengths, slack):
    limit = max(lengths) + slack
    rows = pack_balanced(lengths, limit)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in row) for row in rows]
    assert totals == sorted(totals, reverse=True) and totals[0] <= limit
    # best fit never leaves two rows that fit into one, and balanced rows are as few as possible
    assert all(rows) and (len(rows) == -(-sum(lengths) // limit) or sum(totals[-2:]) > limit)


def test_long_sequences_fill_the_rows_that_they_can():
    """Lengths of an eighth of a row to a full row: balancing alone would need a tenth more rows."""
    generator = random.Random(0)
    lengths = [generator.randint(32, 256) for _ in range(200)]
    rows = pack_balanced(lengths, 256)
    num_long = sum(length > 128 for length in lengths)  # no two of these fit into one row
    assert len(rows) <= 1.04 * max(num_long, sum(lengths) / 256)


@given(lengths, st.integers(1, 12))
def test_parts_hold_every_sequence_once_and_are_about_equally_long(lengths, num_parts):
    parts = partition_balanced(lengths, num_parts)
    assert len(parts) == num_parts and sorted(index for part in parts for index in part) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in part) for part in parts]
    assert totals == sorted(totals, reverse=True)
    # longest first is at most a third above the optimum (Graham, 1969), which is at least any of these
    descending = sorted(lengths, reverse=True)
    optimum = max(sum(lengths) / num_parts, descending[0], sum(descending[num_parts - 1 : num_parts + 1]))
    assert totals[0] <= 4 / 3 * optimum or len(lengths) > 2 * num_parts
    assert totals[0] - totals[-1] <= descending[0]
    assert all(parts) or len(lengths) < num_parts
