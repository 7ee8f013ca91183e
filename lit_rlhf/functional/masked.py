"""Statistics over the valid positions of a padded tensor.

Values outside the mask, `nan` and `inf` included, affect neither results nor gradients.
"""

import torch
from torch import Tensor

# under the square root, as in Ziegler et al. (2019): a constant input gives 0 and not nan
_EPSILON = 1e-8


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum `x` where `mask` is True.

    Args:
        x: Any shape. Half precision is summed in float32.
        mask: Bool, the shape of `x`.

    Returns:
        0-d; zero for an empty mask.
    """
    assert x.shape == mask.shape, f"shapes differ: {tuple(x.shape)} and mask {tuple(mask.shape)}"
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else None
    # a product with the mask would let nan through
    return torch.where(mask, x, 0).sum(dtype=dtype)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average `x` where `mask` is True; `nan` for an empty mask. Shapes as in `masked_sum`.

    Over micro-batches or ranks, add sums and counts instead: the mean of means is not the mean.
    """
    return masked_sum(x, mask) / mask.sum()


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Compute count, sum and sum of squares of `x` where `mask` is True.

    Moments of parts (micro-batches, ranks) add up to those of all; `mean_and_variance` takes the result.

    Args:
        x: Any shape.
        mask: Bool, the shape of `x`.

    Returns:
        (3,) float64: the variance is a difference of nearly equal numbers.
    """
    x = x.double()
    return torch.stack([mask.sum().double(), masked_sum(x, mask), masked_sum(x.square(), mask)])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance (divided by the count) from `moments`.

    Args:
        moments: (3,) float64, of `moments`, or a sum of several.

    Returns:
        Two 0-d float64 tensors, `nan` where the count is zero.
    """
    count, total, squares = moments.unbind()
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)


def whiten(x: Tensor, mask: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Shift to mean 0 and scale to variance 1: `(x - mean) / sqrt(variance + 1e-8)`, and 0 outside the mask.

    Args:
        x: Any shape.
        mask: Bool, the shape of `x`.
        mean: 0-d; of advantages, over all ranks.
        variance: 0-d, over the same values.

    Returns:
        The shape and dtype of `x`.
    """
    assert x.shape == mask.shape, f"shapes differ: {tuple(x.shape)} and mask {tuple(mask.shape)}"
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + _EPSILON), 0)
