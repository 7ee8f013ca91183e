"""Steps between a reward source and PPO: a fixed scale, a running normalisation, a clip. Each wraps one source."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.distributed import is_distributed
from lit_rlhf.errors import UserError
from lit_rlhf.functional import mean_and_variance, moments, whiten
from lit_rlhf.rewards.base import (
    Reward,
    load_source_state,
    ride_on_policy,
    source_critic,
    source_details,
    source_state,
)
from lit_rlhf.rollout.experience import Episodes


class RewardWrapper:
    """Base of a step: it passes everything on to its source and changes the scores.

    Args:
        source: what is wrapped; may be another step.
    """

    def __init__(self, source: Reward) -> None:
        self.source = source

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Prepare the source."""
        self.source.prepare(tokenizer, device)

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        return self.transform(self.source.score(episodes).float(), episodes)

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """Return the changed scores, (B,)."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Tensor]:
        """Return the source's metrics."""
        return source_details(self.source)

    def state_dict(self) -> dict[str, Any]:
        """Return the source's state."""
        return {"source": source_state(self.source)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give it back."""
        load_source_state(self.source, state.get("source", {}))

    def critic_init_path(self) -> str | None:
        """See `Reward`: the source's."""
        return source_critic(self.source)

    def attach(self, policy: PreTrainedModel, path: str) -> None:
        """See `Reward`: the source may ride."""
        ride_on_policy(self.source, policy, path)


class ScaledReward(RewardWrapper):
    """Fixed normalisation: `(score - mean) / std`, with figures that you measured.

    Args:
        source: what is wrapped.
        mean: what is subtracted.
        std: what is divided by.
    """

    def __init__(self, source: Reward, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(source)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise UserError(f"reward: ScaledReward needs a finite mean and a positive std, got {mean} and {std}")
        self.mean, self.std = mean, std

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """See `RewardWrapper.change`."""
        return (scores - self.mean) / self.std


class NormalizedReward(RewardWrapper):
    """Running normalisation: `(score - mean) / std` over every training episode so far, of all ranks.

    The episodes at hand are counted first, so the first rollout has mean 0 and variance 1. Validation episodes are
    normalised and not counted. While mean and std move, a score means another thing in every iteration, and so does
    β; `episodes` ends that: with one rollout's number it is Ziegler et al.'s (2019) normalisation over samples of the
    initial policy.

    Args:
        source: what is wrapped.
        episodes: stop counting once this many were counted. None: never.
    """

    def __init__(self, source: Reward, episodes: int | None = None) -> None:
        super().__init__(source)
        if episodes is not None and episodes < 1:
            raise UserError(f"reward: NormalizedReward.episodes must be at least 1, got {episodes}")
        self.episodes = episodes
        self.moments = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares
        self.group: dist.ProcessGroup | None = None

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """See `RewardWrapper.change`."""
        everyone = torch.ones_like(scores, dtype=torch.bool)
        if episodes.training and (self.episodes is None or self.moments[0] < self.episodes):
            added = moments(scores, everyone)
            if is_distributed():
                dist.all_reduce(added, group=self.group)  # so that every rank keeps the same moments
            self.moments = self.moments + added.cpu()
        if not self.moments[0]:
            return scores  # nothing is known yet: validation before the first rollout
        mean, variance = (figure.to(scores.device) for figure in mean_and_variance(self.moments))
        return whiten(scores, everyone, mean, variance).float()

    def state_dict(self) -> dict[str, Any]:
        """Return the moments beside the source's state."""
        return {"moments": self.moments.tolist(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        if "moments" in state:  # not where the step is new in the recipe
            self.moments = torch.tensor(state["moments"], dtype=torch.float64)


class ClippedReward(RewardWrapper):
    """Scores limited to an interval, so that no single response decides a minibatch.

    Args:
        source: what is wrapped.
        low: nothing scores less.
        high: nothing scores more.
    """

    def __init__(self, source: Reward, low: float = -10.0, high: float = 10.0) -> None:
        super().__init__(source)
        if not low < high:
            raise UserError(f"reward: ClippedReward.low must be below its high, got {low} and {high}")
        self.low, self.high = low, high
        self.clipped: Tensor  # (B,) of the episodes scored last

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """See `RewardWrapper.change`."""
        self.clipped = ((scores < self.low) | (scores > self.high)).float()
        # an infinite score is a fault, at which the run has to stop
        return torch.where(scores.isfinite(), scores.clamp(self.low, self.high), scores)

    def metrics(self) -> dict[str, Tensor]:
        """Return which scores were limited, beside the source's metrics."""
        return {"reward/clip_fraction": self.clipped, **super().metrics()}
