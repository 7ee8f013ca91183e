"""What ranks tell each other: rows in an order that does not depend on how many ranks there are; any object."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def is_distributed() -> bool:
    """Whether this process is one of a group that can talk, be it of one."""
    return dist.is_available() and dist.is_initialized()


def gather_rows(
    local: Tensor, pad_left: bool = False, together: int = 1, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return the rows of all ranks: rank r of W holds rows r, r + W, r + 2 W, … of the result.

    Args:
        local: (b,) or (b, w) on this rank; every rank has equally many rows, widths may differ.
        pad_left: whether narrower rows are filled with 0 on the left, else on the right.
        together: rows that stay together, such as the samples of one prompt: what is dealt to the ranks in turn is
            blocks of so many rows.
        group: the ranks that have rows of their own; by default all.
    """
    if not is_distributed() or dist.get_world_size(group) == 1:
        return local
    kind, rows = local.dtype, local.to(torch.uint8) if local.dtype is torch.bool else local
    if rows.dim() == 2:
        width = torch.tensor(rows.shape[1], device=rows.device)
        dist.all_reduce(width, op=dist.ReduceOp.MAX, group=group)
        missing = int(width) - rows.shape[1]
        rows = torch.nn.functional.pad(rows, (missing, 0) if pad_left else (0, missing))
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows.contiguous(), group)
    blocks = [part.reshape(-1, together, *part.shape[1:]) for part in parts]
    return torch.stack(blocks, dim=1).flatten(0, 2).to(kind)


def all_gather_object(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return what every rank of the group gave, any object, in the order of ranks; every rank of it must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def broadcast_object(value: Value) -> Value:
    """Return what rank zero gave, any object; every rank must call it."""
    if not is_distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]
