"""Advantage estimators on trajectories: what reaches them, and what an update gets."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.advantages import GAE, GRPOAdvantage, RLOOAdvantage, check_group_size, compute_rewards
from lit_rlhf.rollout.experience import Trajectories

LENGTHS = [3, 1, 4, 2]
BETA = 0.1


def trajectories(group: list[int] | None = None) -> Trajectories:
    """Four responses of 1 to 4 tokens, with anything outside the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    logprobs, reference, values = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    scores = torch.randn(4, dtype=torch.float64, generator=generator)
    ids, ended = torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    return Trajectories(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        response_mask=mask,
        old_logprobs=logprobs.masked_fill(~mask, torch.nan),
        ref_logprobs=reference,
        values=values,
        scores=scores,
        finished=ended,
        rollout_logprobs=logprobs,
        prompt_index=torch.tensor(group or [0, 1, 0, 1]),
    )


def totals(batch: Trajectories) -> list[float]:
    """Score less β times the KL of the response, one response at a time."""
    kl = [math.fsum((p - r)[:length].tolist()) for p, r, length in zip(batch.old_logprobs, batch.ref_logprobs, LENGTHS)]
    return [score - BETA * each for score, each in zip(batch.scores.tolist(), kl)]


def on_every_token(values: list[float]) -> Tensor:
    rows = [[value] * length + [0.0] * (4 - length) for value, length in zip(values, LENGTHS)]
    return torch.tensor(rows, dtype=torch.float64)


def test_rewards_are_the_penalty_on_every_token_and_the_score_on_the_last():
    batch = trajectories()
    rewards = compute_rewards(batch, BETA)
    for row, length in enumerate(LENGTHS):
        expected = [-BETA * float(batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]) for t in range(length)]
        expected[-1] += float(batch.scores[row])
        assert_close(rewards[row], torch.tensor([*expected, *[0.0] * (4 - length)], dtype=torch.float64))


def test_gae_whitens_advantages_over_all_tokens_and_leaves_returns():
    batch, gamma, lam = trajectories(), 0.9, 0.8
    advantages, returns = GAE(gamma, lam).estimate(compute_rewards(batch, BETA), batch)
    raw, targets = [], []
    for row, length in enumerate(LENGTHS):
        rewards, values = compute_rewards(batch, BETA)[row].tolist(), [*batch.values[row, :length].tolist(), 0.0]
        errors = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        row_raw = [math.fsum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length)) for t in range(length)]
        raw += row_raw
        targets += [a + v for a, v in zip(row_raw, values)]
    mean = math.fsum(raw) / len(raw)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in raw) / len(raw) + 1e-8)
    mask = batch.response_mask
    assert_close(advantages[mask], torch.tensor([(a - mean) / deviation for a in raw], dtype=torch.float64))
    assert_close(returns[mask], torch.tensor(targets, dtype=torch.float64))
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_leave_one_out_compares_totals_after_the_kl_penalty():
    batch = trajectories()
    advantages, returns = RLOOAdvantage().estimate(compute_rewards(batch, BETA), batch)
    one, two, three, four = totals(batch)
    assert_close(advantages, on_every_token([one - three, two - four, three - one, four - two]))
    assert returns is None


def test_group_relative_divides_by_the_groups_own_deviation():
    batch = trajectories([5, 5, 5, 5])
    advantages, returns = GRPOAdvantage().estimate(compute_rewards(batch, BETA), batch)
    all_of_them = totals(batch)
    mean = math.fsum(all_of_them) / 4
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in all_of_them) / 4 + 1e-8)
    assert_close(advantages, on_every_token([(each - mean) / deviation for each in all_of_them]))
    assert returns is None


def test_senseless_settings_are_refused():
    with pytest.raises(UserError, match=r"advantages: discount must lie in \[0, 1\], got 1.01"):
        GAE(discount=1.01)
    with pytest.raises(UserError, match=r"advantages: gae_lambda must lie in \[0, 1\], got -0.1"):
        GAE(gae_lambda=-0.1)
    check_group_size(GAE(), 1)
    check_group_size(RLOOAdvantage(), 2)
    for estimator in (RLOOAdvantage(), GRPOAdvantage()):
        with pytest.raises(UserError, match=r"at least 2 of them; set model\.ppo\.samples_per_prompt \(it is 1\)"):
            check_group_size(estimator, 1)
