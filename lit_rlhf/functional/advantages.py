"""How much better an action was than expected."""

import torch
from torch import Tensor


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


def group_relative(scores: Tensor, group_size: int) -> Tensor:
    """Score relative to the other responses to the same prompt (GRPO: Shao et al., 2024, §4.1.2).

    `(score - mean) / sqrt(variance + 1e-8)` over the group, with the biased variance.

    Args:
        scores: (B,); the responses to one prompt are `group_size` consecutive rows.
        group_size: At least 2, and a divisor of B.

    Returns:
        (B,); 0 where all scores of a group are equal.
    """
    groups = _groups(scores, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-8)).flatten()


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """Score minus the mean score of the other responses to the same prompt (RLOO: Kool et al., 2019).

    Args:
        scores: (B,); the responses to one prompt are `group_size` consecutive rows.
        group_size: At least 2, and a divisor of B.

    Returns:
        (B,), each group adding up to 0.
    """
    groups = _groups(scores, group_size)
    # score - (sum - score) / (k - 1), written with the mean
    return ((groups - groups.mean(1, keepdim=True)) * (group_size / (group_size - 1))).flatten()


def _groups(scores: Tensor, group_size: int) -> Tensor:
    """(B,) as (B / group_size, group_size)."""
    assert scores.ndim == 1 and group_size >= 2
    assert len(scores) % group_size == 0, f"{len(scores)} scores do not make groups of {group_size}"
    return scores.view(-1, group_size)
