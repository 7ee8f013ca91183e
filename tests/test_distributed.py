"""Rows gathered from several ranks are those of one process, in its order, whatever the width on each rank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.distributed import gather_rows, raise_on_all_ranks
from lit_rlhf.errors import UserError
from tests.helpers.ranks import on_ranks

IDS = torch.arange(1, 25).view(6, 4)
FLAGS = IDS % 3 == 0
SCORES = torch.arange(6.0) / 7


def gather_on_rank(world_size: int = 2) -> list[torch.Tensor]:
    """Gather tables of which this rank holds rows r, r + W, …"""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rows = slice(dist.get_rank(), None, world_size)
    narrow = slice(None, 4 - dist.get_rank())  # rank 1 has one column less
    right = slice(dist.get_rank(), None)
    return [
        gather_rows(IDS[rows]),
        gather_rows(FLAGS[rows]),
        gather_rows(SCORES[rows]),
        gather_rows(IDS[rows, narrow]),
        gather_rows(IDS[rows, right], pad_left=True),
        gather_rows(FLAGS[rows, narrow]),
    ]


def test_two_ranks_give_the_rows_of_one_process(tmp_path):
    padded_right, padded_left = IDS.clone(), IDS.clone()
    padded_right[1::2, 3] = 0
    padded_left[1::2, 0] = 0
    flags = FLAGS.clone()
    flags[1::2, 3] = False
    expected = [IDS, FLAGS, SCORES, padded_right, padded_left, flags]
    for gathered in on_ranks(gather_on_rank, tmp_path):
        for actual, table in zip(gathered, expected, strict=True):
            assert actual.dtype == table.dtype
            assert torch.equal(actual, table)


def test_rows_of_one_prompt_stay_consecutive(tmp_path):
    """Three prompts per rank, two rows per prompt: rank r has prompts r, r + 2, r + 4."""
    table = torch.arange(24).view(12, 2)

    def gather_blocks() -> list[torch.Tensor]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        local = table.view(6, 2, 2)[dist.get_rank() :: 2].flatten(0, 1)
        return [gather_rows(local, block_size=2), gather_rows(local[:, 0], block_size=2)]

    for both, first in on_ranks(gather_blocks, tmp_path):
        assert torch.equal(both, table)
        assert torch.equal(first, table[:, 0])


@given(st.integers(0, 5), st.integers(1, 5))
def test_one_process_returns_its_rows(rows, width):
    table = torch.rand(rows, width)
    assert gather_rows(table) is table


@pytest.mark.parametrize("pad_left", [False, True])
def test_three_ranks(pad_left, tmp_path):
    def gather() -> torch.Tensor:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        return gather_rows(IDS[dist.get_rank() :: 3], pad_left)

    for gathered in on_ranks(gather, tmp_path, world_size=3):
        assert torch.equal(gathered, IDS)


def test_a_failure_of_one_rank_ends_all(tmp_path):
    def fail_on_rank_one() -> str:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        with raise_on_all_ranks():
            pass
        try:
            with raise_on_all_ranks():
                if dist.get_rank() == 1:
                    raise ZeroDivisionError("no scores")
        except (UserError, ZeroDivisionError) as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    assert on_ranks(fail_on_rank_one, tmp_path) == ["UserError: rank 1: no scores", "ZeroDivisionError: no scores"]
