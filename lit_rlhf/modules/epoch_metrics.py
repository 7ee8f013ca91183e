"""Means that an epoch logs, as sums and counts."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Number = Tensor | float
MAX_ADDED = 4096  # numbers that are kept as they are: an epoch may have any number of steps


class EpochMeans:
    """Means over an epoch that depend neither on micro-batches nor on ranks, and survive a restart.

    Lightning's own means over an epoch start again when a run is resumed in the middle of one.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._added: list[tuple[str, Number, Number]] = []  # name, total and count, until they are read

    def add(self, name: str, total: Number, count: Number = 1.0) -> None:
        """Add a sum and the number of its summands; a tensor () must not change afterwards."""
        # kept as they are: read now, they would synchronize an accelerator at every micro-batch
        self._added.append((name, _detach(total), _detach(count)))
        if len(self._added) >= MAX_ADDED:
            self._read_added()

    def add_values(self, values: Mapping[str, Number]) -> None:
        """Add values by name, each with count 1."""
        for name, value in values.items():
            self.add(name, value)

    @property
    def sums(self) -> dict[str, tuple[float, float]]:
        """Sum and count of every name on this rank; an accelerator has to finish what they are computed from."""
        self._read_added()
        return self._sums

    def _read_added(self) -> None:
        numbers = iter(_to_floats([number for _, *pair in self._added for number in pair]))
        for name, *_ in self._added:  # in this order, in float64
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + next(numbers), count + next(numbers)
        self._added = []

    def reduced_sums(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return sum and count of every name over all ranks; every rank must call it, with the same names."""
        sums = dict(sorted(self.sums.items()))
        return dict(zip(sums, reduce(torch.tensor([*sums.values()], dtype=torch.float64)))) if sums else {}

    def compute(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the means over all ranks, () float32 each, and reset."""
        return self.reset(self.reduced_sums(reduce))

    def reset(self, reduced: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the means of what `reduced_sums` returned, () float32 each, and begin again."""
        self._sums, self._added = {}, []
        pairs = {name: pair.tolist() for name, pair in reduced.items()}
        return {
            name: torch.tensor(total / count, dtype=torch.float32)
            for name, (total, count) in pairs.items()
            if count > 0
        }

    def load(self, reduced_sums: dict[str, Any], is_first_rank: bool) -> None:
        """Restore what `reduced_sums` returned: all of it on the first rank, zeros on the others."""
        self._added = []
        self._sums = {
            name: tuple(pair.tolist()) if is_first_rank else (0.0, 0.0) for name, pair in reduced_sums.items()
        }


def _detach(number: Number) -> Number:
    return number.detach() if isinstance(number, Tensor) and number.requires_grad else number


def _to_floats(values: list[Any]) -> list[float]:
    """Return the values of numbers and tensors (), with one copy from a device per dtype."""
    groups: dict[Any, list[int]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), []).append(index)
    for indices in groups.values():
        for index, value in zip(indices, torch.stack([values[index] for index in indices]).tolist()):
            values[index] = value
    return values
