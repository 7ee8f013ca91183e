"""The loader: a minibatch does not depend on its partition, and a position is enough to resume."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.data.loader import BatchShape, ResumableLoader, epoch_permutation, infinite_permutation
from lit_rlhf.errors import UserError


def identity(rows, normalizer):
    return rows, normalizer


def loader(count, shape, **settings):
    return ResumableLoader(range(count), identity, **shape._asdict(), **settings)


def minibatches(count, shape, **settings):
    """Return what all ranks yield in one epoch, as [(rows of the minibatch, its normalizers)]."""
    per_rank = [list(loader(count, shape._replace(rank=rank), **settings)) for rank in range(shape.world_size)]
    assert len({len(batches) for batches in per_rank}) == 1
    joined = []
    for start in range(0, len(per_rank[0]), shape.accumulate_grad_batches):
        parts = [batch for batches in per_rank for batch in batches[start : start + shape.accumulate_grad_batches]]
        joined.append((sorted(row for rows, _ in parts for row in rows), {normalizer for _, normalizer in parts}))
    return joined


@given(
    shapes=st.permutations([2, 2, 3]), seed=st.integers(0, 5), count=st.integers(12, 60), group_by_length=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_minibatch_is_the_same_for_every_batch_shape(shapes, seed, count, group_by_length):
    micro_batch_size, accumulate, world_size = shapes
    num_targets = lambda row: row * row + 1  # noqa: E731
    length = (lambda row: row % 7) if group_by_length else None
    expected = minibatches(count, BatchShape(12), seed=seed, num_targets=num_targets)
    parts = minibatches(
        count, BatchShape(micro_batch_size, accumulate, world_size), seed=seed, num_targets=num_targets, length=length
    )
    assert parts == expected
    for rows, normalizers in parts:
        assert normalizers == {float(sum(row * row + 1 for row in rows))}


def test_epoch_covers_every_row_of_its_minibatches_once():
    rows_of_epoch = [row for rows, _ in minibatches(30, BatchShape(2, 2, 2), seed=3) for row in rows]
    assert len(rows_of_epoch) == 24 and len(set(rows_of_epoch)) == 24
    assert loader(30, BatchShape(2, 2, 2)).num_dropped == 6


def test_epochs_differ_and_are_repeatable():
    one, two = loader(20, BatchShape(4), seed=7), loader(20, BatchShape(4), seed=7)
    first, second = list(one), list(one)
    assert first != second
    assert [list(two), list(two)] == [first, second]
    assert list(loader(20, BatchShape(4), seed=8)) != first


def test_similar_lengths_are_in_one_micro_batch():
    batches = list(loader(32, BatchShape(4, accumulate_grad_batches=8), length=lambda row: row))
    widths = [max(rows) - min(rows) for rows, _ in batches]
    assert widths == [3] * 8  # sorted, then split: 0-3, 4-7, …


@given(count=st.integers(1, 40), micro_batch_size=st.integers(1, 5), world_size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_validation_gives_every_row_once_and_equal_counts(count, micro_batch_size, world_size):
    shape = BatchShape(micro_batch_size, 1, world_size)
    yielded, num_batches = [], set()
    for rank in range(world_size):
        part = loader(count, shape._replace(rank=rank), shuffle=False, drop_last=False, without_targets=lambda row: -1)
        batches = list(part)
        num_batches.add(len(batches))
        assert len(batches) == len(part)
        assert all(0 < len(rows) <= micro_batch_size for rows, _ in batches)
        yielded += [row for rows, _ in batches for row in rows if row != -1]
    assert sorted(yielded) == list(range(count))
    assert num_batches == {-(-count // (micro_batch_size * world_size))}


@given(stop=st.integers(0, 11), epochs=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_resume_yields_exactly_the_rest(stop, epochs):
    shape = BatchShape(2, accumulate_grad_batches=3, world_size=2, rank=1)
    unbroken = loader(50, shape, seed=1)
    expected = [batch for _ in range(epochs + 2) for batch in unbroken]

    first = loader(50, shape, seed=1)
    batches = [batch for _ in range(epochs) for batch in first]
    part = iter(first)
    batches += [next(part) for _ in range(stop)]
    del batches[len(batches) - stop % 3 :]  # of a minibatch that was not completed: it comes again
    second = loader(50, shape, seed=1)
    second.load_state_dict(first.state_dict())
    batches += list(second)
    if stop == len(second):  # the first stopped at the end of an epoch: the second continued with the next
        assert batches == expected
    else:
        assert batches + list(second) == expected


def take_rows(count, shape, state, minibatches=None):
    """Return the rows that all ranks together yield of an epoch, in minibatches, and the state of each rank."""
    rows, states = [], []
    for rank in range(shape.world_size):
        part = loader(count, shape._replace(rank=rank), seed=4)
        if state is not None:
            part.load_state_dict(state)
        batches = iter(part)
        steps = range(minibatches * shape.accumulate_grad_batches) if minibatches is not None else iter(int, 1)
        rows += [row for _, batch in zip(steps, batches) for row in batch[0]]
        states.append(part.state_dict())
    return rows, states


SHAPES = st.builds(BatchShape, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@given(before=SHAPES, after=SHAPES, count=st.integers(36, 60), data=st.data())
@settings(max_examples=150, deadline=None)
def test_after_a_resume_with_other_sizes_every_row_of_the_epoch_comes_once(before, after, count, data):
    done = data.draw(st.integers(0, count // before.minibatch_size - 1))
    first, states = take_rows(count, before, None, done)
    assert all(state == states[0] for state in states) and states[0]["rows"] == len(first)
    order, size = epoch_permutation(count, 4, 0), after.minibatch_size
    if len(first) % size:
        with pytest.raises(UserError, match=f"after {len(first)} rows .* minibatches of {size} = ") as refusal:
            take_rows(count, after, states[0])
        fitting = str(refusal.value).split("a minibatch of ")[1].split(", or ")[0].split(", ")
        assert fitting and all(len(first) % int(each) == 0 for each in fitting)
        return
    if first and count - len(first) < size:
        with pytest.raises(UserError, match=f"the {count - len(first)} rows .* fill no minibatch of {size}"):
            take_rows(count, after, states[0])
        return
    rest, _ = take_rows(count, after, states[0])
    assert sorted(first + rest) == sorted(order[: count // size * size])
    assert sorted(first) == sorted(order[: len(first)])


@pytest.mark.parametrize(
    ("count", "rows", "size"), [(40, 24, 24), (40, 36, 6), (25, 24, 2), (60, 30, 30), (59, 30, 30)]
)
def test_rows_that_fill_no_minibatch_of_now_are_refused(count, rows, size):
    state = {"epoch": 0, "rows": rows, "num_rows": count, "seed": 4}
    for shape in (BatchShape(size), BatchShape(1, size), BatchShape(size // 2, 1, 2)):
        part = loader(count, shape, seed=4)
        if count - rows >= size:
            part.load_state_dict(state)
            assert len(list(part)) == (count - rows) // size * shape.accumulate_grad_batches
            continue
        with pytest.raises(
            UserError, match=f"the {count - rows} rows that .* left .* fill no minibatch of {size}; take"
        ):
            part.load_state_dict(state)
        part.load_state_dict({**state, "rows": 0})  # between two epochs any minibatch can begin


@pytest.mark.parametrize(("other", "what"), [({"count": 41}, "num_rows 40"), ({"seed": 5}, "seed 4")])
def test_an_epoch_of_other_rows_is_not_continued(other, what):
    first = loader(40, BatchShape(4), seed=4)
    next(iter(first))
    now = {"count": 40, "seed": 4} | other
    second = loader(now.pop("count"), BatchShape(4), **now)
    with pytest.raises(UserError, match=f"in the middle of an epoch whose order is of {what}"):
        second.load_state_dict(first.state_dict())
    second.load_state_dict({**first.state_dict(), "rows": 0})  # at an epoch's end anything can change


def test_iter_is_lazy():
    one, two = loader(20, BatchShape(4)), loader(20, BatchShape(4))
    iterator = iter(one)
    one.load_state_dict({"epoch": 2, "rows": 12})
    two.load_state_dict({"epoch": 2, "rows": 0})
    assert list(iterator) == list(two)[3:]


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


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    assert sorted(epoch_permutation(100, 1, 2)) == list(range(100))
    assert len({epoch_permutation(100, seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    expected = epoch_permutation.__wrapped__(100, 1, 2)
    with torch.device("meta"):  # a strategy may build the loader under its own device context
        assert epoch_permutation.__wrapped__(100, 1, 2) == expected


def test_infinite_permutation_concatenates_the_epochs():
    indices = infinite_permutation(7, seed=0, start=3, count=25)
    stream = [index for epoch in range(4) for index in epoch_permutation(7, 0, epoch)]
    assert indices == stream[3:28]
