"""Means and correlations per group: accuracy by margin, by length, by size of a ranking."""

import torch
from torch import Tensor


def grouped_mean(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Compute the mean of each group.

    Args:
        values: (n,).
        group: (n,) int64, 0 .. groups - 1.
        groups: Number of groups.

    Returns:
        Mean and count of each group, (groups,) float64 each; the mean of an empty group is `nan`.
    """
    assert values.shape == group.shape and values.ndim == 1
    count, total = (
        torch.zeros(groups, dtype=torch.float64, device=values.device).index_add(0, group, source)
        for source in (torch.ones_like(values, dtype=torch.float64), values.double())
    )
    return total / count, count


def quantile_bins(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Bin values by their quantiles. Equal values share a bin, so there may be fewer bins than asked for.

    Args:
        values: (n,), at least one.
        groups: Most bins, at least 1.

    Returns:
        The bin of each value, (n,) int64 from 0 on, and the lower edge of each bin, (bins,) float64.
    """
    assert values.ndim == 1 and len(values) and groups >= 1
    ordered = values.double().sort().values
    starts = torch.arange(groups, device=values.device) * len(values) // groups
    edges = torch.unique(ordered[starts])
    return torch.bucketize(values.double(), edges, right=True) - 1, edges


def correlation(x: Tensor, y: Tensor, group: Tensor | None = None) -> Tensor:
    """Compute Pearson's correlation, over all points or within groups.

    Within groups, of differences from the group mean: with rankings as groups, the correlation of scores and lengths
    says whether the longer of two responses to the same prompt scores higher, whatever differs between prompts.

    Args:
        x: (n,).
        y: (n,).
        group: (n,) int64 from 0 on; None takes all points as one group.

    Returns:
        0-d float64 in [-1, 1]; `nan` where `x` or `y` does not vary.
    """
    assert x.shape == y.shape and x.ndim == 1
    group = torch.zeros(len(x), dtype=torch.int64, device=x.device) if group is None else group
    groups = int(group.max()) + 1 if len(group) else 0
    x, y = (_differences(each.double(), group, groups) for each in (x, y))
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def _differences(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """Subtract each group's mean; a difference that is rounding alone becomes 0."""
    difference = x - grouped_mean(x, group, groups)[0][group]
    return difference.masked_fill(difference.abs() <= 1e-12 * x.abs().max(), 0.0)
