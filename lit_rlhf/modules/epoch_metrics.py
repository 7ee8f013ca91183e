"""Means that an epoch logs, as sums and counts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class EpochMeans:
    """Means over an epoch that depend neither on micro-batches nor on ranks, and survive a restart.

    Lightning's own means over an epoch start again when a run is resumed in the middle of one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name to (2,) float64: sum and count

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add a sum and the number of its summands."""
        # kept on its device: a copy to the CPU would synchronize an accelerator at every micro-batch
        total = torch.as_tensor(total).detach()
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=total.device) for x in (total, count)])
        self.sums[name] = self.sums[name].to(pair.device) + pair if name in self.sums else pair

    def add_values(self, values: Mapping[str, Tensor | float]) -> None:
        """Add values by name, each with count 1."""
        for name, value in values.items():
            self.add(name, value)

    def reduced_sums(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return sum and count of every name over all ranks; every rank must call it, with the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        return dict(zip(names, reduce(torch.stack([self.sums[name].cpu() for name in names]))))

    def compute(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the means over all ranks, () float32 each, and reset."""
        return self.reset(self.reduced_sums(reduce))

    def reset(self, reduced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of what `reduced_sums` returned, () float32 each, and begin again."""
        self.sums = {}
        return {name: (pair[0] / pair[1]).float() for name, pair in reduced.items() if pair[1] > 0}

    def load(self, reduced_sums: dict[str, Any], is_first_rank: bool) -> None:
        """Restore what `reduced_sums` returned: all of it on the first rank, zeros on the others."""
        self.sums = {name: pair if is_first_rank else torch.zeros_like(pair) for name, pair in reduced_sums.items()}
