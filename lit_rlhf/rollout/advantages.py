"""Advantage estimators. Shapes: `B` episodes, `R` response.

All subtract the KL penalty: `GAE` token by token, `RLOOAdvantage` from the score of a response, and `GRPOAdvantage`
from its normalized score.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional import (
    gae,
    group_relative,
    k1,
    kl_penalized_rewards,
    leave_one_out,
    mean_and_variance,
    moments,
    whiten,
)
from lit_rlhf.rollout.experience import Trajectories


class AdvantageEstimate(NamedTuple):
    """The targets of the update."""

    advantages: Tensor  # (B, R) float32, 0 outside the response
    returns: Tensor | None = None  # (B, R) float32, targets of the critic; None without a critic


class AdvantageEstimator(ABC):
    """Computes advantages from rewards, over all episodes of all ranks.

    Attributes:
        uses_critic: whether it reads `Trajectories.values`. Otherwise no critic is loaded and values are 0.
        min_group_size: smallest number of responses per prompt (`ppo.samples_per_prompt`) that it works with.
    """

    uses_critic: bool = False
    min_group_size: int = 1

    @abstractmethod
    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """Return the advantages of an iteration.

        Args:
            rewards: (B, R) float32: the KL penalty, plus the score on the last action; 0 outside the response.
            trajectories: all episodes; the same on every rank.
        """


class GAE(AdvantageEstimator):
    """Generalized advantage estimation with the critic's values; advantages whitened over all tokens of all ranks.

    Args:
        discount: 1 in the paper (App. C.4).
        gae_lambda: the paper is silent (Stiennon et al., 2020: 0.95).
    """

    uses_critic = True

    def __init__(self, discount: float = 1.0, gae_lambda: float = 0.95) -> None:
        for name, value in (("discount", discount), ("gae_lambda", gae_lambda)):
            if not 0 <= value <= 1:
                raise UserError(f"advantages: {name} must lie in [0, 1], got {value}")
        self.discount, self.gae_lambda = discount, gae_lambda

    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """See `AdvantageEstimator.estimate`."""
        mask = trajectories.response_mask
        advantages, returns = gae(rewards, trajectories.values, mask, self.discount, self.gae_lambda)
        mean, variance = mean_and_variance(moments(advantages, mask))
        return AdvantageEstimate(whiten(advantages, mask, mean, variance), returns)


class GRPOAdvantage(AdvantageEstimator):
    """A response's score minus its prompt's mean, in the prompt's standard deviations, and the KL penalty; no critic.

    Group-relative policy optimization (Shao et al., 2024). Every token of a response gets the same advantage. The KL
    penalty, centered in the group as well, is not divided by the standard deviation. All advantages of a prompt whose
    responses have equal scores are 0. No whitening.
    """

    min_group_size = 2

    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """See `AdvantageEstimator.estimate`."""
        scores = trajectories.scores
        penalties = scores - rewards.sum(1)  # β times the KL of a response
        return AdvantageEstimate(
            _broadcast_to_tokens(group_relative(scores, trajectories.prompt_index, penalties), trajectories)
        )


class RLOOAdvantage(AdvantageEstimator):
    """A response's total reward minus the mean of the other responses to its prompt; no critic.

    REINFORCE leave-one-out (Ahmadian et al., 2024). Every token of a response gets the same advantage, in the unit of
    the score; no whitening.
    """

    min_group_size = 2

    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """See `AdvantageEstimator.estimate`."""
        return AdvantageEstimate(
            _broadcast_to_tokens(leave_one_out(rewards.sum(1), trajectories.prompt_index), trajectories)
        )


def compute_rewards(trajectories: Trajectories, kl_coefficient: float) -> Tensor:
    """Return per-token rewards, (B, R): the KL penalty, plus the score on the last action (§3.5)."""
    kl = k1(trajectories.old_logprobs, trajectories.ref_logprobs)
    return kl_penalized_rewards(trajectories.scores, kl, trajectories.response_mask, kl_coefficient)


def _broadcast_to_tokens(advantages: Tensor, trajectories: Trajectories) -> Tensor:
    """Return (B,) as (B, R), 0 outside the response."""
    return advantages[:, None] * trajectories.response_mask


def check_group_size(estimator: AdvantageEstimator, samples_per_prompt: int) -> None:
    """Refuse too few responses per prompt for an estimator that compares them.

    Raises:
        UserError: names the setting to raise.
    """
    if samples_per_prompt < estimator.min_group_size:
        raise UserError(
            f"advantages: {type(estimator).__name__} compares the responses to a prompt and needs at least "
            f"{estimator.min_group_size} of them; set model.ppo.samples_per_prompt (it is {samples_per_prompt})"
        )
