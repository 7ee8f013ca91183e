"""Advantage estimators: how much better each action of an iteration was than expected.

All take the rewards after the KL penalty, so the KL to the reference counts in each of them: token by token with
`GAE`, in the total of a response with the two that compare responses to the same prompt.
"""

from typing import NamedTuple, Protocol

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
    """What the update learns from."""

    advantages: Tensor  # (B, R) float32, 0 outside the response
    returns: Tensor | None = None  # (B, R) float32, what the critic learns; None without a critic


class AdvantageEstimator(Protocol):
    """From rewards to advantages, over all episodes of all ranks.

    Attributes:
        uses_critic: whether it reads `Trajectories.values`. Without, no critic is loaded and values are 0.
        min_group_size: fewest responses to a prompt (`ppo.samples_per_prompt`) that it can be used with.
    """

    uses_critic: bool
    min_group_size: int

    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """Return the advantages of an iteration.

        Args:
            rewards: (B, R) float32: the KL penalty, with the score on the last action; 0 outside the response.
            trajectories: all episodes; the same on every rank.
        """
        ...


def compute_rewards(trajectories: Trajectories, kl_coefficient: float) -> Tensor:
    """Return the rewards of an iteration, (B, R): the per-token KL penalty, and the score on the last action (§3.5)."""
    kl = k1(trajectories.old_logprobs, trajectories.ref_logprobs)
    return kl_penalized_rewards(trajectories.scores, kl, trajectories.response_mask, kl_coefficient)


class GAE:
    """Generalised advantage estimation with the critic's values; advantages whitened over all tokens of all ranks.

    Args:
        discount: 1 in the paper (App. C.4).
        gae_lambda: the paper is silent (Stiennon 2020: 0.95).
    """

    uses_critic, min_group_size = True, 1

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


class GRPOAdvantage:
    """The response's total reward less its prompt's mean, in standard num_std of its prompt (GRPO); no critic.

    Every token of a response gets the same advantage. It is not whitened again: each group has mean 0 and variance 1.
    """

    uses_critic, min_group_size = False, 2

    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """See `AdvantageEstimator.estimate`."""
        return AdvantageEstimate(
            _broadcast_to_tokens(group_relative(rewards.sum(1), trajectories.prompt_index), trajectories)
        )


class RLOOAdvantage:
    """The response's total reward less the mean of the other responses to its prompt (RLOO); no critic.

    Every token of a response gets the same advantage. It is not whitened: it is in the unit of the score.
    """

    uses_critic, min_group_size = False, 2

    def estimate(self, rewards: Tensor, trajectories: Trajectories) -> AdvantageEstimate:
        """See `AdvantageEstimator.estimate`."""
        return AdvantageEstimate(
            _broadcast_to_tokens(leave_one_out(rewards.sum(1), trajectories.prompt_index), trajectories)
        )


def _broadcast_to_tokens(advantages: Tensor, trajectories: Trajectories) -> Tensor:
    """(B,) as (B, R), 0 outside the response."""
    return advantages[:, None] * trajectories.response_mask


def check_group_size(estimator: AdvantageEstimator, samples_per_prompt: int) -> None:
    """Refuse an estimator that compares the responses to a prompt where there are too few of them.

    Raises:
        UserError: names the setting to raise.
    """
    if samples_per_prompt < estimator.min_group_size:
        raise UserError(
            f"advantages: {type(estimator).__name__} compares the responses to a prompt and needs at least "
            f"{estimator.min_group_size} of them; set model.ppo.samples_per_prompt (it is {samples_per_prompt})"
        )
