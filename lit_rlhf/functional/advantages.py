"""How much better an action was than expected."""

import torch
from torch import Tensor

from lit_rlhf.functional.grouped import grouped_mean


def gae(rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, Eq. 16).

    `delta_t = reward_t + discount * value_{t+1} - value_t` and
    `advantage_t = delta_t + discount * gae_lambda * advantage_{t+1}`, both 0 beyond the last action: a response is
    the whole episode. InstructGPT does not discount (`discount=1`, §C.4).

    Args:
        rewards: (B, R).
        values: (B, R), the critic's estimate before action t. Ignored outside the mask.
        mask: (B, R) bool, True for an action: in each row, True from column 0 on and then False.
        discount: In [0, 1].
        gae_lambda: In [0, 1].

    Returns:
        Advantages (B, R), not whitened, and returns (B, R) = advantages + values; both 0 outside the mask.
    """
    assert rewards.shape == values.shape == mask.shape
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "a mask must be contiguous from column 0"
    rewards = torch.where(mask, rewards, 0)
    # Zeroed values are what makes the value after the last action 0.
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


def group_relative(scores: Tensor, group: Tensor) -> Tensor:
    """Score relative to the other responses to the same prompt (GRPO: Shao et al., 2024, §4.1.2).

    `(score - mean) / sqrt(variance + 1e-8)` over the group, with the biased variance.

    Args:
        scores: (B,), of whole responses.
        group: (B,) int64, which prompt each answers; at least two to each.

    Returns:
        (B,); 0 where all scores of a group are equal.
    """
    centred, place, count = _centered(scores, group)
    variance, _ = grouped_mean(centred.square(), place, len(count))
    return (centred * torch.rsqrt(variance + 1e-8)[place]).to(scores.dtype)


def leave_one_out(scores: Tensor, group: Tensor) -> Tensor:
    """Score minus the mean score of the other responses to the prompt (RLOO: Kool et al., 2019; Ahmadian et al., 2024).

    Args:
        scores: (B,), of whole responses.
        group: (B,) int64, which prompt each answers; at least two to each.

    Returns:
        (B,), each group adding up to 0.
    """
    centred, place, count = _centered(scores, group)
    # score - (sum - score) / (k - 1), written with the mean
    return (centred * (count / (count - 1))[place]).to(scores.dtype)


def _centered(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Differences from the group's mean (B,) float64, place of the group (B,), and sizes of groups (groups,)."""
    assert scores.ndim == 1 and scores.shape == group.shape
    groups, place = torch.unique(group, return_inverse=True)
    mean, count = grouped_mean(scores.detach(), place, len(groups))
    assert (count >= 2).all(), "a group of one has nothing to be compared with"
    return scores.double() - mean[place], place, count
