"""From trajectories to the micro-batches of the PPO update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import (
    explained_variance,
    gae,
    k1,
    masked_mean,
    mean_and_variance,
    moments,
    penalised_rewards,
    whiten,
)
from lit_rlhf.rollout.experience import Experience, Trajectories
from lit_rlhf.rollout.passes import by_length
from lit_rlhf.rollout.sampling import seeded


@dataclass(frozen=True)
class Sizes:
    """How an iteration is cut. All divisions are exact.

    Args:
        rollout_batch: episodes an iteration, over all ranks.
        micro_batch: episodes a backward pass, on each rank.
        accumulate: backward passes an optimizer step (the Trainer's accumulate_grad_batches).
        world_size: ranks.
        epochs: passes over the experience of an iteration.
    """

    rollout_batch: int
    micro_batch: int
    accumulate: int
    world_size: int
    epochs: int

    def __post_init__(self) -> None:
        """Refuse a division that leaves a rest."""
        if self.rollout_batch % self.minibatch:
            raise UserError(
                f"ppo.rollout_batch {self.rollout_batch} is not a multiple of the minibatch {self.minibatch} = "
                f"micro_batch {self.micro_batch} x accumulate_grad_batches {self.accumulate} x {self.world_size} "
                "ranks; change one"
            )

    @property
    def minibatch(self) -> int:
        """Episodes an optimizer step, over all ranks."""
        return self.micro_batch * self.accumulate * self.world_size

    @property
    def steps(self) -> int:
        """Optimizer steps an iteration."""
        return self.epochs * self.rollout_batch // self.minibatch

    @property
    def batches(self) -> int:
        """Backward passes an iteration, on each rank."""
        return self.steps * self.accumulate

    def __str__(self) -> str:
        """One line, printed at the start of a run."""
        return (
            f"{self.rollout_batch} episodes an iteration = {self.rollout_batch // self.minibatch} minibatches of "
            f"{self.minibatch} (micro-batch {self.micro_batch} x accumulation {self.accumulate} x {self.world_size} "
            f"ranks), {self.epochs} epoch(s): {self.steps} optimizer steps"
        )


class Prompts(Protocol):
    """Where prompts come from: the same global rows for an iteration, whatever the number of ranks."""

    longest: int

    def rows(self, iteration: int, count: int) -> list[Any]:
        """Return the prompts of an iteration."""
        ...

    def collate(self, rows: list[Any], index: Tensor) -> PromptBatch:
        """Return them left-padded."""
        ...


class ExperienceLoader:
    """The training loader of PPO: an epoch is one iteration, a rollout and the passes over it.

    It has a length, and must: an unsized loader makes Lightning fetch one batch ahead, and the next rollout would be
    sampled from stale weights. `__iter__` is a generator, so nothing is sampled before the first batch is asked for.

    Args:
        collect: makes the micro-batches of one iteration.
        length: how many.
    """

    def __init__(self, collect: Callable[[], Iterator[Experience]], length: int) -> None:
        self.collect, self.length = collect, length

    def __len__(self) -> int:
        """Micro-batches an iteration, on this rank."""
        return self.length

    def __iter__(self) -> Iterator[Experience]:
        """Roll out, then yield."""
        yield from self.collect()


def advantages_and_returns(
    trajectories: Trajectories, kl_coefficient: float, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Steps 4 to 6: per-token KL penalty with the score on the last action token, GAE, whitening over all tokens.

    Returns:
        whitened advantages and returns, (B, R) float32.
    """
    mask = trajectories.response_mask
    kl = k1(trajectories.logprobs, trajectories.reference)
    rewards = penalised_rewards(trajectories.scores, kl, mask, kl_coefficient)
    advantages, returns = gae(rewards, trajectories.values, mask, discount, gae_lambda)
    mean, variance = mean_and_variance(moments(advantages, mask))
    return whiten(advantages, mask, mean, variance), returns


def cut(
    trajectories: Trajectories,
    advantages: Tensor,
    returns: Tensor,
    statistics: dict[str, Tensor],
    sizes: Sizes,
    rank: int,
    seed: int,
    iteration: int,
) -> Iterator[Experience]:
    """Yield this rank's micro-batches: random minibatches, the same for every cut into ranks and micro-batches.

    Inside a minibatch the rows are ordered by length, so that micro-batches carry little padding.
    """
    width = trajectories.response_mask.shape[1]
    for epoch in range(sizes.epochs):
        order = torch.randperm(sizes.rollout_batch, generator=seeded(seed, iteration, 1, epoch))
        for minibatch in torch.split(order.to(advantages.device), sizes.minibatch):
            tokens = trajectories.response_mask[minibatch].sum().float()
            mask = trajectories.attention_mask[minibatch]
            chunks = list(by_length(mask, width, sizes.micro_batch))
            for chunk, columns, kept in chunks[rank :: sizes.world_size]:
                rows = minibatch[chunk]
                yield Experience(
                    input_ids=trajectories.input_ids[rows][:, columns],
                    attention_mask=trajectories.attention_mask[rows][:, columns],
                    response_mask=trajectories.response_mask[rows, :kept],
                    logprobs=trajectories.logprobs[rows, :kept],
                    values=trajectories.values[rows, :kept],
                    advantages=advantages[rows, :kept],
                    returns=returns[rows, :kept],
                    normalizer=tokens,
                    statistics=statistics,
                )
                statistics = {}


def rollout_statistics(trajectories: Trajectories, kl_coefficient: float, returns: Tensor) -> dict[str, Tensor]:
    """Return the metrics of a rollout over all episodes of all ranks (docs/metrics.md)."""
    mask = trajectories.response_mask
    kl = torch.where(mask, k1(trajectories.logprobs, trajectories.reference), 0).sum(1)  # (B,) nats a response
    return {
        "reward/score": trajectories.scores.mean(),
        "reward/score_std": trajectories.scores.std(),
        "reward/kl": kl.mean(),
        "reward/kl_coefficient": torch.tensor(kl_coefficient),
        "reward/penalised": (trajectories.scores - kl_coefficient * kl).mean(),
        "response/length": mask.sum(1).float().mean(),
        "response/ended": trajectories.ended.float().mean(),
        "policy/entropy": -masked_mean(trajectories.logprobs, mask),
        "value/explained_variance": explained_variance(trajectories.values, returns, mask).float(),
    }
