"""One score out of several reward models' (Coste et al., 2023: ensembles against over-optimisation).

The members' scores must be of one scale: models trained alike and centred on the same demonstrations.
"""

from typing import Literal, get_args

from torch import Tensor

Aggregation = Literal["mean", "minimum", "lower_bound"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def aggregate_scores(scores: Tensor, aggregation: Aggregation, num_std: float = 1.0) -> Tensor:
    """The aggregation of that name.

    Args:
        scores: (M, ...) float, the first dimension the members.
        aggregation: "mean", "minimum" or "lower_bound".
        num_std: of the lower bound; the other two read none.

    Returns:
        (...), the dtype of `scores`.
    """
    assert aggregation in AGGREGATIONS, aggregation
    if aggregation == "mean":
        return ensemble_mean(scores)
    if aggregation == "minimum":
        return ensemble_min(scores)
    return ensemble_mean_minus_std(scores, num_std)


def ensemble_mean(scores: Tensor) -> Tensor:
    """`mean_m s_m`: less noise, and no caution. Shapes as in `aggregate_scores`."""
    return scores.mean(0)


def ensemble_min(scores: Tensor) -> Tensor:
    """`min_m s_m` (worst-case optimisation): what every member grants at least. Shapes as in `aggregate_scores`."""
    return scores.amin(0)


def ensemble_mean_minus_std(scores: Tensor, num_std: float = 1.0) -> Tensor:
    """`mean_m s_m - num_std * std_m s_m`: the mean, less for what the members disagree on.

    The standard deviation is that of the members at hand (biased), so that a single member is its own lower bound.
    Coste et al. subtract the variance; a standard deviation is in units of the score.

    Args:
        scores: (M, ...) float.
        num_std: c, at least 0; 0 gives the mean.

    Returns:
        (...).
    """
    assert num_std >= 0, num_std
    return scores.mean(0) - num_std * scores.std(0, correction=0)
