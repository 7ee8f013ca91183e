"""One score out of several reward sources: a weighted sum, and an ensemble of models that score alike."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.functional import Aggregation, aggregate_scores
from lit_rlhf.rewards.base import (
    Reward,
    load_source_state,
    ride_on_policy,
    source_critic,
    source_details,
    source_state,
)
from lit_rlhf.rollout.experience import Episodes


class CombinedReward:
    """Base of what asks several sources: prepares them and keeps their states.

    Args:
        sources: the parts, at least one.
    """

    def __init__(self, sources: list[Reward]) -> None:
        if not sources:
            raise UserError(f"reward: {type(self).__name__} needs at least one source")
        self.sources = sources
        self.scores: Tensor  # (M, B), of the episodes scored last

    def prepare(self, tokenizer: Tokenizer, device: torch.device) -> None:
        """Prepare every part."""
        for source in self.sources:
            source.prepare(tokenizer, device)

    def attach(self, policy: PreTrainedModel, path: str) -> None:
        """See `Reward`: parts may ride."""
        for source in self.sources:
            ride_on_policy(source, policy, path)

    def score_parts(self, episodes: Episodes) -> Tensor:
        """Return every part's scores, (M, B) float32, and keep them for `details`."""
        self.scores = torch.stack([source.score(episodes).float() for source in self.sources])
        return self.scores

    def state_dict(self) -> dict[str, Any]:
        """Return the parts' states."""
        return {"sources": [source_state(source) for source in self.sources]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give them back."""
        parts = state.get("sources", [])
        if parts and len(parts) != len(self.sources):
            raise UserError(
                f"ckpt_path: the checkpoint's reward has {len(parts)} sources, this recipe's has {len(self.sources)}; "
                "give the same ones"
            )
        for source, part in zip(self.sources, parts):
            load_source_state(source, part)


class WeightedSum(CombinedReward):
    """A weighted sum of reward sources.

    Args:
        sources: the parts.
        weights: one each.
        names: one each, for their metrics `reward/NAME`; by default their numbers.
    """

    def __init__(self, sources: list[Reward], weights: list[float], names: list[str] | None = None) -> None:
        if len(sources) != len(weights) or not sources:
            raise UserError(f"reward: {len(weights)} weights for {len(sources)} sources; give one weight each")
        super().__init__(sources)
        self.weights, self.names = weights, names or [str(number) for number in range(len(sources))]
        if len(set(self.names)) != len(sources):
            raise UserError(f"reward: names {self.names} for {len(sources)} sources; give each a name of its own")

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        scores = self.score_parts(episodes)
        return (torch.tensor(self.weights, device=scores.device)[:, None] * scores).sum(0)

    def metrics(self) -> dict[str, Tensor]:
        """Return every part's score, before its weight, and every part's own metrics."""
        figures = {}
        for name, source, scores in zip(self.names, self.sources, self.scores):
            part = f"part_{name}"
            figures[f"reward/{part}"] = scores
            for detail, value in source_details(source).items():
                figures[f"reward/{part}_{detail.removeprefix('reward/')}"] = value
        return figures


class EnsembleReward(CombinedReward):
    """Several reward models that score alike, against over-optimisation of one (Coste et al., 2023).

    Their scores must be of one scale: trained alike and centred on the same demonstrations.

    Args:
        sources: the members.
        aggregation: of their scores: the mean, the minimum (what every member grants at least), or the mean less
            `num_std` standard num_std of the members.
        num_std: of the lower bound.
    """

    def __init__(self, sources: list[Reward], aggregation: Aggregation = "mean", num_std: float = 1.0) -> None:
        super().__init__(sources)
        if num_std < 0:
            raise UserError(f"reward: num_std must not be negative, got {num_std}")
        self.aggregation, self.num_std = aggregation, num_std

    def score(self, episodes: Episodes) -> Tensor:
        """See `Reward.score`."""
        return aggregate_scores(self.score_parts(episodes), self.aggregation, self.num_std)

    def metrics(self) -> dict[str, Tensor]:
        """Return how far the members are apart: their standard deviation (biased)."""
        return {"reward/ensemble_std": self.scores.std(0, correction=0)}

    def critic_init_path(self) -> str | None:
        """See `Reward`: the first member's."""
        return source_critic(self.sources[0])
