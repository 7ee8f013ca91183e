"""Metrics of a rollout (docs/metrics.md). Shapes: `B` episodes, `R` response."""

import torch
from torch import Tensor

from lit_rlhf.functional import explained_variance, k1, k2, k3, masked_mean, repeated_ngram_fraction
from lit_rlhf.rollout.experience import Trajectories


def compute_rollout_metrics(
    trajectories: Trajectories, kl_coefficient: float, returns: Tensor | None
) -> dict[str, Tensor]:
    """Return the metrics of a rollout over all episodes of all ranks, () each.

    Args:
        trajectories: all episodes.
        kl_coefficient: β of the iteration.
        returns: (B, R) float32; None without a critic.
    """
    mask, pair = trajectories.response_mask, (trajectories.old_logprobs, trajectories.ref_logprobs)
    kl, kl_k2, kl_k3 = (torch.where(mask, each(*pair), 0).sum(1) for each in (k1, k2, k3))  # (B,) nats per response
    metrics = {
        "reward/score": trajectories.scores.mean(),
        "reward/score_std": trajectories.scores.std(),
        "reward/kl": kl.mean(),
        "reward/kl_k2": kl_k2.mean(),
        "reward/kl_k3": kl_k3.mean(),
        "reward/kl_coefficient": torch.tensor(kl_coefficient),
        "reward/kl_penalized_score": (trajectories.scores - kl_coefficient * kl).mean(),
        "response/length": mask.sum(1).float().mean(),
        "response/eos_fraction": trajectories.finished.float().mean(),
        "response/repeated_trigram_fraction": repeated_ngram_fraction(
            trajectories.input_ids[:, -mask.shape[1] :], mask
        ).mean(),
        "policy/entropy_estimate": -masked_mean(trajectories.old_logprobs, mask),
    }
    if returns is not None:
        metrics["value/explained_variance"] = explained_variance(trajectories.values, returns, mask).float()
    return metrics


def compute_logprob_mismatch(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how far log-probs of a forward pass are from those at sampling, all (B, R), in nats per token."""
    mismatch = torch.where(mask, logprobs - rollout_logprobs, 0).abs()
    return {"rollout/logprob_mismatch": masked_mean(mismatch, mask), "rollout/logprob_mismatch_max": mismatch.max()}
