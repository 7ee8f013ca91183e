"""Wrappers between a reward and PPO: a fixed scale, a running normalization, a clip."""

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.distributed import is_distributed
from lit_rlhf.errors import UserError
from lit_rlhf.functional import mean_and_variance, moments, whiten
from lit_rlhf.models.scalar_model import ScalarSource
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rollout.experience import Episodes


class RewardWrapper(Reward):
    """Base of the wrappers: transforms the scores of another reward.

    Args:
        reward: the wrapped reward; may be another wrapper.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    @abstractmethod
    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """Return the transformed scores, (B,)."""

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """See `Reward.prepare`."""
        self.reward.prepare(tokenizer, device)

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        return self.transform(self.reward.score(episodes).float(), episodes)

    def metrics(self) -> dict[str, Tensor]:
        """See `Reward.metrics`: those of the wrapped reward."""
        return self.reward.metrics()

    def attach(self, policy: PreTrainedModel, path: str) -> None:
        """See `Reward.attach`."""
        self.reward.attach(policy, path)

    def parts(self) -> list[Reward]:
        """See `Reward.parts`."""
        return [self.reward]

    def critic_init_path(self) -> ScalarSource | None:
        """See `Reward.critic_init_path`: that of the wrapped reward."""
        return self.reward.critic_init_path()

    def state_dict(self) -> dict[str, Any]:
        """See `Reward.state_dict`."""
        return {"reward": self.reward.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Reward.load_state_dict`."""
        self.reward.load_state_dict(state.get("reward", {}))


class ScaledReward(RewardWrapper):
    """Fixed normalization: `(score - mean) / std`, with values that you measured.

    Args:
        reward: the wrapped reward.
        mean: is subtracted.
        std: is divided by.
    """

    def __init__(self, reward: Reward, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__(reward)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise UserError(f"reward: ScaledReward needs a finite mean and a positive std, got {mean} and {std}")
        self.mean, self.std = mean, std

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """See `RewardWrapper.transform`."""
        return (scores - self.mean) / self.std


class NormalizedReward(RewardWrapper):
    """Running normalization: `(score - mean) / std` over every training episode so far, of all ranks.

    The current episodes are counted first, so the first rollout has mean 0 and variance 1. Validation episodes are
    normalized and not counted. While mean and std change, the unit of the score changes from iteration to iteration,
    and so does the meaning of β; `max_episodes` ends that: with the size of one rollout it is the normalization of
    Ziegler et al. (2019) over samples of the initial policy.

    Args:
        reward: the wrapped reward.
        max_episodes: stop counting once this many were counted. None: never.
    """

    def __init__(self, reward: Reward, max_episodes: int | None = None) -> None:
        super().__init__(reward)
        if max_episodes is not None and max_episodes < 1:
            raise UserError(f"reward: NormalizedReward.max_episodes must be at least 1, got {max_episodes}")
        self.max_episodes = max_episodes
        self.moments = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """See `RewardWrapper.transform`."""
        everyone = torch.ones_like(scores, dtype=torch.bool)
        if episodes.training and (self.max_episodes is None or self.moments[0] < self.max_episodes):
            added = moments(scores, everyone)
            if is_distributed():
                dist.all_reduce(added, group=self.group)  # so that every rank keeps the same moments
            self.moments = self.moments + added.cpu()
        if not self.moments[0]:
            return scores  # validation before the first rollout
        mean, variance = (value.to(scores.device) for value in mean_and_variance(self.moments))
        return whiten(scores, everyone, mean, variance).float()

    def state_dict(self) -> dict[str, Any]:
        """See `Reward.state_dict`: the moments as well."""
        return {"moments": self.moments.tolist(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Reward.load_state_dict`."""
        super().load_state_dict(state)
        if "moments" in state:  # not where the wrapper is new in the recipe
            self.moments = torch.tensor(state["moments"], dtype=torch.float64)


class ClippedReward(RewardWrapper):
    """Scores clipped to an interval, so that no single response decides a minibatch.

    Args:
        reward: the wrapped reward.
        low: the smallest score.
        high: the largest score.
    """

    def __init__(self, reward: Reward, low: float = -10.0, high: float = 10.0) -> None:
        super().__init__(reward)
        if not low < high:
            raise UserError(f"reward: ClippedReward.low must be below its high, got {low} and {high}")
        self.low, self.high = low, high
        self.is_clipped: Tensor  # (B,) float32, of the episodes scored last

    def transform(self, scores: Tensor, episodes: Episodes) -> Tensor:
        """See `RewardWrapper.transform`."""
        self.is_clipped = ((scores < self.low) | (scores > self.high)).float()
        # an infinite score is an error, at which the run has to stop
        return torch.where(scores.isfinite(), scores.clamp(self.low, self.high), scores)

    def metrics(self) -> dict[str, Tensor]:
        """See `Reward.metrics`: the fraction of clipped scores as well."""
        return {"reward/clip_fraction": self.is_clipped, **super().metrics()}
