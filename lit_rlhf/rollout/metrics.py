"""Metrics of a rollout (docs/metrics.md). Shapes: `B` episodes, `R` response."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional import explained_variance, k1, k2, k3, masked_mean, repeated_ngram_fraction
from lit_rlhf.rollout.experience import Trajectories

SCORE_COLUMNS = ("task", "source")  # of the dataset
MAX_VALUES = 20


def compute_rollout_metrics(
    trajectories: Trajectories, kl_coefficient: float, advantages: Tensor, returns: Tensor | None
) -> dict[str, Tensor]:
    """Return the metrics of a rollout over all episodes of all ranks, () each.

    Args:
        trajectories: all episodes.
        kl_coefficient: β of the iteration.
        advantages: (B, R) float32.
        returns: (B, R) float32; None without a critic.
    """
    mask, pair = trajectories.response_mask, (trajectories.old_logprobs, trajectories.ref_logprobs)
    kl, kl_k2, kl_k3 = (torch.where(mask, each(*pair), 0).sum(1) for each in (k1, k2, k3))  # (B,) nats per response
    lengths, prompt_lengths = mask.sum(1), trajectories.attention_mask[:, : -mask.shape[1]].sum(1)
    metrics = {
        "reward/score": trajectories.scores.mean(),
        "reward/score_std": trajectories.scores.std(),
        "reward/score_min": trajectories.scores.min(),
        "reward/score_max": trajectories.scores.max(),
        "reward/kl": kl.mean(),
        "reward/kl_k2": kl_k2.mean(),
        "reward/kl_k3": kl_k3.mean(),
        "reward/kl_coefficient": torch.tensor(kl_coefficient),
        "reward/kl_penalized_score": (trajectories.scores - kl_coefficient * kl).mean(),
        "advantage/min": advantages.masked_fill(~mask, torch.inf).min(),
        "advantage/max": advantages.masked_fill(~mask, -torch.inf).max(),
        "prompt/length": prompt_lengths.float().mean(),
        "prompt/length_max": prompt_lengths.max().float(),
        "response/length": lengths.float().mean(),
        "response/length_max": lengths.max().float(),
        "response/eos_fraction": trajectories.finished.float().mean(),
        "response/repeated_trigram_fraction": repeated_ngram_fraction(
            trajectories.input_ids[:, -mask.shape[1] :], mask
        ).mean(),
        "policy/entropy_estimate": -masked_mean(trajectories.old_logprobs, mask),
    }
    if returns is not None:
        metrics["value/explained_variance"] = explained_variance(trajectories.values, returns, mask).float()
    return metrics


def sum_scores_by_column(rows: Sequence[Mapping[str, Any]], scores: Sequence[float]) -> dict[str, list[float]]:
    """Return sum and count of the scores for every value of the columns `SCORE_COLUMNS` that the rows have.

    Args:
        rows: the dataset row of each episode.
        scores: of each episode.
    """
    sums: dict[str, list[float]] = {}
    for row, score in zip(rows, scores, strict=True):
        for column in SCORE_COLUMNS:
            if isinstance(row.get(column), str | int):
                name = "/".join(["reward", f"score_by_{column}", re.sub(r"[^\w.-]+", "_", str(row[column]))])
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0], pair[1] = pair[0] + score, pair[1] + 1
    return sums


def mean_scores_by_column(sums_of_ranks: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return the mean scores from what `sum_scores_by_column` returned on each rank.

    A column with more than `MAX_VALUES` values is left out: it tells rows apart, and not kinds of rows.
    """
    totals: dict[str, list[float]] = {}
    for sums in sums_of_ranks:
        for name, (total, count) in sums.items():
            pair = totals.setdefault(name, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + total, pair[1] + count
    num_values = Counter(name.rpartition("/")[0] for name in totals)
    return {
        name: total / count
        for name, (total, count) in sorted(totals.items())
        if num_values[name.rpartition("/")[0]] <= MAX_VALUES
    }


def compute_logprob_mismatch(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how far log-probs of a forward pass are from those at sampling, all (B, R), in nats per token."""
    mismatch = torch.where(mask, logprobs - rollout_logprobs, 0).abs()
    return {"rollout/logprob_mismatch": masked_mean(mismatch, mask), "rollout/logprob_mismatch_max": mismatch.max()}


def compute_importance_metrics(weights: Tensor, mask: Tensor, cap: float) -> dict[str, Tensor]:
    """Return mean and truncated fraction of the importance weights of actions, all (B, R)."""
    return {
        "rollout/importance_weight": masked_mean(weights, mask),
        "rollout/importance_capped_fraction": masked_mean((weights >= cap).float(), mask),
    }
