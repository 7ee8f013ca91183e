"""Rewards per token: the score of a response and a KL penalty."""

import torch
from torch import Tensor

from lit_rlhf.functional.padding import last_token_index


def kl_penalized_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coefficient: float) -> Tensor:
    """Compute the reward of InstructGPT's Eq. 2, with the per-token KL penalty of §3.5.

    `reward_t = -kl_coefficient * kl_t`, plus the score at the last action (the end token, if there is one). A row sums
    to `score - kl_coefficient * sum_t kl_t`.

    Args:
        scores: (B,), of responses.
        kl: (B, R), in nats per token: `kl.k1` for the paper's penalty.
        mask: (B, R) bool, True for an action; at least one in each row.
        kl_coefficient: The paper's beta.

    Returns:
        (B, R), 0 outside the mask.
    """
    assert kl.shape == mask.shape and scores.shape == mask.shape[:1]
    last = last_token_index(mask)  # (B,)
    is_last = torch.arange(mask.shape[1], device=mask.device) == last.unsqueeze(1)  # (B, R)
    return torch.where(mask, -kl_coefficient * kl, 0) + torch.where(is_last, scores.unsqueeze(1), 0)
