"""Packing: every sequence once, rows within the limit, little padding; and what a packed batch says of its rows."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.data.collation import TokenRow, collate_packed, collate_tokens
from lit_rlhf.data.loader import Packing, PlannedLoader
from lit_rlhf.errors import UserError
from lit_rlhf.functional.packing import pack, pack_widening

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@given(lengths, st.integers(1, 6), st.integers(0, 30))
def test_every_sequence_stands_once_in_a_row_within_the_limit(lengths, shares, room):
    limit = max(lengths) + room
    rows = pack(lengths, shares, limit)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in row) for row in rows]
    assert totals == sorted(totals, reverse=True) and totals[0] <= limit
    assert all(rows) and len(rows) >= min(shares, len(lengths))
    assert len(rows) % shares == 0 or len(rows) == len(lengths)


def test_sequences_of_half_a_row_and_more_fill_what_can_be_filled():
    """Lengths of an eighth to the whole of a row: dealt by length alone, a tenth of the rows would be left over."""
    drawn = random.Random(0)
    lengths = [drawn.randint(32, 256) for _ in range(200)]
    rows = pack(lengths, 1, 256)
    alone = sum(length > 128 for length in lengths)  # no two of these fit
    assert len(rows) <= 1.04 * max(alone, sum(lengths) / 256)


def filled(lengths, rows):
    """Rows, their width, and the share of tokens that are none."""
    widths = [sum(lengths[place] for place in row) for row in rows]
    return len(rows), max(widths), 1 - sum(widths) / (len(rows) * max(widths))


@given(lengths, st.integers(1, 4), st.integers(0, 30), st.sampled_from([8, 256, 4096]))
def test_rows_widen_to_twice_the_limit_where_that_is_cheaper(lengths, shares, room, hidden):
    limit = max(lengths) + room
    rows = pack_widening(lengths, shares, limit, hidden)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    count, width, padding = filled(lengths, rows)
    assert width <= 2 * limit
    for narrow, its_width, its_padding in (filled(lengths, pack(lengths, shares, at)) for at in (limit, 2 * limit)):
        assert count * width * (6 * hidden + 2.5 * width) <= narrow * its_width * (6 * hidden + 2.5 * its_width)
        assert padding <= its_padding + 1e-9 or width < its_width, "more padding for nothing"


def test_a_wide_model_gets_wide_rows_and_a_narrow_one_narrow_ones():
    """28 demonstrations of an eighth to the whole of a row: of rows of 256 a seventh would be padding."""
    drawn, fills, widths = random.Random(0), [], []
    for _ in range(50):
        lengths = [drawn.randint(32, 256) for _ in range(28)]
        fills.append(1 - filled(lengths, pack_widening(lengths, 1, 256, 4096))[2])
        widths.append(filled(lengths, pack_widening(lengths, 1, 256, 64))[1])
    assert min(fills) >= 0.9 and sum(fills) / len(fills) >= 0.94
    assert sum(widths) / len(widths) <= 280


def long_tailed(count, seed=0):
    generator = random.Random(seed)
    return [min(2048, max(4, int(generator.lognormvariate(4.5, 1.0)))) for _ in range(count)]


def plan(lengths, micro_batch, accumulate=1, world_size=1, packed=None, **settings):
    return [
        PlannedLoader(
            list(range(len(lengths))),
            lambda rows, normalizer: rows,
            micro_batch=micro_batch,
            accumulate=accumulate,
            world_size=world_size,
            rank=rank,
            weight=lambda row: lengths[row],
            length=lambda row: lengths[row],
            packed=packed and Packing(packed, 64),
            **settings,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(("micro_batch", "accumulate", "world_size"), [(32, 1, 1), (8, 4, 1), (16, 2, 4), (64, 1, 8)])
def test_packed_batches_hold_little_but_tokens(micro_batch, accumulate, world_size):
    lengths = long_tailed(2048)
    packed = plan(lengths, micro_batch, accumulate, world_size, packed=2048)[0]
    padded = plan(lengths, micro_batch, accumulate, world_size)[0]
    assert packed.fill() >= 0.95, packed.fill()
    assert packed.fill() > padded.fill()


def test_the_fill_is_that_of_the_batches():
    lengths = long_tailed(256)
    loaders = plan(lengths, 8, 2, 2, packed=2048)
    tokens = positions = 0
    for loader in loaders:
        for batch in loader:
            widths = [sum(lengths[row] for row in line) for line in batch]
            tokens, positions = tokens + sum(widths), positions + len(widths) * max(widths)
    assert loaders[0].fill() == pytest.approx(tokens / positions, abs=1e-12) and tokens == sum(lengths)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=24, max_size=40),
    micro_batch=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 2),
)
def test_packing_changes_no_minibatch(lengths, micro_batch, accumulate, world_size):
    """The same rows for every optimizer step, and the same number of micro-batches, as without."""

    def minibatches(packed):
        loaders = plan(lengths, micro_batch, accumulate, world_size, packed=packed)
        streams = [list(loader) for loader in loaders]
        assert len({len(stream) for stream in streams}) == 1 and len(streams[0]) == len(loaders[0])
        found = []
        for start in range(0, len(streams[0]), accumulate):
            micros = [micro for stream in streams for micro in stream[start : start + accumulate]]
            assert all(micros)
            found.append(sorted(row for micro in micros for line in micro for row in (line if packed else [line])))
        return found

    assert minibatches(50) == minibatches(None)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=14), st.integers(1, 4), st.integers(1, 3))
def test_packed_validation_sees_every_row_once(lengths, micro_batch, world_size):
    loaders = plan(lengths, micro_batch, 1, world_size, packed=40, shuffle=False, drop_last=False, blank=lambda row: -1)
    streams = [list(loader) for loader in loaders]
    assert {len(stream) for stream in streams} == {len(loaders[0])}
    seen = [row for stream in streams for batch in stream for line in batch for row in line if row >= 0]
    assert sorted(seen) == list(range(len(lengths)))


def test_a_packed_batch_by_hand():
    lines = [
        [TokenRow([5, 6, 7], [False, True, True]), TokenRow([8, 9], [True, True])],
        [TokenRow([4], [True])],
    ]
    batch = collate_packed(lines, 4.0, pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 0, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.segment.tolist() == [[1, 1, 1, 2, 2], [1, 0, 0, 0, 0]]
    # the first token of a sequence is no target: what stands before it is another sequence
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0]]
    assert batch.loss_mask.dtype == torch.bool and batch.normalizer == 4
    assert collate_tokens(lines[0], 4.0, 0).segment is None


def test_the_data_module_packs_and_asks_the_module(attach, write):
    rows = [{"prompt": "p" * (n % 5 + 1), "completion": "c" * (n % 7 + 1)} for n in range(24)]
    settings = {"max_prompt_length": 8, "max_completion_length": 8, "micro_batch": 8, "batching": "packed"}
    data = DemonstrationDataModule(write(rows), **settings)
    with pytest.raises(UserError, match="modules that keep the sequences of a row apart, ToyModule has no require_seg"):
        attach(data)
    asked = []
    data.trainer.lightning_module.require_segments = lambda longest, setting: asked.append((longest, setting))
    data.training_rows = None
    with pytest.raises(UserError, match="or no hidden_size; use 'by_length'"):
        data.setup("fit")
    data.trainer.lightning_module.hidden_size = 64
    data.training_rows = None
    data.setup("fit")
    data.setup("fit")
    assert asked == [(max(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows), "data.batching")]
    seen = 0
    for batch in data.train_dataloader():
        assert batch.input_ids.shape[1] <= 32 and len(batch.input_ids) < 8
        assert batch.normalizer == batch.loss_mask.sum()
        assert (batch.segment > 0).equal(batch.attention_mask.bool())
        seen += int(batch.segment.amax(1).sum())
    assert seen == 24
