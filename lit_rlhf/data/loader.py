"""The loader of every training batch: sized, resumable, and planned per minibatch.

An epoch's order depends on (seed, epoch) alone. It is split into *minibatches*, one per optimizer step, of
`micro_batch_size × accumulate_grad_batches × world_size` rows; each of these is then partitioned into micro-batches and
ranks. So the rows of a minibatch do not depend on the partition, and every rank knows the number of targets in the full
minibatch without communication.
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

R = TypeVar("R")  # a tokenized row
B = TypeVar("B")  # a batch


class BatchShape(NamedTuple):
    """How a minibatch is partitioned into micro-batches and ranks, and which rank this is."""

    micro_batch_size: int  # rows per rank and backward pass
    accumulate_grad_batches: int = 1  # micro-batches per optimizer step
    world_size: int = 1  # data-parallel ranks
    rank: int = 0

    @property
    def global_micro_batch_size(self) -> int:
        """Rows per micro-batch, over all ranks."""
        return self.micro_batch_size * self.world_size

    @property
    def minibatch_size(self) -> int:
        """Rows per optimizer step, over all ranks and micro-batches."""
        return self.global_micro_batch_size * self.accumulate_grad_batches


def check_position(position: int, shape: BatchShape, what: str, end: str, total: int = 0) -> None:
    """Refuse a position in the data that is not at the edge of a minibatch.

    Args:
        position: Rows that were trained on.
        shape: How minibatches are partitioned now.
        what: Those rows, in words.
        end: Where any sizes can begin, in words.
        total: What the minibatch must divide as well; 0 for no such number.

    Raises:
        UserError: Names the sizes, and minibatches that fit.
    """
    size = shape.minibatch_size
    if position % size == 0:
        return
    fitting = (each for each in range(1, position + 1) if position % each == 0 and total % each == 0)
    nearest = sorted(sorted(fitting, key=lambda each: abs(each - size))[:6])
    raise UserError(
        f"ckpt_path: the checkpoint is after {position:,} {what}, which minibatches of {size:,} = micro_batch_size "
        f"{shape.micro_batch_size} × accumulate_grad_batches {shape.accumulate_grad_batches} × {shape.world_size} "
        f"ranks do not divide; take a minibatch of {', '.join(map(str, nearest))}, or a checkpoint at {end}"
    )


def convert_batch_progress(checkpoint: dict[str, Any], position: int, sizes: list[int], shape: BatchShape) -> None:
    """Convert Lightning's counters of micro-batches to a position in rows and to the sizes of now.

    Args:
        checkpoint: Changed in place, before Lightning loads its loops.
        position: Rows of this epoch of completed optimizer steps, a multiple of the minibatch; 0 if it is over.
        sizes: `batch_sizes` when the checkpoint was written.
        shape: Of now.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    is_after_step = progress["is_last_batch"] or progress["current"]["ready"] * sizes[0] == position
    if is_after_step and sizes == batch_sizes(shape):
        return
    batches = position // shape.global_micro_batch_size
    total = checkpoint["global_step"] * shape.accumulate_grad_batches
    for counts, value in ((progress["current"], batches), (progress["total"], total)):
        # 1 if written by a hook after the step
        unfinished = counts["processed"] - counts["completed"] if is_after_step else 0
        counts.update(ready=value, started=value, processed=value, completed=value - unfinished)


def batch_sizes(shape: BatchShape) -> list[int]:
    """Return the sizes that counters of micro-batches are of: rows over all ranks, micro-batches per step."""
    return [shape.global_micro_batch_size, shape.accumulate_grad_batches]


def get_dp_world_size_and_rank(trainer: Any) -> tuple[int, int]:
    """Return the number of data-parallel ranks, and the index of this one.

    Ranks that split tensors among them (tensor parallelism) count as one: they compute the same rows.
    """
    ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return ranks["num_replicas"], ranks["rank"]


