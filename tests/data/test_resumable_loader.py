"""The planned loader: a minibatch does not depend on how it is cut, and a position is enough to resume."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.data.loader import BatchShape, ResumableLoader, epoch_order, infinite_permutation
from lit_rlhf.errors import UserError


def identity(rows, normalizer):
    return rows, normalizer


def loader(count, cut, **settings):
    return ResumableLoader(range(count), identity, **cut._asdict(), **settings)


def minibatches(count, cut, **settings):
    """What all ranks yield in one epoch, as [(rows of the minibatch, normalizers seen)]."""
    per_rank = [list(loader(count, cut._replace(rank=rank), **settings)) for rank in range(cut.world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    joined = []
    for start in range(0, len(per_rank[0]), cut.accumulate):
        parts = [batch for batches in per_rank for batch in batches[start : start + cut.accumulate]]
        joined.append((sorted(row for rows, _ in parts for row in rows), {normalizer for _, normalizer in parts}))
    return joined


@given(cuts=st.permutations([2, 2, 3]), seed=st.integers(0, 5), count=st.integers(12, 60), by_length=st.booleans())
@settings(max_examples=40, deadline=None)
def test_minibatch_is_the_same_for_every_cut(cuts, seed, count, by_length):
    micro_batch_size, accumulate, world_size = cuts
    weight = lambda row: row * row + 1  # noqa: E731
    length = (lambda row: row % 7) if by_length else None
    whole = minibatches(count, BatchShape(12), seed=seed, weight=weight)
    parts = minibatches(
        count, BatchShape(micro_batch_size, accumulate, world_size), seed=seed, weight=weight, length=length
    )
    assert parts == whole
    for rows, normalizers in parts:
        assert normalizers == {float(sum(row * row + 1 for row in rows))}


def test_epoch_covers_every_row_of_its_minibatches_once():
    seen = [row for rows, _ in minibatches(30, BatchShape(2, 2, 2), seed=3) for row in rows]
    assert len(seen) == 24 and len(set(seen)) == 24
    assert loader(30, BatchShape(2, 2, 2)).num_dropped == 6


def test_epochs_differ_and_are_repeatable():
    one, two = loader(20, BatchShape(4), seed=7), loader(20, BatchShape(4), seed=7)
    first, second = list(one), list(one)
    assert first != second
    assert [list(two), list(two)] == [first, second]
    assert list(loader(20, BatchShape(4), seed=8)) != first


def test_like_lengths_lie_in_one_micro_batch():
    batches = list(loader(32, BatchShape(4, accumulate_grad_batches=8), length=lambda row: row))
    widths = [max(rows) - min(rows) for rows, _ in batches]
    assert widths == [3] * 8  # sorted, then cut: 0-3, 4-7, …


@given(count=st.integers(1, 40), micro_batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_validation_gives_every_row_once_and_equal_counts(count, micro_batch_size, world_size):
    cut = BatchShape(micro_batch_size, 1, world_size)
    seen, lengths = [], set()
    for rank in range(world_size):
        part = loader(count, cut._replace(rank=rank), shuffle=False, drop_last=False, blank=lambda row: -1)
        batches = list(part)
        lengths.add(len(batches))
        assert len(batches) == len(part)
        assert all(0 < len(rows) <= micro_batch_size for rows, _ in batches)
        seen += [row for rows, _ in batches for row in rows if row != -1]
    assert sorted(seen) == list(range(count))
    assert lengths == {-(-count // (micro_batch_size * world_size))}


@given(stop=st.integers(0, 11), epochs=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_resume_yields_exactly_the_rest(stop, epochs):
    cut = BatchShape(2, accumulate_grad_batches=3, world_size=2, rank=1)
    unbroken = loader(50, cut, seed=1)
    whole = [batch for _ in range(epochs + 2) for batch in unbroken]

    first = loader(50, cut, seed=1)
    seen = [batch for _ in range(epochs) for batch in first]
    part = iter(first)
    seen += [next(part) for _ in range(stop)]
    second = loader(50, cut, seed=1)
    second.load_state_dict(first.state_dict())
    seen += list(second)
    if stop == len(second):  # the first stopped at its epoch's end: the second went on with the next
        assert seen == whole
    else:
        assert seen + list(second) == whole


def test_iter_is_lazy():
    one, two = loader(20, BatchShape(4)), loader(20, BatchShape(4))
    begun = iter(one)
    one.load_state_dict({"epoch": 2, "position": 3})
    two.load_state_dict({"epoch": 2, "position": 0})
    assert list(begun) == list(two)[3:]


def test_an_epoch_left_early_is_not_continued():
    one, two = loader(20, BatchShape(4)), loader(20, BatchShape(4))
    next(iter(one))
    list(two)
    assert list(one) == list(two)


def test_too_few_rows_name_the_three_sizes():
    with pytest.raises(UserError, match=r"11 rows .* 12 = micro_batch_size 2 × accumulate_grad_batches 3 × 2 ranks"):
        loader(11, BatchShape(2, 3, 2))
    with pytest.raises(UserError, match="micro_batch_size: 0"):
        loader(11, BatchShape(0))


def test_epoch_order_is_a_permutation_keyed_on_both_numbers():
    assert sorted(epoch_order(100, 1, 2)) == list(range(100))
    assert len({epoch_order(100, seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    expected = epoch_order.__wrapped__(100, 1, 2)
    with torch.device("meta"):  # a strategy may ask for a loader under the device of the run
        assert epoch_order.__wrapped__(100, 1, 2) == expected


def test_endless_places_run_through_whole_passes():
    places = infinite_permutation(7, seed=0, start=3, count=25)
    stream = [place for epoch in range(4) for place in epoch_order(7, 0, epoch)]
    assert places == stream[3:28]
