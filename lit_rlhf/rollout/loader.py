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
    repeated_share,
)
from lit_rlhf.models.layout import by_length
from lit_rlhf.rollout.experience import Experience, Trajectories
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
        samples: episodes a prompt.
    """

    rollout_batch: int
    micro_batch: int
    accumulate: int
    world_size: int
    epochs: int
    samples: int = 1

    def __post_init__(self) -> None:
        """Refuse a division that leaves a rest."""
        if self.rollout_batch % self.minibatch:
            raise UserError(
                f"ppo.rollout_batch {self.rollout_batch} is not a multiple of the minibatch {self.minibatch} = "
                f"micro_batch {self.micro_batch} x accumulate_grad_batches {self.accumulate} x {self.world_size} "
                "ranks; change one"
            )
        if self.rollout_batch % (self.samples * self.world_size):
            raise UserError(
                f"ppo.rollout_batch {self.rollout_batch} is not a multiple of samples_per_prompt {self.samples} x "
                f"{self.world_size} ranks; change one"
            )

    @property
    def prompts(self) -> int:
        """Prompts an iteration, over all ranks."""
        return self.rollout_batch // self.samples

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
        prompts = f" ({self.samples} for each of {self.prompts} prompts)" if self.samples > 1 else ""
        return (
            f"{self.rollout_batch} episodes an iteration{prompts} = {self.rollout_batch // self.minibatch} minibatches "
            f"of {self.minibatch} (micro-batch {self.micro_batch} x accumulation {self.accumulate} x {self.world_size} "
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


class Iteration(NamedTuple):
    """All that the update of one iteration is made from."""

    number: int
    trajectories: Trajectories
    rewards: Tensor  # (B, R) float32: the KL penalty, with the score on the last action
    advantages: Tensor  # (B, R) float32
    returns: Tensor | None  # (B, R) float32; None without a critic
    statistics: dict[str, Tensor]  # of the rollout

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain values and tensors on the CPU."""
        return {
            "number": self.number,
            "trajectories": {name: value.cpu() for name, value in self.trajectories._asdict().items()},
            "rewards": self.rewards.cpu(),
            "advantages": self.advantages.cpu(),
            "returns": None if self.returns is None else self.returns.cpu(),
            "statistics": {name: value.cpu() for name, value in self.statistics.items()},
        }

    @classmethod
    def of_state(cls, state: dict[str, Any], device: torch.device) -> "Iteration":
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
        cut: its micro-batches on this rank.
        length: how many.
    """

    def __init__(
        self, collect: Callable[[], Iteration], cut: Callable[[Iteration], Iterator[Experience]], length: int
    ) -> None:
        self.collect, self.cut, self.length = collect, cut, length
        self.iteration: Iteration | None = None
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
        for batch in islice(self.cut(self.iteration), self.position, None):
            self.position += 1  # before the yield: what was yielded counts as consumed in a checkpoint
            yield batch

    def unfinished(self) -> dict[str, Any]:
        """Return the iteration under way and how far it is, or nothing between two iterations."""
        if self.iteration is None or not 0 < self.position < self.length:
            return {}
        return {"position": self.position, **self.iteration.state_dict()}

    def resume(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with what `unfinished` returned."""
        self.iteration, self.position, self.resumed = Iteration.of_state(state, device), state["position"], True


def cut(iteration: Iteration, sizes: Sizes, rank: int, seed: int) -> Iterator[Experience]:
    """Yield this rank's micro-batches: random minibatches, the same for every cut into ranks and micro-batches.

    Inside a minibatch the rows are ordered by length, so that micro-batches carry little padding.
    """
    number, trajectories, _, advantages, returns, statistics = iteration
    width = trajectories.response_mask.shape[1]
    for epoch in range(sizes.epochs):
        order = random_order(sizes, seeded(seed, number, 1, epoch))
        for minibatch in torch.split(order.to(advantages.device), sizes.minibatch):
            tokens = trajectories.response_mask[minibatch].sum().float()
            ids, mask = trajectories.input_ids[minibatch], trajectories.attention_mask[minibatch]
            chunks = list(by_length(ids, mask, width, sizes.micro_batch))
            for chunk, columns, kept in chunks[rank :: sizes.world_size]:
                rows = minibatch[chunk]
                yield Experience(
                    input_ids=trajectories.input_ids[rows][:, columns],
                    attention_mask=trajectories.attention_mask[rows][:, columns],
                    response_mask=trajectories.response_mask[rows, :kept],
                    logprobs=trajectories.logprobs[rows, :kept],
                    values=trajectories.values[rows, :kept],
                    advantages=advantages[rows, :kept],
                    returns=None if returns is None else returns[rows, :kept],
                    normalizer=tokens,
                    statistics=statistics,
                )
                statistics = {}


def random_order(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """Return the episodes of an iteration in random order, (B,).

    The samples of a prompt stay together where whole prompts make a minibatch, so that one pass over it serves all.
    """
    block = sizes.samples if sizes.minibatch % sizes.samples == 0 else 1
    places = torch.arange(sizes.rollout_batch).view(-1, block)
    return places[torch.randperm(len(places), generator=generator)].flatten()


def rollout_statistics(trajectories: Trajectories, kl_coefficient: float, returns: Tensor | None) -> dict[str, Tensor]:
    """Return the metrics of a rollout over all episodes of all ranks (docs/metrics.md)."""
    mask, pair = trajectories.response_mask, (trajectories.logprobs, trajectories.reference)
    kl, kl_k2, kl_k3 = (torch.where(mask, each(*pair), 0).sum(1) for each in (k1, k2, k3))  # (B,) nats a response
    figures = {
        "reward/score": trajectories.scores.mean(),
        "reward/score_std": trajectories.scores.std(),
        "reward/kl": kl.mean(),
        "reward/kl_k2": kl_k2.mean(),
        "reward/kl_k3": kl_k3.mean(),
        "reward/kl_coefficient": torch.tensor(kl_coefficient),
        "reward/penalised": (trajectories.scores - kl_coefficient * kl).mean(),
        "response/length": mask.sum(1).float().mean(),
        "response/ended": trajectories.ended.float().mean(),
        "response/repetition": repeated_share(trajectories.input_ids[:, -mask.shape[1] :], mask).mean(),
        "policy/entropy": -masked_mean(trajectories.logprobs, mask),
    }
    if returns is not None:
        figures["value/explained_variance"] = explained_variance(trajectories.values, returns, mask).float()
    return figures


def logprob_mismatch(logprobs: Tensor, drawn: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how far the policy's log-probs by a pass of its own are from those at sampling, (B, R), in nats."""
    mismatch = torch.where(mask, logprobs - drawn, 0).abs()
    return {"rollout/logprob_mismatch": masked_mean(mismatch, mask), "rollout/logprob_mismatch_max": mismatch.max()}
