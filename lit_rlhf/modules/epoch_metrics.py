"""What an epoch logs, as sums and counts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class EpochMeans:
    """Means over an epoch that do not depend on how it was cut into micro-batches and ranks, and survive a restart.

    Lightning's own means over an epoch begin anew where a run is resumed in the middle of one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name to (2,) float64: sum and count

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add a sum and the number of what was summed."""
        # kept where it is: a copy to the CPU would make an accelerator wait at every micro-batch
        total = torch.as_tensor(total).detach()
        pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=total.device) for x in (total, count)])
        self.sums[name] = self.sums[name].to(pair.device) + pair if name in self.sums else pair

    def over_ranks(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return sum and count of every name over all ranks; every rank must call it, with the same names."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        return dict(zip(names, reduce(torch.stack([self.sums[name].cpu() for name in names]))))

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the means over all ranks, () float32 each, and begin anew."""
        whole = self.over_ranks(reduce)
        self.sums = {}
        return {name: (pair[0] / pair[1]).float() for name, pair in whole.items() if pair[1] > 0}

    def load(self, whole: dict[str, Any], first_rank: bool) -> None:
        """Take back what `over_ranks` returned: all of it on the first rank, nothing on the others."""
        self.sums = {name: pair if first_rank else torch.zeros_like(pair) for name, pair in whole.items()}
