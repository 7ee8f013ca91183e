"""Floating-point operations of a model, by its number of weights.

The operations of attention, which grow with the length, are not counted, as is usual (Kaplan et al., 2020, §2.1).
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def count_training_flops_per_token(model: nn.Module) -> int:
    """Return the FLOPs of forward and backward pass per token: 6 per trained weight, 4 per frozen one."""
    return sum((6 if weight.requires_grad else 4) * count_weights(weight) for weight in model.parameters())


@torch.no_grad()
def count_forward_flops_per_token(model: nn.Module) -> int:
    """Return the FLOPs of a forward pass per token: 2 per weight."""
    return sum(2 * count_weights(weight) for weight in model.parameters())


def count_weights(parameter: Tensor) -> int:
    """Return the number of weights in a parameter, also of one in 4 bits, whose elements hold two."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
