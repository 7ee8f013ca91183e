"""Metrics of a reward model from the scores of rankings: accuracy, calibration, length bias (InstructGPT, 3.5 and 4.1).

All are computed over untied pairs of completions; ties are only counted.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.functional import (
    correlation,
    expected_calibration_error,
    grouped_mean,
    quantile_bins,
    ranking_pairs,
    reliability_curve,
)

Metrics = dict[str, Any]
NUM_BINS = 20  # of a probability in [0, 1]; the confidence of a prediction is in the upper half
NUM_GROUPS = 6  # of margins and of length differences
MAX_POINTS = 1500  # completions in the scatter plot of score against length


class ScoredRankings(NamedTuple):
    """Scored completions, `N` in all rankings."""

    scores: Tensor  # (N,) float
    ranking_index: Tensor  # (N,) int64, the ranking that a completion belongs to, from 0
    ranks: Tensor  # (N,) int64, 0 = best; equal = tie
    length: Tensor  # (N,) int64, tokens of the completion


class UntiedPairs(NamedTuple):
    """All `n` pairs of completions that are not ties."""

    margin: Tensor  # (n,) float64, score of the better completion minus that of the worse
    correct: Tensor  # (n,) float64: 1 if the better completion scores higher, 1/2 if the scores are equal
    ranking_index: Tensor  # (n,) int64
    length_difference: Tensor  # (n,) int64, tokens of the better completion minus those of the worse


def build_untied_pairs(scored: ScoredRankings) -> UntiedPairs:
    """Return all pairs without ties."""
    better, worse, _ = ranking_pairs(scored.ranking_index, scored.ranks)
    margin = scored.scores[better].double() - scored.scores[worse].double()
    correct = (margin > 0).double() + (margin == 0).double() / 2
    length_difference = scored.length[better] - scored.length[worse]
    return UntiedPairs(margin, correct, scored.ranking_index[better], length_difference)


def compute_reward_model_metrics(scored: ScoredRankings) -> Metrics:
    """Return all metrics of the report, JSON-serializable; undefined ones (no pair, no variance) are None or absent."""
    pairs, size = build_untied_pairs(scored), torch.bincount(scored.ranking_index)
    count = len(pairs.margin)
    all_pairs = int((size * (size - 1)).sum()) // 2
    metrics: Metrics = {
        "rankings": int((size > 0).sum()),
        "completions": len(scored.scores),
        "pairs": count,
        "ties": all_pairs - count,
        "score": {
            "mean": _finite_or_none(scored.scores.double().mean()),
            "std": _finite_or_none(scored.scores.double().std(correction=0)),
        },
        "length_correlation": _finite_or_none(correlation(scored.scores, scored.length)),
        "length_correlation_within": _finite_or_none(correlation(scored.scores, scored.length, scored.ranking_index)),
        "points": _length_score_points(scored),
    }
    if not count:
        return metrics
    accuracy = win_rate(pairs.correct.tolist(), pairs.ranking_index.tolist())
    confidence = torch.sigmoid(pairs.margin.abs())
    bin_confidence, bin_accuracy, bin_count = reliability_curve(confidence, pairs.correct, NUM_BINS)
    filled = bin_count > 0
    return {
        **metrics,
        "accuracy": {"value": accuracy.rate, "low": accuracy.low, "high": accuracy.high},
        "log_loss": float(F.softplus(-pairs.margin).mean()),
        "calibration_error": float(expected_calibration_error(confidence, pairs.correct, NUM_BINS)),
        "reliability": {
            "confidence": bin_confidence[filled].tolist(),
            "accuracy": bin_accuracy[filled].tolist(),
            "count": [int(count) for count in bin_count[filled]],
        },
        "by_size": accuracy_by_size(pairs, size),
        "by_margin": accuracy_by_margin(pairs),
        "by_length": accuracy_by_length_difference(pairs),
        "longer_preferred": longer_preferred_fractions(pairs),
    }


def accuracy_by_size(pairs: UntiedPairs, size: Tensor) -> list[Metrics]:
    """Return accuracy and number of pairs for each K.

    Args:
        pairs: the untied pairs.
        size: (G,) int64, K of each ranking.
    """
    pair_size = size[pairs.ranking_index]
    accuracy, count = grouped_mean(pairs.correct, pair_size, int(size.max()) + 1)
    return [{"K": K, "pairs": int(count[K]), "accuracy": float(accuracy[K])} for K in torch.unique(pair_size).tolist()]


def accuracy_by_margin(pairs: UntiedPairs) -> list[Metrics]:
    """Return accuracy and mean confidence by quantile groups of the absolute margin |Δ|."""
    margin = pairs.margin.abs()
    rows = _accuracy_by_group(margin, pairs)
    confidence = grouped_mean(torch.sigmoid(margin), quantile_bins(margin, NUM_GROUPS)[0], len(rows))[0]
    return [{**row, "confidence": float(value)} for row, value in zip(rows, confidence)]


def accuracy_by_length_difference(pairs: UntiedPairs) -> list[Metrics]:
    """Return accuracy by quantile groups of the length difference, better minus worse, in tokens."""
    return _accuracy_by_group(pairs.length_difference.double(), pairs)


def longer_preferred_fractions(pairs: UntiedPairs) -> dict[str, float | None]:
    """Return how often the labelers and the model prefer the longer completion, over pairs of unequal length."""
    unequal = pairs.length_difference != 0
    if not unequal.any():
        return {"labelers": None, "model": None}
    by_labelers = (pairs.length_difference[unequal] > 0).double()
    correct = pairs.correct[unequal]
    by_model = torch.where(by_labelers > 0, correct, 1 - correct)
    return {"labelers": float(by_labelers.mean()), "model": float(by_model.mean())}


def degenerate_win_rates(best: Tensor, degenerate: dict[str, Tensor]) -> list[Metrics]:
    """Return how often each kind of degenerate answer outscores the best real one, and its mean score gap to it.

    Args:
        best: (P,) scores of the best completion of each prompt.
        degenerate: kind -> (P,) scores of that answer to the same prompt, `nan` if it is the best completion itself.
    """
    rows = []
    for kind, scores in degenerate.items():
        known = ~scores.isnan()
        gap = best.double()[known] - scores.double()[known]
        if len(gap):
            wins = (gap < 0).double() + (gap == 0).double() / 2
            rows.append({"kind": kind, "prompts": len(gap), "outscores": float(wins.mean()), "gap": float(gap.mean())})
    return rows


def _accuracy_by_group(values: Tensor, pairs: UntiedPairs) -> list[Metrics]:
    group, edges = quantile_bins(values, NUM_GROUPS)
    accuracy, count = grouped_mean(pairs.correct, group, len(edges))
    rows = []
    for index in range(len(edges)):
        members = values[group == index]
        limits = {"low": float(members.min()), "high": float(members.max())}
        rows.append({**limits, "pairs": int(count[index]), "accuracy": float(accuracy[index])})
    return rows


def _length_score_points(scored: ScoredRankings) -> list[list[float]]:
    """Return [length, score] of at most `MAX_POINTS` completions, evenly spaced."""
    step = max(1, math.ceil(len(scored.scores) / MAX_POINTS))
    rounded = [round(score, 4) for score in scored.scores[::step].tolist()]
    return [[length, score] for length, score in zip(scored.length[::step].tolist(), rounded)]


def _finite_or_none(value: Tensor) -> float | None:
    """Return a 0-d tensor as a float; None if it is not finite."""
    return float(value) if bool(torch.isfinite(value)) else None


def summarize_metrics(metrics: Metrics) -> dict[str, float | None]:
    """Return the metrics that are plotted over training."""
    worst: Sequence[float] = [row["outscores"] for row in metrics.get("degenerate", [])]
    return {
        "accuracy": metrics.get("accuracy", {}).get("value"),
        "log_loss": metrics.get("log_loss"),
        "calibration_error": metrics.get("calibration_error"),
        "length_correlation_within": metrics["length_correlation_within"],
        "degenerate": max(worst) if worst else None,
    }
