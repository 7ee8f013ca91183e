"""Advantage estimators on trajectories, against the definitions in plain Python."""

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


def make_trajectories(prompt_index: list[int] | None = None) -> Trajectories:
    """Return four responses of 1 to 4 tokens, with arbitrary values outside the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < torch.tensor(LENGTHS)[:, None]
    logprobs, ref_logprobs, values = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    scores = torch.randn(4, dtype=torch.float64, generator=generator)
    ids, finished = torch.zeros(4, 6, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    return Trajectories(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        response_mask=mask,
        old_logprobs=logprobs.masked_fill(~mask, torch.nan),
        ref_logprobs=ref_logprobs,
        values=values,
        scores=scores,
        finished=finished,
        rollout_logprobs=logprobs,
        prompt_index=torch.tensor(prompt_index or [0, 1, 0, 1]),
    )


def compute_total_rewards(batch: Trajectories) -> list[float]:
    """Return score minus β times the KL per response, one response at a time."""
    kl = [math.fsum((p - r)[:length].tolist()) for p, r, length in zip(batch.old_logprobs, batch.ref_logprobs, LENGTHS)]
    return [score - BETA * each for score, each in zip(batch.scores.tolist(), kl)]


def broadcast_to_tokens(values: list[float]) -> Tensor:
    rows = [[value] * length + [0.0] * (4 - length) for value, length in zip(values, LENGTHS)]
    return torch.tensor(rows, dtype=torch.float64)


def test_rewards_are_the_kl_penalty_of_every_token_and_the_score_on_the_last():
    batch = make_trajectories()
    rewards = compute_rewards(batch, BETA)
    for row, length in enumerate(LENGTHS):
        expected = [-BETA * float(batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]) for t in range(length)]
        expected[-1] += float(batch.scores[row])
        assert_close(rewards[row], torch.tensor([*expected, *[0.0] * (4 - length)], dtype=torch.float64))


def test_gae_whitens_advantages_over_all_tokens_and_not_returns():
    batch, gamma, lam = make_trajectories(), 0.9, 0.8
    advantages, returns = GAE(gamma, lam).estimate(compute_rewards(batch, BETA), batch)
    raw, targets = [], []
    for row, length in enumerate(LENGTHS):
        rewards, values = compute_rewards(batch, BETA)[row].tolist(), [*batch.values[row, :length].tolist(), 0.0]
        errors = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(length)]
        row_raw = [math.fsum((gamma * lam) ** (k - t) * errors[k] for k in range(t, length)) for t in range(length)]
        raw += row_raw
        targets += [a + v for a, v in zip(row_raw, values)]
    mean = math.fsum(raw) / len(raw)
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in raw) / len(raw) + 1e-8)
    mask = batch.response_mask
    assert_close(advantages[mask], torch.tensor([(a - mean) / std for a in raw], dtype=torch.float64))
    assert_close(returns[mask], torch.tensor(targets, dtype=torch.float64))
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_rloo_compares_total_rewards_after_the_kl_penalty():
    batch = make_trajectories()
    advantages, returns = RLOOAdvantage().estimate(compute_rewards(batch, BETA), batch)
    r0, r1, r2, r3 = compute_total_rewards(batch)
    assert_close(advantages, broadcast_to_tokens([r0 - r2, r1 - r3, r2 - r0, r3 - r1]))
    assert returns is None


def test_grpo_divides_scores_by_their_standard_deviation_and_subtracts_the_kl_penalty():
    batch = make_trajectories([5, 5, 5, 5])
    advantages, returns = GRPOAdvantage().estimate(compute_rewards(batch, BETA), batch)
    scores = batch.scores.tolist()
    penalties = [score - total for score, total in zip(scores, compute_total_rewards(batch))]
    mean, mean_penalty = math.fsum(scores) / 4, math.fsum(penalties) / 4
    std = math.sqrt(math.fsum((each - mean) ** 2 for each in scores) / 4)
    expected = [(score - mean) / std - (penalty - mean_penalty) for score, penalty in zip(scores, penalties)]
    assert_close(advantages, broadcast_to_tokens(expected))
    assert returns is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.0, 1e-7, 2.0])
def test_grpo_does_not_scale_up_the_rounding_of_log_probs(spread, dtype):
    """At the first step the policy is its reference, and their log-probs differ by rounding alone."""
    batch = make_trajectories([5, 5, 5, 5])
    exact = batch.ref_logprobs - 5
    rounded = exact.to(dtype) if dtype is torch.bfloat16 else exact.float() * (1 + 1e-7)
    scores = 1 + spread * torch.arange(4.0)
    batch = batch._replace(old_logprobs=rounded.float(), ref_logprobs=exact.float(), scores=scores)
    advantages, _ = GRPOAdvantage().estimate(compute_rewards(batch, 0.02), batch)
    if spread < 1e-3:
        assert not advantages.any()
    else:
        expected = broadcast_to_tokens(((scores - scores.mean()) / scores.std(correction=0)).tolist())
        assert_close(advantages.double(), expected, atol=2e-3, rtol=0)


def test_invalid_settings_are_refused():
    with pytest.raises(UserError, match=r"advantages: discount must lie in \[0, 1\], got 1.01"):
        GAE(discount=1.01)
    with pytest.raises(UserError, match=r"advantages: gae_lambda must lie in \[0, 1\], got -0.1"):
        GAE(gae_lambda=-0.1)
    check_group_size(GAE(), 1)
    check_group_size(RLOOAdvantage(), 2)
    for estimator in (RLOOAdvantage(), GRPOAdvantage()):
        with pytest.raises(UserError, match=r"at least 2 of them; set model\.ppo\.samples_per_prompt \(it is 1\)"):
            check_group_size(estimator, 1)


def test_gae_by_hand():
    """Two episodes of 2 and 1 tokens, β 0.1, γ 1, λ 0.5."""
    mask = torch.tensor([[True, True], [True, False]])
    logprobs = torch.tensor([[-1.0, -2.0], [-0.5, 9.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0], [-0.5, -9.0]])
    values = torch.tensor([[0.2, 0.4], [0.1, 7.0]])
    trajectories = Trajectories(
        torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3), mask, logprobs, ref_logprobs, values,
        torch.tensor([1.0, -1.0]), torch.tensor([True, True]), logprobs, torch.arange(2),
    )  # fmt: skip
    advantages, returns = GAE(1.0, 0.5).estimate(compute_rewards(trajectories, 0.1), trajectories)
    assert returns is not None
    # rewards: -0.1 x 0.5 and -0.1 x -1 + 1 for the first episode, 0 - 1 for the second
    second = 1.1 - 0.4
    first = (-0.05 + 0.4 - 0.2) + 0.5 * second
    raw = torch.tensor([first, second, -1.1])
    assert_close(returns[mask], raw + torch.tensor([0.2, 0.4, 0.1]))
    assert float(advantages[mask].mean()) == pytest.approx(0, abs=1e-6)
    whitened = (raw - raw.mean()) / raw.std(correction=0)
    assert_close(advantages[mask], whitened, atol=1e-5, rtol=1e-5)
