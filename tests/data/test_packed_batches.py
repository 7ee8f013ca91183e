"""Packed micro-batches of supervised fine-tuning: which rows they hold, and the fields of the batch."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data import DataRequirements, DemonstrationDataModule
from lit_rlhf.data.collation import TokenizedExample, collate_packed, collate_tokens
from lit_rlhf.data.loader import ResumableLoader
from lit_rlhf.errors import UserError


def long_tailed(count, seed=0):
    generator = random.Random(seed)
    return [min(2048, max(4, int(generator.lognormvariate(4.5, 1.0)))) for _ in range(count)]


def make_loaders(lengths, micro_batch_size, accumulate=1, world_size=1, packed=False, **settings):
    return [
        ResumableLoader(
            list(range(len(lengths))),
            lambda rows, normalizer: rows,
            micro_batch_size=micro_batch_size,
            accumulate_grad_batches=accumulate,
            world_size=world_size,
            rank=rank,
            num_targets=lambda row: lengths[row],
            length=lambda row: lengths[row],
            packing=packed,
            **settings,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulate", "world_size"), [(32, 1, 2), (8, 4, 1), (16, 2, 4), (64, 1, 8)]
)
def test_packed_micro_batches_hold_about_as_many_tokens_each(micro_batch_size, accumulate, world_size):
    lengths = long_tailed(2048)
    for step in zip(*make_loaders(lengths, micro_batch_size, accumulate, world_size, packed=True)):
        tokens = [sum(lengths[row] for row in rows) for rows in step]
        assert max(tokens) <= 1.02 * min(tokens) or max(len(rows) for rows in step) <= 2


def test_token_efficiency_is_that_of_the_batches():
    lengths = long_tailed(256)
    loaders = make_loaders(lengths, 8, 2, 2)
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
    """Packing keeps the rows of every optimizer step and the number of micro-batches."""

    def minibatches(packed):
        loaders = make_loaders(lengths, micro_batch_size, accumulate, world_size, packed=packed)
        streams = [list(loader) for loader in loaders]
        assert len({len(stream) for stream in streams}) == 1 and len(streams[0]) == len(loaders[0])
        steps = []
        for start in range(0, len(streams[0]), accumulate):
            micros = [micro for stream in streams for micro in stream[start : start + accumulate]]
            assert all(micros)
            steps.append(sorted(row for micro in micros for row in micro))
        return steps

    assert minibatches(True) == minibatches(False)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=14), st.integers(1, 4), st.integers(1, 3))
def test_packed_validation_yields_every_row_once(lengths, micro_batch_size, world_size):
    settings = {"shuffle": False, "drop_last": False, "without_targets": lambda row: -1}
    loaders = make_loaders(lengths, micro_batch_size, 1, world_size, packed=True, **settings)
    streams = [list(loader) for loader in loaders]
    assert {len(stream) for stream in streams} == {len(loaders[0])}
    rows = [row for stream in streams for batch in stream for row in batch if row >= 0]
    assert sorted(rows) == list(range(len(lengths)))


def test_collate_packed_by_hand():
    rows = [
        TokenizedExample([5, 6, 7], [False, True, True]),
        TokenizedExample([8, 9], [True, True]),
        TokenizedExample([4], [True]),
    ]
    batch = collate_packed(rows, 4.0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]] and batch.sequence_lengths == (3, 2, 1)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1]]
    # the first token of a sequence is no target: the token before it belongs to another sequence
    assert batch.loss_mask.int().tolist() == [[0, 1, 1, 0, 1, 0]]
    assert batch.loss_mask.dtype == torch.bool and batch.normalizer == 4
    assert collate_tokens(rows, 4.0, 0).sequence_lengths is None


def test_the_data_module_packs_if_check_packing_allows(attach, write):
    rows = [{"prompt": "p" * (n % 5 + 1), "completion": "c" * (n % 7 + 1)} for n in range(24)]
    settings = {"max_prompt_length": 8, "max_completion_length": 8, "micro_batch_size": 8, "batching": "packing"}
    data = DemonstrationDataModule(write(rows), **settings)
    with pytest.raises(
        UserError, match="modules that keep the sequences of a row separate, ToyModule has no check_pac"
    ):
        attach(data)
    calls = []

    class PackingModule(DataRequirements):
        tokenizer = data.trainer.lightning_module.tokenizer

        def check_packing(self, max_tokens, setting):
            calls.append((max_tokens, setting))

    data.trainer.lightning_module = PackingModule()
    data.training_rows = None
    data.setup("fit")
    data.setup("fit")
    assert calls == [(max(len(row["prompt"]) + len(row["completion"]) + 1 for row in rows), "data.batching")]
    count = 0
    for batch in data.train_dataloader():
        assert batch.input_ids.shape == (1, sum(batch.sequence_lengths)) and len(batch.sequence_lengths) == 8
        assert batch.normalizer == batch.loss_mask.sum()
        count += len(batch.sequence_lengths)
    assert count == 24


def test_a_module_refuses_packing_by_default(attach, write):
    data = DemonstrationDataModule(write([{"prompt": "p", "completion": "c"}]), micro_batch_size=1, batching="packing")
    with pytest.raises(UserError, match="ToyModule has no check_packing; use 'group_by_length'"):
        attach(data)
    with pytest.raises(UserError, match="DataRequirements has no check_packing; use 'group_by_length'"):
        DataRequirements().check_packing(1, "data.batching")
