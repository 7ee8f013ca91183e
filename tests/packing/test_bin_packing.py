"""Packing: every sequence once, rows within the limit, little padding; and what a packed batch says of its rows."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.data.collation import TokenizedExample, collate_packed, collate_tokens
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.errors import UserError
from lit_rlhf.packing.bin_packing import pack_balanced, partition_balanced

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=40)


@given(lengths, st.integers(0, 30))
def test_every_sequence_stands_once_in_a_row_within_the_limit(lengths, room):
    limit = max(lengths) + room
    rows = pack_balanced(lengths, limit)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in row) for row in rows]
    assert totals == sorted(totals, reverse=True) and totals[0] <= limit
    # two rows that fit one are one: best fit never leaves such, and rows of like length are as few as there can be
    assert all(rows) and (len(rows) == -(-sum(lengths) // limit) or sum(totals[-2:]) > limit)


def test_sequences_of_half_a_row_and_more_fill_what_can_be_filled():
    """Lengths of an eighth to the whole of a row: dealt by length alone, a tenth of the rows would be left over."""
    drawn = random.Random(0)
    lengths = [drawn.randint(32, 256) for _ in range(200)]
    rows = pack_balanced(lengths, 256)
    alone = sum(length > 128 for length in lengths)  # no two of these fit
    assert len(rows) <= 1.04 * max(alone, sum(lengths) / 256)


@given(lengths, st.integers(1, 12))
def test_shares_hold_every_sequence_once_and_are_about_equally_long(lengths, shares):
    dealt = partition_balanced(lengths, shares)
    assert len(dealt) == shares and sorted(place for share in dealt for place in share) == list(range(len(lengths)))
    totals = [sum(lengths[place] for place in share) for share in dealt]
    assert totals == sorted(totals, reverse=True)
    # the longest first is at most a third above the best (Graham, 1969), and that is at least any of these
    down = sorted(lengths, reverse=True)
    best = max(sum(lengths) / shares, down[0], sum(down[shares - 1 : shares + 1]))
    assert totals[0] <= 4 / 3 * best or len(lengths) > 2 * shares
    assert totals[0] - totals[-1] <= down[0]
    assert all(dealt) or len(lengths) < shares


def long_tailed(count, seed=0):
    generator = random.Random(seed)
    return [min(2048, max(4, int(generator.lognormvariate(4.5, 1.0)))) for _ in range(count)]


def plan(lengths, micro_batch_size, accumulate=1, world_size=1, packed=False, **settings):
    return [
        ResumableLoader(
            list(range(len(lengths))),
            lambda rows, normalizer: rows,
            micro_batch_size=micro_batch_size,
            accumulate=accumulate,
            world_size=world_size,
            rank=rank,
            weight=lambda row: lengths[row],
            length=lambda row: lengths[row],
            packed=packed,
            **settings,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulate", "world_size"), [(32, 1, 2), (8, 4, 1), (16, 2, 4), (64, 1, 8)]
)
def test_packed_micro_batches_hold_about_as_many_tokens_each(micro_batch_size, accumulate, world_size):
    lengths = long_tailed(2048)
    for step in zip(*plan(lengths, micro_batch_size, accumulate, world_size, packed=True)):
        tokens = [sum(lengths[row] for row in rows) for rows in step]
        assert max(tokens) <= 1.02 * min(tokens) or max(len(rows) for rows in step) <= 2


def test_the_fill_is_that_of_the_batches():
    lengths = long_tailed(256)
    loaders = plan(lengths, 8, 2, 2)
    tokens = positions = 0
    for loader in loaders:
        for batch in loader:
            widths = [lengths[row] for row in batch]
            tokens, positions = tokens + sum(widths), positions + len(widths) * max(widths)
    assert loaders[0].token_efficiency() == pytest.approx(tokens / positions, abs=1e-12) and tokens == sum(lengths)


@given(
    lengths=st.lists(st.integers(1, 20), min_size=24, max_size=40),
    micro_batch_size=st.integers(1, 3),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 2),
)
def test_packing_changes_no_minibatch(lengths, micro_batch_size, accumulate, world_size):
    """The same rows for every optimizer step, and the same number of micro-batches, as without."""

    def minibatches(packed):
        loaders = plan(lengths, micro_batch_size, accumulate, world_size, packed=packed)
        streams = [list(loader) for loader in loaders]
        assert len({len(stream) for stream in streams}) == 1 and len(streams[0]) == len(loaders[0])
        found = []
        for start in range(0, len(streams[0]), accumulate):
            micros = [micro for stream in streams for micro in stream[start : start + accumulate]]
            assert all(micros)
            found.append(sorted(row for micro in micros for row in micro))
        return found

    assert minibatches(True) == minibatches(False)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=14), st.integers(1, 4), st.integers(1, 3))
def test_packed_validation_sees_every_row_once(lengths, micro_batch_size, world_size):
    whole = {"shuffle": False, "drop_last": False, "blank": lambda row: -1}
    loaders = plan(lengths, micro_batch_size, 1, world_size, packed=True, **whole)
    streams = [list(loader) for loader in loaders]
    assert {len(stream) for stream in streams} == {len(loaders[0])}
    seen = [row for stream in streams for batch in stream for row in batch if row >= 0]
    assert sorted(seen) == list(range(len(lengths)))


def test_a_packed_batch_by_hand():
    rows = [
        TokenizedExample([5, 6, 7], [False, True, True]),
        TokenizedExample([8, 9], [True, True]),
        TokenizedExample([4], [True]),
    ]
    batch = collate_packed(rows, 4.0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]] and batch.sequence_lengths == (3, 2, 1)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1]]
    # the first token of a sequence is no target: what stands before it is another sequence
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1, 0]]
    assert batch.loss_mask.dtype == torch.bool and batch.normalizer == 4
    assert collate_tokens(rows, 4.0, 0).sequence_lengths is None


def test_the_data_module_packs_and_asks_the_module(attach, write):
    rows = [{"prompt": "p" * (n % 5 + 1), "completion": "c" * (n % 7 + 1)} for n in range(24)]
    settings = {"max_prompt_length": 8, "max_completion_length": 8, "micro_batch_size": 8, "batching": "packed"}
    data = DemonstrationDataModule(write(rows), **settings)
    with pytest.raises(UserError, match="modules that keep the sequences of a row apart, ToyModule has no require_seq"):
        attach(data)
    asked = []
    data.trainer.lightning_module.check_packing = lambda longest, setting: asked.append((longest, setting))
    data.training_rows = None
    data.setup("fit")
    data.setup("fit")
    assert asked == [(max(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows), "data.batching")]
    seen = 0
    for batch in data.train_dataloader():
        assert batch.input_ids.shape == (1, sum(batch.sequences)) and len(batch.sequences) == 8
        assert batch.normalizer == batch.loss_mask.sum()
        seen += len(batch.sequences)
    assert seen == 24
