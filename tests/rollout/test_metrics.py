"""Metrics of a rollout, from sums over single episodes."""

import pytest
import torch

from lit_rlhf.rollout.experience import Trajectories
from lit_rlhf.rollout.metrics import (
    MAX_VALUES,
    compute_logprob_mismatch,
    compute_rollout_metrics,
    mean_scores_by_column,
    sum_scores_by_column,
)


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
    prompts = torch.tensor([[1, 1]] * 6 + [[0, 1]])
    trajectories = trajectories._replace(
        input_ids=torch.cat([prompts, trajectories.input_ids], 1),
        attention_mask=torch.cat([prompts, trajectories.attention_mask], 1),
    )
    advantages = torch.arange(42.0).view(7, 6) - 20
    metrics = compute_rollout_metrics(trajectories, 0.25, advantages, trajectories.values + 1)
    kls, lengths, logprobs = [], [], []
    for row in range(7):
        mask = trajectories.response_mask[row]
        kls.append(float((trajectories.old_logprobs[row][mask] - trajectories.ref_logprobs[row][mask]).sum()))
        lengths.append(int(mask.sum()))
        logprobs += trajectories.old_logprobs[row][mask].tolist()
    scores = trajectories.scores.tolist()
    kept = [a for a, used in zip(advantages.flatten().tolist(), trajectories.response_mask.flatten()) if used]
    assert kept[-1] < 21, "the largest one is padding, so that a maximum over all of them would show"
    expected = {
        "reward/score": sum(scores) / 7,
        "reward/score_min": min(scores),
        "reward/score_max": max(scores),
        "advantage/min": kept[0],
        "advantage/max": kept[-1],
        "prompt/length": 13 / 7,
        "prompt/length_max": 2,
        "response/length_max": max(lengths),
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
    trajectories = make_trajectories(3)
    metrics = compute_rollout_metrics(trajectories, 0.1, trajectories.values, None)
    assert not [name for name in metrics if name.startswith("value/")]


def test_scores_by_a_column_are_means_over_ranks():
    first = sum_scores_by_column(
        [{"task": "sum up"}, {"task": "sum up"}, {"task": "chat", "user": "x"}], [1.0, 2.0, 4.0]
    )
    second = sum_scores_by_column([{"task": "chat"}, {"task": None}, {}], [5.0, 100.0, 100.0])
    assert mean_scores_by_column([first, second]) == {
        "reward/score_by_task/sum_up": 1.5,
        "reward/score_by_task/chat": 4.5,
    }


def test_a_column_of_many_values_is_left_out():
    rows = [{"source": f"page {n}", "task": n % 2} for n in range(MAX_VALUES + 1)]
    means = mean_scores_by_column([sum_scores_by_column(rows, [1.0] * len(rows))])
    assert means == {"reward/score_by_task/0": 1.0, "reward/score_by_task/1": 1.0}
    assert len(mean_scores_by_column([sum_scores_by_column(rows[1:], [1.0] * MAX_VALUES)])) == MAX_VALUES + 2


def test_the_mismatch_of_log_probs_covers_response_tokens_only():
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, torch.nan]])
    metrics = compute_logprob_mismatch(logprobs, torch.tensor([[-1.5, -2.0], [-2.0, 7.0]]), mask)
    assert float(metrics["rollout/logprob_mismatch"]) == pytest.approx(0.5)
    assert float(metrics["rollout/logprob_mismatch_max"]) == pytest.approx(1.0)
