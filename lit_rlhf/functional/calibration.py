"""Calibration: whether predicted probabilities match observed frequencies."""

import torch
from torch import Tensor


def reliability_curve(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Compute predicted and observed frequency in bins of equal width.

    Bin i holds the probabilities in [i / bins, (i + 1) / bins); the last one holds 1 too.

    Args:
        probabilities: (n,), in [0, 1].
        outcomes: (n,) bool, or numbers in [0, 1].
        bins: At least 1.

    Returns:
        Mean probability, mean outcome and count of each bin, (bins,) float64. Both means are `nan` in an empty bin.
    """
    assert probabilities.shape == outcomes.shape and probabilities.ndim == 1 and bins >= 1
    probabilities, outcomes = probabilities.double(), outcomes.double()
    assert ((probabilities >= 0) & (probabilities <= 1)).all(), "a probability lies outside [0, 1]"
    index = (probabilities * bins).long().clamp_max(bins - 1)
    count, confidence, accuracy = (
        torch.zeros(bins, dtype=torch.float64, device=index.device).index_add(0, index, source)
        for source in (torch.ones_like(probabilities), probabilities, outcomes)
    )
    return confidence / count, accuracy / count, count


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor, bins: int = 10) -> Tensor:
    """Mean distance between stated and observed frequency (Guo et al., 2017, Eq. 3).

    `sum over bins of count / n * |mean outcome - mean probability|`. For comparisons, take one direction of each pair
    by a rule that is blind to the labeler (the order of the rows, say): with the better completion always first every
    outcome would be 1.

    Args:
        probabilities: (n,), in [0, 1].
        outcomes: (n,) bool, or numbers in [0, 1].
        bins: At least 1.

    Returns:
        0-d float64 in [0, 1]; `nan` without any outcome.
    """
    confidence, accuracy, count = reliability_curve(probabilities, outcomes, bins)
    gap = torch.where(count > 0, (accuracy - confidence).abs(), 0)
    return (count * gap).sum() / count.sum()
