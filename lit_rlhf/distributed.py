"""Collectives over ranks, which do nothing in a single process: rows in an order that does not depend on world size.

Shapes: `b` rows per rank, `w` columns, `W` ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_rlhf.errors import UserError

Value = TypeVar("Value")


def is_distributed() -> bool:
    """Whether this process belongs to a process group, which may be a group of one."""
    return dist.is_available() and dist.is_initialized()


def gather_rows(
    local: Tensor, pad_left: bool = False, block_size: int = 1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Gather the rows of all ranks: rank r of W holds rows r, r + W, r + 2 W, … of the result.

    Args:
        local: (b,) or (b, w) on this rank; b is the same on all ranks, widths may differ.
        pad_left: Whether narrower rows are padded with 0 on the left; else on the right.
        block_size: Rows that stay consecutive, such as the samples of one prompt: ranks take turns by blocks of so many
            rows.
        group: The ranks that have rows of their own; by default all.

    Returns:
        (W b,) or (W b, largest w), on every rank.
    """
    if not is_distributed() or dist.get_world_size(group) == 1:
        return local
    dtype, rows = local.dtype, local.to(torch.uint8) if local.dtype is torch.bool else local
    if rows.dim() == 2:
        width = torch.tensor(rows.shape[1], device=rows.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
        missing = int(width) - rows.shape[1]
        rows = torch.nn.functional.pad(rows, (missing, 0) if pad_left else (0, missing))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows.contiguous(), group)
    blocks = [part.reshape(-1, block_size, *part.shape[1:]) for part in parts]
    return torch.stack(blocks, dim=1).flatten(0, 2).to(dtype)


def all_gather_object(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return the object of every rank of the group, in the order of ranks; every rank of the group must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: Value) -> Value:
    """Return rank zero's object; every rank must call it."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """If the body fails on one rank, fail on all: the others would wait for it in the next collective call.

    Every rank must enter it.

    Raises:
        UserError: the body failed on another rank only; with the message of the first such rank.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    messages = all_gather_object(None if problem is None else str(problem) or type(problem).__name__)
    if problem is not None:
        raise problem
    for rank, message in enumerate(messages):
        if message is not None:
            raise UserError(f"rank {rank}: {message}")


def is_rank_zero() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not is_distributed() or dist.get_rank() == 0


def full_tensor(value: Tensor) -> Tensor:
    """Gather a tensor that is sharded over ranks, which all of them must do; return another as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sum_over_shards(weights: list[Tensor], local_sums: Tensor) -> Tensor:
    """Add up what the ranks computed of their shards; every rank must call it.

    Args:
        weights: n tensors, sharded or not.
        local_sums: (n,), of this rank's shard of each.

    Returns:
        (n,), of each full tensor.
    """
    total = local_sums.clone()
    kinds: dict[tuple[Any, Any], list[int]] = {}
    for index, weight in enumerate(weights):
        if isinstance(weight, DTensor):
            kinds.setdefault((weight.device_mesh, weight.placements), []).append(index)
    for (mesh, placements), indices in kinds.items():
        part = total[indices]
        for dimension, placement in enumerate(placements):
            if not placement.is_replicate():
                dist.all_reduce(part, group=mesh.get_group(dimension))
        total[indices] = part
    return total


def reshard(model: nn.Module) -> None:
    """Shard the units of FSDP2 that a forward pass has left unsharded: their parameters are temporary tensors."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