@lru_cache(maxsize=8)
def epoch_permutation(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the permutation of 0 .. num_rows-1 of an epoch; it depends on the arguments alone."""
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return tuple(torch.randperm(num_rows, generator=generator, device="cpu").tolist())


def infinite_permutation(num_rows: int, seed: int, start: int, count: int) -> list[int]:
    """Return `count` row indices from position `start` of the concatenated permutations of all epochs."""
    positions = (divmod(position, num_rows) for position in range(start, start + count))
    return [epoch_permutation(num_rows, seed, epoch)[index] for epoch, index in positions]


class ResumableLoader(Generic[R, B]):
    """Yields this rank's micro-batches, one epoch per `iter()`.

    Its position is kept in rows of completed optimizer steps, so that another run can continue with other sizes and
    every row comes exactly once. A minibatch that was not completed is yielded again: no checkpoint has its gradients.

    It has a length: an unsized loader makes Lightning prefetch one batch. `iter()` is lazy: order and position are read
    at the first batch, so that a state loaded in between is used.

    With `drop_last` (training) the rows after the last complete minibatch are left out of that epoch; the next one
    leaves out others. Without it (validation) every row is yielded exactly once over all ranks, and all ranks yield
    equally many batches: a rank that has no row left yields a copy of another rank's row, without targets.

    Args:
        dataset: The tokenized rows.
        collate_fn: Builds a batch of rows and the minibatch's normalizer (its number of targets).
        micro_batch_size: Rows per rank and backward pass.
        accumulate_grad_batches: Micro-batches per optimizer step, as the Trainer's setting.
        world_size: Number of data-parallel ranks.
        rank: This rank.
        seed: Seeds the order, with the epoch.
        shuffle: Whether each epoch has a permutation of its own.
        drop_last: Whether the last, incomplete minibatch is dropped.
        num_targets: Returns a row's number of targets; None counts each row as 1.
        length: Returns a row's length in tokens. Given, the rows of a minibatch are sorted by it, so that the rows of
            a micro-batch have similar lengths and the ranks similar work.
        packing: Whether micro-batches are packed: they then hold about equally many tokens, and not equally many rows.
            Needs `length`.
        without_targets: Returns a copy of a row without targets.

    Raises:
        UserError: With `drop_last`, fewer rows than one minibatch.
    """

    def __init__(
        self,
        dataset: Sequence[R],
        collate_fn: Callable[[list[Any], float], B],
        *,
        micro_batch_size: int,
        accumulate_grad_batches: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        num_targets: Callable[[R], int] | None = None,
        length: Callable[[R], int] | None = None,
        packing: bool = False,
        without_targets: Callable[[R], R] | None = None,
    ) -> None:
        if micro_batch_size < 1:
            raise UserError(f"micro_batch_size: {micro_batch_size} must be at least 1")
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.shape = BatchShape(micro_batch_size, accumulate_grad_batches, world_size, rank)
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.without_targets = without_targets
        self._num_targets = [1] * len(dataset) if num_targets is None else [num_targets(row) for row in dataset]
        self._lengths = None if length is None else [length(row) for row in dataset]
        self._packing = packing
        self._epoch = 0
        self._position = 0  # micro-batches yielded in this epoch
        self._resumed = False
        if drop_last and len(dataset) < self.shape.minibatch_size:
            raise UserError(
                f"{len(dataset)} rows are fewer than one minibatch of {self.shape.minibatch_size} = "
                f"micro_batch_size {micro_batch_size} × accumulate_grad_batches {accumulate_grad_batches} × "
                f"{world_size} ranks; lower one of the three or add data"
            )

    @property
    def num_dropped(self) -> int:
        """Rows that each epoch leaves out, because they do not fill a minibatch."""
        return len(self.dataset) % self.shape.minibatch_size if self.drop_last else 0

    @property
    def num_minibatches(self) -> int:
        """Optimizer steps per epoch."""
        complete, remainder = divmod(len(self.dataset), self.shape.minibatch_size)
        return complete if self.drop_last or not remainder else complete + 1

    def __len__(self) -> int:
        complete, remainder = divmod(len(self.dataset), self.shape.minibatch_size)
        partial = 0 if self.drop_last else -(-remainder // self.shape.global_micro_batch_size)
        return complete * self.shape.accumulate_grad_batches + partial

    def __iter__(self) -> Iterator[B]:
        if self._position >= len(self) or (self._position and not self._resumed):
            self._epoch, self._position = self._epoch + 1, 0
        self._resumed = False
        order = self._order()
        size, accumulate = self.shape.minibatch_size, self.shape.accumulate_grad_batches
        micro_batches: list[list[list[int]]] = []
        while self._position < len(self):
            minibatch, step = divmod(self._position, accumulate)
            if step == 0 or not micro_batches:
                indices = order[minibatch * size : (minibatch + 1) * size]
                normalizer = float(sum(self._num_targets[index] for index in indices))
                micro_batches = self._partition(indices)
            self._position += 1  # before the yield: what was yielded counts as consumed in a checkpoint
            yield self._collate(micro_batches[step], normalizer)

    @property
    def position(self) -> int:
        """Micro-batches of this epoch that were yielded."""
        return self._position

    def state_dict(self) -> dict[str, int]:
        """Return epoch, position (rows of that epoch, over all ranks) and what decides its order; same on all ranks."""
        is_over = self._position >= len(self)
        rows = self._position // self.shape.accumulate_grad_batches * self.shape.minibatch_size
        return {
            "epoch": self._epoch + is_over,
            "rows": 0 if is_over else rows,
            "num_rows": len(self.dataset),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position: the next `iter()` yields the rest of that epoch.

        Raises:
            UserError: The position is in the middle of a minibatch of these sizes, or of an epoch of other rows; or the
                rows that are left fill no minibatch.
        """
        rows = state["rows"]
        check_position(rows, self.shape, "rows of its epoch", "the end of an epoch")
        for name, own in (("num_rows", len(self.dataset)), ("seed", self.seed)) if rows else ():
            if state.get(name, own) != own:
                raise UserError(
                    f"ckpt_path: the checkpoint is in the middle of an epoch whose order is of {name} {state[name]}, "
                    f"that of the data is {own} now; take the data of then, or a checkpoint at the end of an epoch"
                )
        left, size = len(self.dataset) - rows, self.shape.minibatch_size
        if rows and left < size:
            raise UserError(
                f"ckpt_path: the {left:,} rows that the checkpoint left of its epoch fill no minibatch of {size:,}; "
                "take a smaller minibatch, or a checkpoint at the end of an epoch"
            )
        self._epoch, self._position = state["epoch"], rows // self.shape.global_micro_batch_size
        self._resumed = True

    def _order(self) -> Sequence[int]:
        num_rows = len(self.dataset)
        return epoch_permutation(num_rows, self.seed, self._epoch) if self.shuffle else range(num_rows)

    def _collate(self, indices_per_rank: list[list[int]], normalizer: float) -> B:
        """Build this rank's batch of a micro-batch."""
        rows = [self.dataset[index] for index in indices_per_rank[self.shape.rank]]
        if not rows:
            assert self.without_targets is not None, "with several ranks and drop_last=False, pass `without_targets`"
            rows = [self.without_targets(self.dataset[indices_per_rank[0][0]])]
        return self.collate_fn(rows, normalizer)

    def _partition(self, indices: Sequence[int]) -> list[list[list[int]]]:
        """Partition a minibatch into row indices per micro-batch and rank."""
        size, world_size = self.shape.global_micro_batch_size, self.shape.world_size
        if self._packing and self.drop_last:
            bins = self._balance(indices, self.shape.accumulate_grad_batches * world_size)
            return [bins[start : start + world_size] for start in range(0, len(bins), world_size)]
        if not self._packing and self._lengths is not None:
            indices = sorted(indices, key=self._lengths.__getitem__)
        steps = [indices[start : start + size] for start in range(0, len(indices), size)]
        if self._packing:  # in validation each step is balanced by itself
            return [self._balance(step, world_size) for step in steps]
        return [[list(step[rank::world_size]) for rank in range(world_size)] for step in steps]

    def _balance(self, indices: Sequence[int], num_bins: int) -> list[list[int]]:
        """Partition row indices into bins of about equally many tokens."""
        assert self._lengths is not None, "packing needs `length`"
        bins = partition_balanced([self._lengths[index] for index in indices], num_bins)
        return [[indices[n] for n in each] for each in bins]

    def token_efficiency(self, max_minibatches: int = 100) -> float:
        """Return the fraction of non-padding tokens in the first padded minibatches of this epoch."""
        assert self._lengths is not None, "token_efficiency needs `length`"
        order, size = self._order(), self.shape.minibatch_size
        num_tokens = num_positions = 0
        for minibatch in range(min(max_minibatches, len(order) // size)):
            indices = order[minibatch * size : (minibatch + 1) * size]
            for batch in chain.from_iterable(self._partition(indices)):
                num_tokens += sum(self._lengths[index] for index in batch)
                num_positions += max(self._lengths[index] for index in batch) * len(batch)
        return num_tokens / num_positions
