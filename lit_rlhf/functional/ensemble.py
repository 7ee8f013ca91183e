"""Aggregate the scores of several reward models (Coste et al., 2023: ensembles against overoptimization).

The members must score on one scale: trained with the same settings and centered on the same demonstrations.
"""

from typing import Literal, get_args

from torch import Tensor

Aggregation = Literal["mean", "min", "mean_minus_std"]
"""How the scores of an ensemble become one: see `aggregate_scores`."""
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
"""Every `Aggregation`, by name."""


def aggregate_scores(scores: Tensor, aggregation: Aggregation, num_std: float = 1.0) -> Tensor:
    """Aggregate over members by name.

    Args:
        scores: (M, ...) float, one entry of the first dimension per member.
        aggregation: "mean", "min" or "mean_minus_std".
        num_std: Used by "mean_minus_std" only.

    Returns:
        (...), the dtype of `scores`.
    """
    assert aggregation in AGGREGATIONS, aggregation
    if aggregation == "mean":
        return ensemble_mean(scores)
    if aggregation == "min":
        return ensemble_min(scores)
    return ensemble_mean_minus_std(scores, num_std)


def ensemble_mean(scores: Tensor) -> Tensor:
    """Compute `mean_m s_m`. Shapes as in `aggregate_scores`."""
    return scores.mean(0)


def ensemble_min(scores: Tensor) -> Tensor:
    """Compute `min_m s_m` (worst-case optimization). Shapes as in `aggregate_scores`."""
    return scores.amin(0)


def ensemble_mean_minus_std(scores: Tensor, num_std: float = 1.0) -> Tensor:
    """Compute `mean_m s_m - num_std * std_m s_m`: the mean, penalized where members disagree.

    The standard deviation is the biased one, 0 for a single member. Coste et al. subtract the variance instead; a
    standard deviation is in units of the score.

    Args:
        scores: (M, ...) float.
        num_std: At least 0; 0 gives the mean.

    Returns:
        (...).
    """
    assert num_std >= 0, num_std
    return scores.mean(0) - num_std * scores.std(0, correction=0)
