"""The losses of proximal policy optimization (Schulman et al., 2017), as sums over actions.

Sums and counts add up over micro-batches and ranks; the caller divides by the number of actions of the minibatch.
Values outside the mask, `nan` included, affect neither loss nor gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional.kl import k3
from lit_rlhf.functional.masked import masked_sum, mean_and_variance, moments


class PolicyLoss(NamedTuple):
    """Sums over the mask, all 0-d. All but the loss are detached."""

    loss: Tensor
    """Sum of the clipped surrogate, with the sign of a loss."""
    num_clipped: Tensor
    """Number of actions whose gradient is 0 because of clipping, int64."""
    approx_kl: Tensor
    """Sum of `ratio - 1 - log ratio`, which estimates KL(old || new) in nats and is never negative."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """Number of actions, int64."""


class ValueLoss(NamedTuple):
    """Sums over the mask, all 0-d. All but the loss are detached."""

    loss: Tensor
    """Sum of half the larger squared error."""
    num_clipped: Tensor
    """Number of actions where the clipped error was the larger, int64."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """Number of actions, int64."""


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> PolicyLoss:
    """Compute the clipped surrogate objective (PPO Eq. 7), negated.

    `sum over actions of max(-A r, -A clamp(r, 1 - clip_range, 1 + clip_range))`
    with `r = exp(logprobs - old_logprobs)`.

    Args:
        logprobs: (B, R), of the policy being trained.
        old_logprobs: (B, R), of the policy that generated the rollout.
        advantages: (B, R).
        mask: (B, R) bool, True for an action.
        clip_range: How far the ratio may move from 1; 0.2 in InstructGPT (§C.4).
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == mask.shape
    # masked before exp, whose gradient at nan would be nan even if masked afterwards
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        loss=masked_sum(torch.maximum(unclipped, clipped), mask),
        num_clipped=((clipped > unclipped) & mask).sum(),
        # new and old swapped: the tokens were sampled from the old policy
        approx_kl=masked_sum(k3(torch.zeros_like(log_ratio), log_ratio.detach()), mask),
        count=mask.sum(),
    )


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float
) -> ValueLoss:
    """Compute half the squared error of the critic, with its change since the rollout clipped.

    `sum over actions of max((v - R)^2, (v_clipped - R)^2) / 2` with
    `v_clipped = clamp(v, v_old - clip_range, v_old + clip_range)`.

    Args:
        values: (B, R), of the critic being trained.
        old_values: (B, R), at the time of the rollout.
        returns: (B, R), of `gae`.
        mask: (B, R) bool, True for an action.
        clip_range: In units of the value; infinity for no clipping. The paper does not mention value clipping.
    """
    assert values.shape == old_values.shape == returns.shape == mask.shape
    # masked before squaring, whose gradient at nan would be nan
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    unclipped = (values - returns).square()
    # not old + (v - old).clamp(), whose rounding differs from v and would count as clipped
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns).square()
    return ValueLoss(
        loss=masked_sum(torch.maximum(unclipped, clipped), mask) / 2,
        num_clipped=((clipped > unclipped) & mask).sum(),
        count=mask.sum(),
    )


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Compute `1 - Var(returns - values) / Var(returns)` over the mask.

    1 for a perfect critic, 0 for a constant one, negative for one worse than a constant.

    Args:
        values: (B, R).
        returns: (B, R).
        mask: (B, R) bool.

    Returns:
        0-d float64; `nan` or minus infinity where the returns do not vary.
    """
    _, residual = mean_and_variance(moments(returns.detach().double() - values.detach().double(), mask))
    _, total = mean_and_variance(moments(returns.detach(), mask))
    return 1 - residual / total
