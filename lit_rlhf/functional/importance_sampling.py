"""Weights for actions that another policy sampled than the one that is updated."""

import torch
from torch import Tensor


def truncated_importance_weights(logprobs: Tensor, behavior_logprobs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """Compute `min(exp(logprobs - behavior_logprobs), cap)` of each action, 0 outside the mask.

    The weight of a term of the policy loss in decoupled PPO (Hilton et al. 2021), truncated as by Ionides (2008): an
    expectation over actions of the behavior policy becomes one over actions of the other, up to the truncation, which
    bounds the variance.

    Args:
        logprobs: (B, R), of the policy whose expectation is wanted.
        behavior_logprobs: (B, R), of the policy that sampled the actions.
        mask: (B, R) bool, True for an action.
        cap: The largest weight, at least 1.

    Returns:
        (B, R), without gradient.
    """
    assert logprobs.shape == behavior_logprobs.shape == mask.shape
    log_ratio = torch.where(mask, logprobs.detach() - behavior_logprobs.detach(), 0)
    return log_ratio.exp().clamp(max=cap) * mask
