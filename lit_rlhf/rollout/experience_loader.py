"""From trajectories to the micro-batches of the PPO update."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import (
    explained_variance,
    k1,
    k2,
    k3,
    masked_mean,
    repeated_ngram_fraction,
)
from lit_rlhf.generation.sampling import make_generator
from lit_rlhf.packing.packed_batch import length_bucketed_chunks
from lit_rlhf.rollout.experience import Experience, Trajectories


@dataclass(frozen=True)
class BatchSizes:
    """How an iteration is cut. All divisions are exact.

    Args:
        rollout_batch_size: episodes an iteration, over all ranks.
        micro_batch_size: episodes a backward pass, on each rank.
        accumulate_grad_batches: backward passes an optimizer step (the Trainer's accumulate_grad_batches).
        world_size: ranks.
        ppo_epochs: passes over the experience of an iteration.
        samples_per_prompt: episodes a prompt.
    """

    rollout_batch_size: int
    micro_batch_size: int
    accumulate_grad_batches: int
    world_size: int
    ppo_epochs: int
    samples_per_prompt: int = 1

    def __post_init__(self) -> None:
        """Refuse a division that leaves a rest."""
        if self.rollout_batch_size % self.minibatch_size:
            raise UserError(
                f"ppo.rollout_batch_size {self.rollout_batch_size} is not a multiple of the minibatch {self.minibatch_size} = "
                f"micro_batch_size {self.micro_batch_size} x accumulate_grad_batches {self.accumulate_grad_batches} x {self.world_size} "
                "ranks; change one"
            )
        if self.rollout_batch_size % (self.samples_per_prompt * self.world_size):
            raise UserError(
                f"ppo.rollout_batch_size {self.rollout_batch_size} is not a multiple of samples_per_prompt {self.samples_per_prompt} x "
                f"{self.world_size} ranks; change one"
            )

    @property
    def num_prompts(self) -> int:
        """Prompts an iteration, over all ranks."""
        return self.rollout_batch_size // self.samples_per_prompt

    @property
    def minibatch_size(self) -> int:
        """Episodes an optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulate_grad_batches * self.world_size

    @property
    def num_optimizer_steps(self) -> int:
        """Optimizer steps an iteration."""
        return self.ppo_epochs * self.rollout_batch_size // self.minibatch_size

    @property
    def num_micro_batches(self) -> int:
        """Backward passes an iteration, on each rank."""
        return self.num_optimizer_steps * self.accumulate_grad_batches

    def __str__(self) -> str:
        """One line, printed at the start of a run."""
        prompts = (
            f" ({self.samples_per_prompt} for each of {self.num_prompts} prompts)"
            if self.samples_per_prompt > 1
            else ""
        )
        return (
            f"{self.rollout_batch_size} episodes an iteration{prompts} = {self.rollout_batch_size // self.minibatch_size} minibatches "
            f"of {self.minibatch_size} (micro-batch {self.micro_batch_size} x accumulation {self.accumulate_grad_batches} x {self.world_size} "
            f"ranks), {self.ppo_epochs} epoch(s): {self.num_optimizer_steps} optimizer steps"
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


class PPOIteration(NamedTuple):
    """All that the update of one iteration is made from."""

    number: int
    trajectories: Trajectories
    rewards: Tensor  # (B, R) float32: the KL penalty, with the score on the last action
    advantages: Tensor  # (B, R) float32
    returns: Tensor | None  # (B, R) float32; None without a critic
    metrics: dict[str, Tensor]  # of the rollout

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and tensors on the CPU."""
        return {
            "number": self.number,
            "trajectories": {name: value.cpu() for name, value in self.trajectories._asdict().items()},
            "rewards": self.rewards.cpu(),
            "advantages": self.advantages.cpu(),
            "returns": None if self.returns is None else self.returns.cpu(),
            "statistics": {name: value.cpu() for name, value in self.metrics.items()},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "PPOIteration":
        """Return the iteration that a state was made of."""
        trajectories = Trajectories(**{name: value.to(device) for name, value in state["trajectories"].items()})
        rewards, advantages = state["rewards"].to(device), state["advantages"].to(device)
        returns = None if state["returns"] is None else state["returns"].to(device)
        return cls(state["number"], trajectories, rewards, advantages, returns, state["statistics"])


class ExperienceLoader:
    """The training loader of PPO: an epoch is one iteration, a rollout and the passes over it.

    It has a length, and must: an unsized loader makes Lightning fetch one batch ahead, and the next rollout would be
    sampled from stale weights. `__iter__` is a generator, so nothing is sampled before the first batch is asked for.

    Its state is not called `state_dict`: Lightning would store that a second time, and give it back in mid-epoch only.

    Args:
        collect: makes the iteration that comes next.
        iter_micro_batches: its micro-batches on this rank.
        length: how many.
    """

    def __init__(
        self,
        collect: Callable[[], PPOIteration],
        iter_micro_batches: Callable[[PPOIteration], Iterator[Experience]],
        length: int,
    ) -> None:
        self.collect, self.iter_micro_batches, self.length = collect, iter_micro_batches, length
        self.iteration: PPOIteration | None = None
        self.position = 0  # micro-batches of it that were yielded
        self.resumed = False

    def __len__(self) -> int:
        """Micro-batches an iteration, on this rank."""
        return self.length

    def __iter__(self) -> Iterator[Experience]:
        """Roll out, then yield; after `resume` go on with the iteration that was begun."""
        if not self.resumed:
            self.iteration = None  # the one before is done with: it need not lie beside the next while that is made
            self.iteration, self.position = self.collect(), 0
        self.resumed = False
        assert self.iteration is not None
        for batch in islice(self.iter_micro_batches(self.iteration), self.position, None):
            self.position += 1  # before the yield: what was yielded counts as consumed in a checkpoint
            yield batch

    def mid_iteration_state(self) -> dict[str, Any]:
        """Return the iteration under way and how far it is, or nothing between two iterations."""
        if self.iteration is None or not 0 < self.position < self.length:
            return {}
        return {"position": self.position, **self.iteration.state_dict()}

    def resume(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with what `unfinished` returned."""
        self.iteration, self.position, self.resumed = (
            PPOIteration.from_state_dict(state, device),
            state["position"],
            True,
        )


def iter_micro_batches(iteration: PPOIteration, sizes: BatchSizes, rank: int, seed: int) -> Iterator[Experience]:
    """Yield this rank's micro-batches: random minibatches, the same for every cut into ranks and micro-batches.

    Inside a minibatch the rows are ordered by length, so that micro-batches carry little padding.
    """
    number, trajectories, _, advantages, returns, statistics = iteration
    width = trajectories.response_mask.shape[1]
    for epoch in range(sizes.ppo_epochs):
        order = shuffle_episodes(sizes, make_generator(seed, number, 1, epoch))
        for minibatch in torch.split(order.to(advantages.device), sizes.minibatch_size):
            tokens = trajectories.response_mask[minibatch].sum().float()
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
                    normalizer=tokens,
                    rollout_metrics=statistics,
                )
                statistics = {}


def shuffle_episodes(sizes: BatchSizes, generator: torch.Generator) -> Tensor:
    """Return the episodes of an iteration in random order, (B,).

    The samples of a prompt stay together where whole prompts make a minibatch, so that one pass over it serves all.
    """
    block = sizes.samples_per_prompt if sizes.minibatch_size % sizes.samples_per_prompt == 0 else 1
    places = torch.arange(sizes.rollout_batch_size).view(-1, block)
    return places[torch.randperm(len(places), generator=generator)].flatten()


def rollout_metrics(trajectories: Trajectories, kl_coefficient: float, returns: Tensor | None) -> dict[str, Tensor]:
    """Return the metrics of a rollout over all episodes of all ranks (docs/metrics.md)."""
    mask, pair = trajectories.response_mask, (trajectories.old_logprobs, trajectories.ref_logprobs)
    kl, kl_k2, kl_k3 = (torch.where(mask, each(*pair), 0).sum(1) for each in (k1, k2, k3))  # (B,) nats a response
    figures = {
        "reward/score": trajectories.scores.mean(),
        "reward/score_std": trajectories.scores.std(),
        "reward/kl": kl.mean(),
        "reward/kl_k2": kl_k2.mean(),
        "reward/kl_k3": kl_k3.mean(),
        "reward/kl_coefficient": torch.tensor(kl_coefficient),
        "reward/kl_penalized_score": (trajectories.scores - kl_coefficient * kl).mean(),
        "response/length": mask.sum(1).float().mean(),
        "response/eos_fraction": trajectories.finished.float().mean(),
        "response/repeated_trigram_fraction": repeated_ngram_fraction(
            trajectories.input_ids[:, -mask.shape[1] :], mask
        ).mean(),
        "policy/entropy_estimate": -masked_mean(trajectories.old_logprobs, mask),
    }
    if returns is not None:
        figures["value/explained_variance"] = explained_variance(trajectories.values, returns, mask).float()
    return figures


def logprob_mismatch(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how far the policy's log-probs by a pass of its own are from those at sampling, (B, R), in nats."""
    mismatch = torch.where(mask, logprobs - rollout_logprobs, 0).abs()
    return {"rollout/logprob_mismatch": masked_mean(mismatch, mask), "rollout/logprob_mismatch_max": mismatch.max()}
