"""From trajectories to the micro-batches of the PPO update. Shapes: `B` episodes, `R` response."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.data.loader import BatchShape, batch_sizes, check_position
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import make_generator
from lit_rlhf.packing.packed_batch import length_bucketed_chunks
from lit_rlhf.rollout.experience import Experience, Trajectories


@dataclass(frozen=True)
class BatchSizes:
    """How the episodes of an iteration are partitioned. All divisions are exact.

    Args:
        rollout_batch_size: episodes per iteration, over all ranks.
        micro_batch_size: episodes per backward pass, on each rank.
        accumulate_grad_batches: backward passes per optimizer step, as the Trainer's setting.
        world_size: data-parallel ranks.
        ppo_epochs: passes over the experience of an iteration.
        samples_per_prompt: episodes per prompt.
    """

    rollout_batch_size: int
    micro_batch_size: int
    accumulate_grad_batches: int
    world_size: int
    ppo_epochs: int
    samples_per_prompt: int = 1

    def __post_init__(self) -> None:
        """Refuse a division with a remainder."""
        if self.rollout_batch_size % self.minibatch_size:
            raise UserError(
                f"ppo.rollout_batch_size {self.rollout_batch_size} is not a multiple of the minibatch "
                f"{self.minibatch_size} = micro_batch_size {self.micro_batch_size} x accumulate_grad_batches "
                f"{self.accumulate_grad_batches} x {self.world_size} ranks; change one"
            )
        if self.rollout_batch_size % (self.samples_per_prompt * self.world_size):
            raise UserError(
                f"ppo.rollout_batch_size {self.rollout_batch_size} is not a multiple of samples_per_prompt "
                f"{self.samples_per_prompt} x {self.world_size} ranks; change one"
            )

    @property
    def num_prompts(self) -> int:
        """Prompts per iteration, over all ranks."""
        return self.rollout_batch_size // self.samples_per_prompt

    @property
    def minibatch_size(self) -> int:
        """Episodes per optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.world_size

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps per iteration."""
        return self.ppo_epochs * self.rollout_batch_size // self.minibatch_size

    @property
    def num_micro_batches(self) -> int:
        """Backward passes per iteration, on each rank."""
        return self.num_optimizer_steps * self.accumulate_grad_batches

    @property
    def shape(self) -> BatchShape:
        """How a minibatch is partitioned."""
        return BatchShape(self.micro_batch_size, self.accumulate_grad_batches, self.world_size)

    @property
    def order_block(self) -> int:
        """Episodes that stay together in the random order: those of a prompt, if complete prompts fit a minibatch."""
        return self.samples_per_prompt if self.minibatch_size % self.samples_per_prompt == 0 else 1

    def __str__(self) -> str:
        """One line, printed at the start of a run."""
        samples = f" ({self.samples_per_prompt} for each of {self.num_prompts} prompts)"
        return (
            f"{self.rollout_batch_size} episodes per iteration{samples if self.samples_per_prompt > 1 else ''} = "
            f"{self.rollout_batch_size // self.minibatch_size} minibatches of {self.minibatch_size} (micro-batch "
            f"{self.micro_batch_size} x accumulation {self.accumulate_grad_batches} x {self.world_size} ranks), "
            f"{self.ppo_epochs} epoch(s): {self.num_optimizer_steps} optimizer steps"
        )


class EpisodeOrder(NamedTuple):
    """What decides the order of the episodes in an update, besides the iteration's number."""

    seed: int
    block: int  # consecutive episodes that stay together


