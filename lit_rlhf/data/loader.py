"""The loader behind every training batch: sized, resumable, and planned before it is cut.

An epoch's order comes from (seed, epoch) alone. It is cut into *minibatches*, one an optimizer step, of
`micro_batch_size × accumulate × world_size` rows, and only then dealt to micro-batches and ranks. So the rows of a minibatch
are the same however it is cut, and every rank knows the number of targets in all of it without communication.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from lit_rlhf.errors import UserError
from lit_rlhf.packing.bin_packing import partition_balanced

R = TypeVar("R")  # a tokenised row
B = TypeVar("B")  # a batch


class BatchShape(NamedTuple):
    """How a minibatch is cut, and which part of it is ours."""

    micro_batch_size: int  # rows per rank and backward
    accumulate_grad_batches: int = 1  # micro-batches per optimizer step
    world_size: int = 1
    rank: int = 0

    @property
    def step_rows(self) -> int:
        """Rows of one micro-batch over all ranks."""
        return self.micro_batch_size * self.world_size

    @property
    def minibatch(self) -> int:
        """Rows of one optimizer step over all ranks and micro-batches."""
        return self.step_rows * self.accumulate_grad_batches


def data_ranks(trainer: Any) -> tuple[int, int]:
    """Return how many ranks have rows of their own, and which of them this is.

    Ranks that split tensors among them (tensor parallelism) count as one: they compute the same rows.
    """
    ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return ranks["num_replicas"], ranks["rank"]


@lru_cache(maxsize=8)
def epoch_order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0 .. count-1 that depends on (seed, epoch) and nothing else."""
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return tuple(torch.randperm(count, generator=generator, device="cpu").tolist())


def infinite_permutation(total: int, seed: int, start: int, count: int) -> list[int]:
    """`count` places from `start` on in an endless order of `total` rows: permuted passes, without replacement."""
    positions = (divmod(place, total) for place in range(start, start + count))
    return [epoch_order(total, seed, epoch)[place] for epoch, place in positions]


