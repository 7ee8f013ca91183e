"""Two ranks give the rows of one process, in its order, whatever the width of each rank's share."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.distributed import gather_rows
from tests.helpers.ranks import on_ranks

IDS = torch.arange(1, 25).view(6, 4)
FLAGS = IDS % 3 == 0
SCORES = torch.arange(6.0) / 7


def shares(world_size: int = 2) -> list[torch.Tensor]:
    """Gather on this rank what it has of each table: rows r, r + W, …"""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mine = slice(dist.get_rank(), None, world_size)
    narrow = slice(None, 4 - dist.get_rank())  # rank 1 has one column less
    late = slice(dist.get_rank(), None)
    return [
        gather_rows(IDS[mine]),
        gather_rows(FLAGS[mine]),
        gather_rows(SCORES[mine]),
        gather_rows(IDS[mine, narrow]),
        gather_rows(IDS[mine, late], pad_left=True),
        gather_rows(FLAGS[mine, narrow]),
    ]


def test_two_ranks_give_the_order_of_one_process(tmp_path):
    on_the_right, on_the_left = IDS.clone(), IDS.clone()
    on_the_right[1::2, 3] = 0
    on_the_left[1::2, 0] = 0
    flags = FLAGS.clone()
    flags[1::2, 3] = False
    expected = [IDS, FLAGS, SCORES, on_the_right, on_the_left, flags]
    for gathered in on_ranks(shares, tmp_path):
        for mine, theirs in zip(gathered, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


def test_rows_of_one_prompt_stay_together(tmp_path):
    """Three prompts a rank, two rows each: rank r has prompts r, r + 2, r + 4."""
    table = torch.arange(24).view(12, 2)

    def share() -> list[torch.Tensor]:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        mine = table.view(6, 2, 2)[dist.get_rank() :: 2].flatten(0, 1)
        return [gather_rows(mine, block_size=2), gather_rows(mine[:, 0], block_size=2)]

    for both, first in on_ranks(share, tmp_path):
        assert torch.equal(both, table)
        assert torch.equal(first, table[:, 0])


@given(st.integers(0, 5), st.integers(1, 5))
def test_one_process_has_all_rows_already(rows, width):
    table = torch.rand(rows, width)
    assert gather_rows(table) is table


@pytest.mark.parametrize("pad_left", [False, True])
def test_three_ranks(pad_left, tmp_path):
    def share() -> torch.Tensor:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        return gather_rows(IDS[dist.get_rank() :: 3], pad_left)

    for gathered in on_ranks(share, tmp_path, world_size=3):
        assert torch.equal(gathered, IDS)
