"""Metrics of a rollout, from sums over single episodes."""

import pytest
import torch

from lit_rlhf.rollout.experience import Trajectories
from lit_rlhf.rollout.metrics import compute_logprob_mismatch, compute_rollout_metrics


def make_trajectories(count: int) -> Trajectories:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(6) < torch.randint(1, 7, (count, 1), generator=generator)
    logprobs, ref_logprobs, values = torch.randn(3, count, 6, generator=generator).masked_fill(~mask, 0)
    scores = torch.randn(count, generator=generator)
    return Trajectories(
        input_ids=torch.arange(1, 7) * mask,
        attention_mask=mask.long(),
        response_mask=mask,
        old_logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores,
        finished=scores > 0,
        rollout_logprobs=logprobs,
        prompt_index=torch.arange(count),
    )


def test_metrics_by_hand():
    trajectories = make_trajectories(7)
    metrics = compute_rollout_metrics(trajectories, 0.25, trajectories.values + 1)
    kls, lengths, logprobs = [], [], []
    for row in range(7):
        mask = trajectories.response_mask[row]
        kls.append(float((trajectories.old_logprobs[row][mask] - trajectories.ref_logprobs[row][mask]).sum()))
        lengths.append(int(mask.sum()))
        logprobs += trajectories.old_logprobs[row][mask].tolist()
    scores = trajectories.scores.tolist()
    expected = {
        "reward/score": sum(scores) / 7,
        "reward/kl": sum(kls) / 7,
        "reward/kl_coefficient": 0.25,
        "reward/kl_penalized_score": sum(s - 0.25 * k for s, k in zip(scores, kls)) / 7,
        "response/length": sum(lengths) / 7,
        "response/eos_fraction": sum(score > 0 for score in scores) / 7,
        "policy/entropy_estimate": -sum(logprobs) / len(logprobs),
        "value/explained_variance": 1.0,
    }
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-5), name


def test_without_a_critic_there_is_no_explained_variance():
    assert not [name for name in compute_rollout_metrics(make_trajectories(3), 0.1, None) if name.startswith("value/")]


def test_the_mismatch_of_log_probs_covers_response_tokens_only():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, torch.nan]])
    metrics = compute_logprob_mismatch(logprobs, torch.tensor([[-1.5, -2.0], [-2.0, 7.0]]), mask)
    assert float(metrics["rollout/logprob_mismatch"]) == pytest.approx(0.5)
    assert float(metrics["rollout/logprob_mismatch_max"]) == pytest.approx(1.0)