class PPOIteration(NamedTuple):
    """All data that the update of one iteration uses."""

    number: int
    trajectories: Trajectories
    rewards: Tensor  # (B, R) float32: the KL penalty, plus the score on the last action
    advantages: Tensor  # (B, R) float32
    returns: Tensor | None  # (B, R) float32; None without a critic
    metrics: dict[str, Tensor]  # of the rollout
    order: EpisodeOrder | None = None  # fixed when collected; None: of the sizes and the seed of the update
    importance_weights: Tensor | None = None  # (B, R) float32, of the terms of the policy loss; None: all 1

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration as plain values and tensors on the CPU."""
        return {
            "number": self.number,
            "trajectories": {name: value.cpu() for name, value in self.trajectories._asdict().items()},
            "rewards": self.rewards.cpu(),
            "advantages": self.advantages.cpu(),
            "returns": None if self.returns is None else self.returns.cpu(),
            "metrics": {name: value.cpu() for name, value in self.metrics.items()},
            "order": None if self.order is None else list(self.order),
            "importance_weights": None if self.importance_weights is None else self.importance_weights.cpu(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "PPOIteration":
        """Return the iteration that `state_dict` was called on, on a device."""
        trajectories = Trajectories(**{name: value.to(device) for name, value in state["trajectories"].items()})
        rewards, advantages = state["rewards"].to(device), state["advantages"].to(device)
        returns = None if state["returns"] is None else state["returns"].to(device)
        order = None if state["order"] is None else EpisodeOrder(*state["order"])
        weights = None if state["importance_weights"] is None else state["importance_weights"].to(device)
        return cls(state["number"], trajectories, rewards, advantages, returns, state["metrics"], order, weights)


class ExperienceLoader:
    """The training dataloader of PPO: an epoch is one iteration, a rollout and the passes over it.

    It must have a length: an unsized loader makes Lightning prefetch one batch, and the next rollout would be sampled
    from stale weights. `__iter__` is a generator, so nothing is sampled before the first batch is requested.

    Its position is kept in episodes of completed optimizer steps, so that an iteration can continue with other sizes.

    Its state is in the checkpoint's `iteration`, not in `state_dict`, which Lightning restores in mid-epoch only.

    Args:
        collect: produces the next iteration.
        iter_micro_batches: yields its micro-batches on this rank.
        num_micro_batches: how many.
        shape: how its minibatches are partitioned.
    """

    def __init__(
        self,
        collect: Callable[[], PPOIteration],
        iter_micro_batches: Callable[[PPOIteration], Iterator[Experience]],
        num_micro_batches: int,
        shape: BatchShape = BatchShape(1),  # noqa: B008
    ) -> None:
        self.shape = shape
        self.collect, self.iter_micro_batches, self.num_micro_batches = collect, iter_micro_batches, num_micro_batches
        self.iteration: PPOIteration | None = None
        self.position = 0  # micro-batches of the iteration that were yielded
        self.is_resumed = False

    def __len__(self) -> int:
        """Return the micro-batches per iteration on this rank."""
        return self.num_micro_batches

    def __iter__(self) -> Iterator[Experience]:
        """Collect experience, then yield it; after `resume` continue the iteration that was begun."""
        if not self.is_resumed:
            self.iteration = None  # frees the previous iteration before the next one is collected
            self.iteration, self.position = self.collect(), 0
        self.is_resumed = False
        assert self.iteration is not None
        for batch in islice(self.iter_micro_batches(self.iteration), self.position, None):
            self.position += 1  # before the yield: what was yielded counts as consumed in a checkpoint
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; Lightning warns of a loader without it that it cannot be resumed, which is not so here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore nothing, see `resume`."""

    def mid_iteration_state(self) -> dict[str, Any]:
        """Return the current iteration, and the position in it in episodes; nothing between two iterations."""
        if self.iteration is None or self.position == self.num_micro_batches:
            return {}
        episodes = self.position // self.shape.accumulate_grad_batches * self.shape.minibatch_size
        return {"episodes": episodes, "sizes": batch_sizes(self.shape), **self.iteration.state_dict()}

    def resume(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from what `mid_iteration_state` returned."""
        self.iteration = PPOIteration.from_state_dict(state, device)
        self.position, self.is_resumed = state["episodes"] // self.shape.global_micro_batch_size, True


def check_mid_iteration_state(state: dict[str, Any], sizes: BatchSizes) -> None:
    """Refuse to continue an iteration in sizes that it does not fit.

    Args:
        state: what `ExperienceLoader.mid_iteration_state` returned.
        sizes: of now.

    Raises:
        UserError: names the setting and values that fit.
    """
    collected, trained, end = len(state["trajectories"]["scores"]), state["episodes"], "the end of an iteration"
    if collected != sizes.rollout_batch_size:
        raise UserError(
            f"ckpt_path: the checkpoint is in the middle of an iteration of {collected} episodes, and "
            f"ppo.rollout_batch_size is {sizes.rollout_batch_size} now; take {collected}, or a checkpoint at {end}"
        )
    if trained >= sizes.ppo_epochs * collected:
        raise UserError(
            f"ckpt_path: the checkpoint is in the middle of an iteration, after {trained} episodes in epochs of "
            f"{collected}, and ppo.ppo_epochs is {sizes.ppo_epochs} now; take more, or a checkpoint at {end}"
        )
    check_position(trained, sizes.shape, "episodes of its iteration", end, collected)


def iter_micro_batches(iteration: PPOIteration, sizes: BatchSizes, rank: int, seed: int) -> Iterator[Experience]:
    """Yield this rank's micro-batches of random minibatches, which depend neither on ranks nor on micro-batches.

    Within a minibatch the rows are sorted by length, so that micro-batches contain little padding.
    """
    number, trajectories, _, advantages, returns, rollout_metrics, fixed_order, weights = iteration
    if weights is not None:
        # A is in the policy loss alone, and a weight is positive: w max(-A r, ...) = max(-w A r, ...)
        advantages = advantages * weights
    width = trajectories.response_mask.shape[1]
    seed, block = fixed_order or (seed, sizes.order_block)
    for epoch in range(sizes.ppo_epochs):
        order = shuffle_episodes(sizes.rollout_batch_size, block, make_generator(seed, number, 1, epoch))
        for minibatch in torch.split(order.to(advantages.device), sizes.minibatch_size):
            normalizer = trajectories.response_mask[minibatch].sum().float()
            ids, mask = trajectories.input_ids[minibatch], trajectories.attention_mask[minibatch]
            chunks = list(length_bucketed_chunks(ids, mask, width, sizes.micro_batch_size))
            for chunk, columns, kept in chunks[rank :: sizes.world_size]:
                rows = minibatch[chunk]
                yield Experience(
                    input_ids=trajectories.input_ids[rows][:, columns],
                    attention_mask=trajectories.attention_mask[rows][:, columns],
                    response_mask=trajectories.response_mask[rows, :kept],
                    old_logprobs=trajectories.old_logprobs[rows, :kept],
                    old_values=trajectories.values[rows, :kept],
                    advantages=advantages[rows, :kept],
                    returns=None if returns is None else returns[rows, :kept],
                    normalizer=normalizer,
                    rollout_metrics=rollout_metrics,
                )
                rollout_metrics = {}


def shuffle_episodes(num_episodes: int, block: int, generator: torch.Generator) -> Tensor:
    """Return the episode indices of an iteration in random order, (B,); blocks of consecutive ones stay together."""
    indices = torch.arange(num_episodes).view(-1, block)
    return indices[torch.randperm(len(indices), generator=generator)].flatten()
