"""One score from several rewards: a weighted sum, and an ensemble of models on one scale."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.functional import Aggregation, aggregate_scores
from lit_rlhf.models.scalar_model import ScalarSource
from lit_rlhf.rewards.base import Reward, check_part_names
from lit_rlhf.rollout.experience import Episodes


class CombinedReward(Reward):
    """Base of the combinations: prepares the parts and keeps their states.

    Args:
        rewards: the parts, at least one.
    """

    def __init__(self, rewards: list[Reward]) -> None:
        if not rewards:
            raise UserError(f"reward: {type(self).__name__} needs at least one reward")
        self.rewards = rewards
        self.scores: Tensor  # (M, B), of the episodes scored last

    def parts(self) -> list[Reward]:
        """See `Reward.parts`."""
        return self.rewards

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """See `Reward.prepare`."""
        for reward in self.rewards:
            reward.prepare(tokenizer, device)

    def attach(self, policy: PreTrainedModel, path: str) -> None:
        """See `Reward.attach`."""
        for reward in self.rewards:
            reward.attach(policy, path)

    def score_parts(self, episodes: Episodes) -> Tensor:
        """Return the scores of every part, (M, B) float32, and keep them for `metrics`."""
        self.scores = torch.stack([reward.score(episodes).float() for reward in self.rewards])
        return self.scores

    def state_dict(self) -> dict[str, Any]:
        """See `Reward.state_dict`."""
        return {"rewards": [reward.state_dict() for reward in self.rewards]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Reward.load_state_dict`."""
        states = state.get("rewards", [])
        if states and len(states) != len(self.rewards):
            raise UserError(
                f"ckpt_path: the checkpoint's reward has {len(states)} parts, this recipe's has {len(self.rewards)}; "
                "give the same ones"
            )
        for reward, part in zip(self.rewards, states):
            reward.load_state_dict(part)


class WeightedSum(CombinedReward):
    """A weighted sum of rewards.

    Args:
        rewards: the parts.
        weights: one per part.
        names: one per part, for their metrics `reward/NAME`; by default their numbers.
    """

    def __init__(self, rewards: list[Reward], weights: list[float], names: list[str] | None = None) -> None:
        if len(rewards) != len(weights) or not rewards:
            raise UserError(f"reward: {len(weights)} weights for {len(rewards)} rewards; give one weight each")
        super().__init__(rewards)
        self.weights, self.names = weights, names or [str(number) for number in range(len(rewards))]
        if len(set(self.names)) != len(rewards):
            raise UserError(f"reward: names {self.names} for {len(rewards)} rewards; give each a name of its own")
        check_part_names(self.names)

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        scores = self.score_parts(episodes)
        return (torch.tensor(self.weights, device=scores.device)[:, None] * scores).sum(0)

    def metrics(self) -> dict[str, Tensor]:
        """See `Reward.metrics`: every part's score before its weight, and its own metrics as `reward/PART_NAME`."""
        metrics = {}
        for name, reward, scores in zip(self.names, self.rewards, self.scores):
            metrics[f"reward/{name}"] = scores
            for own_name, value in reward.metrics().items():
                metrics[f"reward/{name}_{own_name.removeprefix('reward/')}"] = value
        return metrics


class EnsembleReward(CombinedReward):
    """Several reward models on one scale, against over-optimization of a single one (Coste et al., 2023).

    Train them alike and center them on the same demonstrations.

    Args:
        rewards: the members.
        aggregation: of their scores: the mean, the minimum, or the mean minus `num_std` standard deviations of the
            members.
        num_std: for the last of these.
    """

    def __init__(self, rewards: list[Reward], aggregation: Aggregation = "mean", num_std: float = 1.0) -> None:
        super().__init__(rewards)
        if num_std < 0:
            raise UserError(f"reward: num_std must not be negative, got {num_std}")
        self.aggregation, self.num_std = aggregation, num_std

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        return aggregate_scores(self.score_parts(episodes), self.aggregation, self.num_std)

    def metrics(self) -> dict[str, Tensor]:
        """See `Reward.metrics`: the (biased) standard deviation of the members."""
        return {"reward/ensemble_std": self.scores.std(0, correction=0)}

    def critic_init_path(self) -> ScalarSource | None:
        """See `Reward.critic_init_path`: the first member's."""
        return self.rewards[0].critic_init_path()
