"""What a reward model is worth beyond its accuracy, from the scores of rankings (InstructGPT, sections 3.5 and 4.1).

Everything is about pairs of completions that a labeler told apart; ties are counted beside them.
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
NUM_BINS = 20  # of a stated probability in [0, 1]; the surer side of a pair fills the upper half
NUM_GROUPS = 6  # of margins and of differences in length
MAX_POINTS = 1500  # completions in the plot of score against length


class ScoredRankings(NamedTuple):
    """Completions with their scores; `N` of all rankings."""

    scores: Tensor  # (N,) float
    ranking: Tensor  # (N,) int64, from 0 on
    ranks: Tensor  # (N,) int64, 0 = best; equal = tie
    length: Tensor  # (N,) int64, tokens of the completion


class UntiedPairs(NamedTuple):
    """The pairs that labelers told apart, `n` of them."""

    margin: Tensor  # (n,) float64, score of the better less that of the worse
    correct: Tensor  # (n,) float64: 1 where the better scores higher, 1/2 where they score alike
    ranking: Tensor  # (n,) int64
    length_difference: Tensor  # (n,) int64, tokens by which the better is longer


def build_untied_pairs(scored: ScoredRankings) -> UntiedPairs:
    """Return all pairs without ties."""
    better, worse, _ = ranking_pairs(scored.ranking, scored.ranks)
    margin = scored.scores[better].double() - scored.scores[worse].double()
    right = (margin > 0).double() + (margin == 0).double() / 2
    return UntiedPairs(margin, right, scored.ranking[better], scored.length[better] - scored.length[worse])


def compute_reward_model_metrics(scored: ScoredRankings) -> Metrics:
    """Return every figure of the report, JSON-ready; what cannot be told (no pair, no spread) is None or left empty."""
    pairs, size = build_untied_pairs(scored), torch.bincount(scored.ranking)
    count = len(pairs.margin)
    all_pairs = int((size * (size - 1)).sum()) // 2
    shared: Metrics = {
        "rankings": int((size > 0).sum()),
        "completions": len(scored.scores),
        "pairs": count,
        "ties": all_pairs - count,
        "score": {
            "mean": _finite_or_none(scored.scores.double().mean()),
            "std": _finite_or_none(scored.scores.double().std(correction=0)),
        },
        "length_correlation": _finite_or_none(correlation(scored.scores, scored.length)),
        "length_correlation_within": _finite_or_none(correlation(scored.scores, scored.length, scored.ranking)),
        "points": _length_score_points(scored),
    }
    if not count:
        return shared
    accuracy = win_rate(pairs.correct.tolist(), pairs.ranking.tolist())
    surer = torch.sigmoid(pairs.margin.abs())
    confidence, met, filled = reliability_curve(surer, pairs.correct, NUM_BINS)
    full = filled > 0
    return {
        **shared,
        "accuracy": {"value": accuracy.rate, "low": accuracy.low, "high": accuracy.high},
        "log_loss": float(F.softplus(-pairs.margin).mean()),
        "calibration_error": float(expected_calibration_error(surer, pairs.correct, NUM_BINS)),
        "reliability": {
            "confidence": confidence[full].tolist(),
            "accuracy": met[full].tolist(),
            "count": [int(each) for each in filled[full]],
        },
        "by_size": accuracy_by_size(pairs, size),
        "by_margin": accuracy_by_margin(pairs),
        "by_length": accuracy_by_length_difference(pairs),
        "longer_preferred": longer_preferred_fractions(pairs),
    }


def accuracy_by_size(pairs: UntiedPairs, size: Tensor) -> list[Metrics]:
    """Return accuracy and pairs for each K.

    Args:
        pairs: the pairs.
        size: K of each ranking.
    """
    own = size[pairs.ranking]
    accuracy, count = grouped_mean(pairs.correct, own, int(size.max()) + 1)
    return [{"K": K, "pairs": int(count[K]), "accuracy": float(accuracy[K])} for K in torch.unique(own).tolist()]


def accuracy_by_margin(pairs: UntiedPairs) -> list[Metrics]:
    """Return accuracy, and the mean stated probability of being right, by groups of |Δ| of equal size."""
    margin = pairs.margin.abs()
    rows = _accuracy_by_group(margin, pairs)
    stated = grouped_mean(torch.sigmoid(margin), quantile_bins(margin, NUM_GROUPS)[0], len(rows))[0]
    return [{**row, "stated": float(share)} for row, share in zip(rows, stated)]


def accuracy_by_length_difference(pairs: UntiedPairs) -> list[Metrics]:
    """Return accuracy by groups of how many tokens the better completion is longer (negative: shorter)."""
    return _accuracy_by_group(pairs.length_difference.double(), pairs)


def longer_preferred_fractions(pairs: UntiedPairs) -> dict[str, float | None]:
    """Return how often labelers, and how often the model, prefer the longer of two completions of unequal length."""
    unequal = pairs.length_difference != 0
    if not unequal.any():
        return {"labelers": None, "model": None}
    by_labelers = (pairs.length_difference[unequal] > 0).double()
    right = pairs.correct[unequal]
    by_model = torch.where(by_labelers > 0, right, 1 - right)
    return {"labelers": float(by_labelers.mean()), "model": float(by_model.mean())}


def degenerate_win_rates(best: Tensor, degenerate: dict[str, Tensor]) -> list[Metrics]:
    """Return for each kind of degenerate answer how often it outscores the real best one, and by how much it loses.

    Args:
        best: (P,) score of the best completion of each prompt.
        degenerate: kind -> (P,) score of that answer to the same prompt, `nan` where it is the best one itself.
    """
    rows = []
    for kind, scores in degenerate.items():
        told = ~scores.isnan()
        gap = best.double()[told] - scores.double()[told]
        if len(gap):
            share = (gap < 0).double() + (gap == 0).double() / 2
            rows.append({"kind": kind, "prompts": len(gap), "outscores": float(share.mean()), "gap": float(gap.mean())})
    return rows


def _accuracy_by_group(values: Tensor, pairs: UntiedPairs) -> list[Metrics]:
    group, edges = quantile_bins(values, NUM_GROUPS)
    accuracy, count = grouped_mean(pairs.correct, group, len(edges))
    rows = []
    for place in range(len(edges)):
        own = values[group == place]
        ends = {"low": float(own.min()), "high": float(own.max())}
        rows.append({**ends, "pairs": int(count[place]), "accuracy": float(accuracy[place])})
    return rows


def _length_score_points(scored: ScoredRankings) -> list[list[float]]:
    """Every completion, or every so many of them, as [length, score]."""
    step = max(1, math.ceil(len(scored.scores) / MAX_POINTS))
    rounded = [round(score, 4) for score in scored.scores[::step].tolist()]
    return [[length, score] for length, score in zip(scored.length[::step].tolist(), rounded)]


def _finite_or_none(value: Tensor) -> float | None:
    """A 0-d tensor as JSON has it."""
    return float(value) if bool(torch.isfinite(value)) else None


def summarize_metrics(metrics: Metrics) -> dict[str, float | None]:
    """Return the numbers that are plotted over training."""
    worst: Sequence[float] = [row["outscores"] for row in metrics.get("degenerate", [])]
    return {
        "accuracy": metrics.get("accuracy", {}).get("value"),
        "log_loss": metrics.get("log_loss"),
        "calibration_error": metrics.get("calibration_error"),
        "length_correlation_within": metrics["length_correlation_within"],
        "degenerate": max(worst) if worst else None,
    }