class ResumableLoader(Generic[R, B]):
    """Yields this rank's micro-batches, one epoch per `iter()`.

    It has a length: an unsized loader makes Lightning fetch one batch ahead. `iter()` is lazy: the order and the
    position are read at the first batch, so a state loaded in between is honoured.

    With `drop_last` (training) the rows behind the last whole minibatch are left out of that epoch; each epoch leaves
    out others. Without (validation) every row comes exactly once over all ranks, and all ranks yield equally many
    batches; a rank without a row left yields `blank(row)` of another's, which must have no target.

    Args:
        rows: The tokenised rows.
        collate: Makes a batch of rows and the minibatch's normalizer.
        micro_batch_size: Rows per rank and backward.
        accumulate: Micro-batches per optimizer step (the Trainer's `accumulate_grad_batches`).
        world_size: Number of ranks.
        rank: This rank.
        seed: Keys the order, with the epoch.
        shuffle: Whether the order is permuted, anew each epoch.
        drop_last: Whether the last, incomplete minibatch is left out.
        weight: Targets of a row; their sum over a minibatch is its normalizer. None counts each row as 1.
        length: Width of a row. The rows of a minibatch are then dealt in its order, so that a micro-batch holds rows of
            like length and ranks have like work. None keeps the permuted order.
        packed: Whether the rows of a micro-batch are laid behind each other. Micro-batches then hold about equally
            many tokens, and not equally many rows; `length` is needed.
        blank: A row's copy without targets.

    Raises:
        UserError: With `drop_last`, fewer rows than one minibatch.
    """

    def __init__(
        self,
        rows: Sequence[R],
        collate: Callable[[list[Any], float], B],
        *,
        micro_batch_size: int,
        accumulate: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        weight: Callable[[R], int] | None = None,
        length: Callable[[R], int] | None = None,
        packed: bool = False,
        blank: Callable[[R], R] | None = None,
    ) -> None:
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size: {micro_batch_size} must be at least 1")
        self.rows = rows
        self.collate = collate
        self.shape = BatchShape(micro_batch_size, accumulate, world_size, rank)
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.blank = blank
        self._weights = [1] * len(rows) if weight is None else [weight(row) for row in rows]
        self._lengths = None if length is None else [length(row) for row in rows]
        self._packed = packed
        self._epoch = 0
        self._position = 0  # micro-batches yielded in this epoch
        self._resumed = False
        if drop_last and len(rows) < self.shape.minibatch:
            raise UserError(
                f"{len(rows)} rows are fewer than one minibatch of {self.shape.minibatch} = micro_batch_size {micro_batch_size} × "
                f"accumulate_grad_batches {accumulate} × {world_size} ranks; lower one of the three or add data"
            )

    @property
    def num_dropped(self) -> int:
        """Rows that an epoch leaves out, because they do not fill a minibatch."""
        return len(self.rows) % self.shape.minibatch if self.drop_last else 0

    @property
    def minibatches(self) -> int:
        """Optimizer steps per epoch."""
        whole, rest = divmod(len(self.rows), self.shape.minibatch)
        return whole if self.drop_last or not rest else whole + 1

    def __len__(self) -> int:
        whole, rest = divmod(len(self.rows), self.shape.minibatch)
        partial = 0 if self.drop_last else -(-rest // self.shape.step_rows)
        return whole * self.shape.accumulate_grad_batches + partial

    def __iter__(self) -> Iterator[B]:
        if self._position >= len(self) or (self._position and not self._resumed):
            self._epoch, self._position = self._epoch + 1, 0
        self._resumed = False
        order = self._order()
        size, accumulate = self.shape.minibatch, self.shape.accumulate_grad_batches
        dealt: list[list[list[int]]] = []
        while self._position < len(self):
            minibatch, step = divmod(self._position, accumulate)
            if step == 0 or not dealt:
                places = order[minibatch * size : (minibatch + 1) * size]
                normalizer, dealt = float(sum(self._weights[place] for place in places)), self._partition(places)
            self._position += 1  # before the yield: what was yielded counts as consumed in a checkpoint
            yield self._batch(dealt[step], normalizer)

    def state_dict(self) -> dict[str, int]:
        """Epoch and position (micro-batches of that epoch already yielded), the same on every rank."""
        if self._position >= len(self):
            return {"epoch": self._epoch + 1, "position": 0}
        return {"epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from there: the next `iter()` yields the rest of that epoch."""
        self._epoch, self._position = state["epoch"], state["position"]
        self._resumed = True

    def _order(self) -> Sequence[int]:
        return epoch_order(len(self.rows), self.seed, self._epoch) if self.shuffle else range(len(self.rows))

    def _batch(self, of_all_ranks: list[list[int]], normalizer: float) -> B:
        """This rank's part of a micro-batch, given as the places of every rank's rows."""
        mine = [self.rows[place] for place in of_all_ranks[self.shape.rank]]
        if not mine:
            assert self.blank is not None, "a loader over several ranks that keeps the last rows needs `blank`"
            mine = [self.blank(self.rows[of_all_ranks[0][0]])]
        return self.collate(mine, normalizer)

    def _partition(self, places: Sequence[int]) -> list[list[list[int]]]:
        """A minibatch as micro-batches, each as the places of every rank's rows."""
        step_rows, world_size = self.shape.step_rows, self.shape.world_size
        if self._packed and self.drop_last:
            shares = self._shares(places, self.shape.accumulate_grad_batches * world_size)
            return [shares[start : start + world_size] for start in range(0, len(shares), world_size)]
        if not self._packed and self._lengths is not None:
            places = sorted(places, key=self._lengths.__getitem__)
        steps = [places[start : start + step_rows] for start in range(0, len(places), step_rows)]
        if self._packed:  # a validation step stands for itself
            return [self._shares(step, world_size) for step in steps]
        return [[list(step[rank::world_size]) for rank in range(world_size)] for step in steps]

    def _shares(self, places: Sequence[int], count: int) -> list[list[int]]:
        assert self._lengths is not None, "packing needs `length`"
        return [
            [places[n] for n in share]
            for share in partition_balanced([self._lengths[place] for place in places], count)
        ]

    def token_efficiency(self, minibatches: int = 100) -> float:
        """The share of positions that hold a token, of the first minibatches of this epoch in padded batches."""
        assert self._lengths is not None, "the fill needs `length`"
        order, size = self._order(), self.shape.minibatch
        tokens = positions = 0
        for minibatch in range(min(minibatches, len(order) // size)):
            places = order[minibatch * size : (minibatch + 1) * size]
            for share in chain.from_iterable(self._partition(places)):
                tokens += sum(self._lengths[place] for place in share)
                positions += max(self._lengths[place] for place in share) * len(share)
        return tokens / positions
