"""Advantages: how much better an action was than expected."""

import torch
from torch import Tensor

from lit_rlhf.functional.grouped import grouped_mean

FLOAT32_ROUNDING = 8 * torch.finfo(torch.float32).eps
"""Largest relative difference of two results of the same float32 computation that differ by rounding alone."""


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimates (Schulman et al., 2016, Eq. 16).

    `delta_t = reward_t + discount * value_{t+1} - value_t` and
    `advantage_t = delta_t + discount * gae_lambda * advantage_{t+1}`, both 0 after the last action: a response is a
    complete episode. InstructGPT does not discount (`discount=1`, §C.4).

    Args:
        rewards: (B, R).
        values: (B, R), the critic's estimate before each action; ignored outside the mask.
        mask: (B, R) bool, True for an action; in each row True up to some column, then False.
        discount: In [0, 1].
        gae_lambda: In [0, 1].

    Returns:
        Advantages (B, R), not whitened, and returns (B, R) = advantages + values; both 0 outside the mask.
    """
    assert rewards.shape == values.shape == mask.shape
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "a mask must be contiguous from column 0"
    rewards = torch.where(mask, rewards, 0)
    # also makes the value after the last action 0
    values = torch.where(mask, values, 0)
    next_value = torch.zeros_like(values[:, 0])
    advantage = torch.zeros_like(rewards[:, 0])
    reversed_advantages = []
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = delta + discount * gae_lambda * advantage
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)  # (B, R)
    return advantages, advantages + values


def group_relative(scores: Tensor, group: Tensor, penalties: Tensor | None = None) -> Tensor:
    """Compute scores relative to the other responses to the same prompt (GRPO: Shao et al., 2024, §4.1.2).

    `(score - mean) / std - (penalty - mean)` over the group, with the biased standard deviation of the scores alone:
    a spread that contained the penalties would scale up their rounding where the scores say nothing.

    Args:
        scores: (B,), of responses.
        group: (B,) int64, the prompt of each response; at least two responses per prompt.
        penalties: (B,), subtracted in units of the group's standard deviation; None for none.

    Returns:
        (B,); 0 where all scores of a group are equal up to float32 rounding.
    """
    centered, index, count = _centered(scores, group)
    variance, _ = grouped_mean(centered.square(), index, len(count))
    size, deviation = (
        torch.zeros_like(count).scatter_reduce_(0, index, values.detach().abs().double(), "amax")
        for values in (scores, centered)
    )
    is_tied = (deviation <= FLOAT32_ROUNDING * size)[index]
    relative = centered * variance.masked_fill(variance == 0, 1).rsqrt()[index]
    if penalties is not None:
        relative = relative - _centered(penalties, group)[0]
    return relative.masked_fill(is_tied, 0).to(scores.dtype)


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """Subtract the mean score of the other responses to the prompt (RLOO: Kool et al., 2019; Ahmadian et al., 2024).

    Args:
        scores: (B,), of responses.
        group: (B,) int64, the prompt of each response; at least two responses per prompt.

    Returns:
        (B,), summing to 0 over each group.
    """
    centered, index, count = _centered(scores, group)
    # score - (sum - score) / (k - 1), written with the mean
    return (centered * (count / (count - 1))[index]).to(scores.dtype)


def _centered(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return differences from the group mean (B,) float64, group indices (B,) int64, and group sizes (groups,)."""
    assert scores.ndim == 1 and scores.shape == group.shape
    groups, index = torch.unique(group, return_inverse=True)
    mean, count = grouped_mean(scores.detach(), index, len(groups))
    assert (count >= 2).all(), "every group needs at least two responses"
    return scores.double() - mean[index], index, count
