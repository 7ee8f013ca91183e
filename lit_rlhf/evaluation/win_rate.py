"""Win rate of a model against a baseline, with a cluster-robust interval."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import fsum, sqrt
from statistics import NormalDist
from typing import NamedTuple

from lit_rlhf.errors import UserError

Z_95 = NormalDist().inv_cdf(0.975)  # 1.959964


class WinRate(NamedTuple):
    """Win rate with its 95 % interval."""

    rate: float  # in [0, 1], a tie counts half
    low: float  # the interval, clipped to [0, 1]
    high: float
    count: int  # type: ignore[assignment]  # comparisons; hides tuple.count


def win_rate(preferences: Sequence[float], clusters: Sequence[Hashable] | None = None) -> WinRate:
    """Return the win rate against the baseline with its interval (InstructGPT, section 3.6 and Figure 1).

    With n comparisons w_i in G clusters, the interval is the cluster-robust normal approximation:

        rate     = (1 / n) sum_i w_i
        variance = G / (G - 1) * sum_g (sum over i in g of (w_i - rate))^2 / n^2
        interval = rate +- 1.96 sqrt(variance), clipped to [0, 1]

    Verdicts on one prompt are about the same pair of responses, so they are not independent: with the prompt as
    cluster, m judges who always agree count as one. Without clusters the variance is that of a mean of independent
    comparisons, `rate (1 - rate) / (n - 1)` where there are no ties.

    Identical verdicts give an interval of width zero (a model against itself: 0.5, 0.5, 0.5). The spread of a single
    cluster is unknown, so its interval is [0, 1].

    Args:
        preferences: n verdicts: 1 = preferred to the baseline, 0.5 = tie, 0 = the baseline preferred.
        clusters: n labels, equal for comparisons of one cluster (the prompt). None: each is its own cluster.

    Raises:
        UserError: no comparison, or a verdict that is not 0, 0.5 or 1.
    """
    count = len(preferences)
    if not count:
        raise UserError("no comparisons to take a win rate of: the evaluation needs at least one prompt and one judge")
    for i, preference in enumerate(preferences):
        if preference not in (0.0, 0.5, 1.0):
            raise UserError(f"comparison {i} has preference {preference}: a judge must answer 1 (win), 0.5 (tie) or 0")
    assert clusters is None or len(clusters) == count, f"{len(clusters)} cluster labels for {count} comparisons"

    rate = fsum(preferences) / count
    residuals: dict[Hashable, float] = defaultdict(float)
    for cluster, preference in zip(range(count) if clusters is None else clusters, preferences, strict=True):
        residuals[cluster] += preference - rate
    groups = len(residuals)
    if groups == 1:
        return WinRate(rate, 0.0, 1.0, count)
    variance = groups / (groups - 1) * fsum(residual**2 for residual in residuals.values()) / count**2
    margin = Z_95 * sqrt(variance)
    return WinRate(rate, max(0.0, rate - margin), min(1.0, rate + margin), count)
