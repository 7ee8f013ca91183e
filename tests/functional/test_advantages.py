import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import gae, group_relative, leave_one_out

R = 6
unit = st.floats(0, 1)
episodes = st.lists(st.integers(0, R), min_size=1, max_size=4)


def batch(lengths):
    rewards, values = torch.randn(2, len(lengths), R, dtype=torch.float64)
    return rewards, values, torch.arange(R) < torch.tensor(lengths).unsqueeze(1)


@given(episodes, unit, unit)
def test_gae_equals_the_sum_of_discounted_td_errors(lengths, discount, gae_lambda):
    rewards, values, mask = batch(lengths)
    advantages, returns = gae(rewards, values, mask, discount, gae_lambda)
    for b, length in enumerate(lengths):
        r, v = rewards[b, :length].tolist(), [*values[b, :length].tolist(), 0.0]
        errors = [r[t] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(R):
            expected = math.fsum((discount * gae_lambda) ** (k - t) * errors[k] for k in range(t, length))
            assert_close(advantages[b, t].item(), expected, rtol=1e-10, atol=1e-12)
            assert_close(returns[b, t].item(), expected + v[t] if t < length else 0.0, rtol=1e-10, atol=1e-12)


@given(episodes)
def test_without_discount_and_with_lambda_1_returns_are_the_reward_to_go(lengths):
    rewards, values, mask = batch(lengths)
    _, returns = gae(rewards, values, mask, 1.0, 1.0)
    for b, length in enumerate(lengths):
        for t in range(length):
            assert_close(returns[b, t].item(), math.fsum(rewards[b, t:length].tolist()), rtol=1e-10, atol=1e-12)


@given(episodes, unit)
def test_with_lambda_0_the_advantage_is_the_one_step_td_error(lengths, discount):
    rewards, values, mask = batch(lengths)
    advantages, _ = gae(rewards, values, mask, discount, 0.0)
    following = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    assert_close(advantages, (rewards + discount * following - values) * mask)


def test_a_constant_value_gives_a_geometric_series():
    # score 1 at the end, value c throughout: all errors are (discount - 1) c but the last, which is 1 - c
    c, discount, gae_lambda = 0.3, 0.9, 0.8
    rewards = torch.zeros(1, R, dtype=torch.float64)
    rewards[0, -1] = 1
    advantages, _ = gae(rewards, torch.full_like(rewards, c), torch.ones(1, R, dtype=torch.bool), discount, gae_lambda)
    q = discount * gae_lambda
    for t in range(R):
        n = R - 1 - t
        assert_close(
            advantages[0, t].item(), (discount - 1) * c * (1 - q**n) / (1 - q) + q**n * (1 - c), rtol=1e-12, atol=0
        )


def test_a_perfect_critic_leaves_no_advantage():
    _, _, mask = batch([R, 3])
    advantages, returns = gae(
        torch.zeros(2, R).index_fill(1, torch.tensor([2]), 1.0), (torch.arange(R) < 3) * mask * 1.0, mask, 1.0, 0.95
    )
    assert not advantages.any() and returns.tolist() == [[1, 1, 1, 0, 0, 0]] * 2


def test_padding_affects_neither_value_nor_gradient(poison):
    rewards, values, mask = batch([4, R, 1])
    clean = gae(rewards, values, mask, 0.9, 0.8)
    dirty_rewards, dirty = (x.masked_fill(~mask, poison).requires_grad_() for x in (rewards, values))
    advantages, returns = gae(dirty_rewards, dirty, mask, 0.9, 0.8)
    assert torch.equal(advantages, clean[0]) and torch.equal(returns, clean[1])
    (advantages + returns).sum().backward()
    assert (dirty.grad[~mask] == 0).all() and dirty.grad.isfinite().all()
    assert (dirty_rewards.grad[~mask] == 0).all() and dirty_rewards.grad.isfinite().all()


def test_rows_are_independent_of_other_rows_and_padding():
    rewards, values, mask = batch([4, 2])
    batched, _ = gae(rewards, values, mask, 0.9, 0.8)
    single, _ = gae(rewards[1:, :2], values[1:, :2], mask[1:, :2], 0.9, 0.8)
    assert torch.equal(single, batched[1:, :2])


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True]])
def test_a_mask_with_a_hole_is_refused(row):
    with pytest.raises(AssertionError, match="contiguous"):
        gae(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([row]), 1.0, 1.0)


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=4), min_size=1, max_size=4), st.randoms())
def test_group_advantages_equal_a_loop(groups, random):
    rows = [(g, score) for g, group in enumerate(groups) for score in group]
    random.shuffle(rows)
    group, scores = torch.tensor([7 * g for g, _ in rows]), torch.tensor([s for _, s in rows], dtype=torch.float64)
    relative, left_out = group_relative(scores, group), leave_one_out(scores, group)
    assert relative.shape == left_out.shape == scores.shape
    for i, (g, score) in enumerate(rows):
        size, mean = len(groups[g]), math.fsum(groups[g]) / len(groups[g])
        deviation = math.sqrt(math.fsum((s - mean) ** 2 for s in groups[g]) / size)
        rest = [s for j, (other, s) in enumerate(rows) if other == g and j != i]
        spread, largest = max(groups[g]) - min(groups[g]), max(map(abs, groups[g]))
        if spread > 1e-5 * largest:
            assert_close(relative[i].item(), (score - mean) / deviation, rtol=1e-6, atol=1e-9)
        elif spread < 1e-7 * largest:
            assert relative[i] == 0
        assert_close(left_out[i].item(), score - math.fsum(rest) / (size - 1), rtol=1e-12, atol=1e-12)


def test_group_advantages_by_hand():
    scores, group = torch.tensor([1.0, 5.0, 3.0, 0.0]), torch.tensor([0, 1, 0, 1])
    assert_close(leave_one_out(scores, group), torch.tensor([-2.0, 5.0, 2.0, -5.0]))
    assert_close(group_relative(scores, group), torch.tensor([-1.0, 1.0, 1.0, -1.0]))


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out])
def test_equal_scores_have_no_group_advantage(estimator):
    assert not estimator(torch.full((4,), 0.1), torch.tensor([0, 0, 0, 0])).any()
    assert estimator(torch.full((4,), 0.1), torch.tensor([0, 1, 1, 0])).dtype == torch.float32


dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@given(dtypes, st.floats(-1e3, 1e3, width=32), st.integers(2, 6), st.integers(0, 100))
def test_scores_that_differ_by_rounding_have_no_relative_advantage_whatever_the_penalties(dtype, score, size, seed):
    """Two prompts: one whose scores are tied, and one whose scores are not."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-2, 3, (size,), generator=generator)
    tied = torch.full((size,), score).to(dtype).float() * (1 + steps * torch.finfo(torch.float32).eps)
    scores = torch.cat([tied, torch.linspace(-1, 1, size)])
    penalties = (0.02 * torch.randn(2 * size, generator=generator)).to(dtype).float()
    advantages = group_relative(scores, torch.arange(2 * size) // size, penalties)
    assert not advantages[:size].any()
    assert_close(
        advantages[-1] - advantages[size], 2 / scores[size:].std(correction=0) - penalties[-1] + penalties[size]
    )


@given(dtypes, st.integers(0, 1000), st.sampled_from([1e-3, 1.0, 1e3]), st.floats(-100, 100))
def test_penalties_are_not_scaled_by_the_spread_of_the_scores(dtype, seed, scale, shift):
    """However small the spread of the scores is, rounding of the penalties stays as small as it is."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(8, generator=generator).to(dtype).double() * scale + shift
    group = torch.arange(8) // 4
    rounding = 1e-3 * torch.randn(8, dtype=torch.float64, generator=generator)
    plain, penalized = group_relative(scores, group), group_relative(scores, group, rounding)
    centered = rounding - rounding.view(2, 4).mean(1).repeat_interleave(4)
    assert_close(penalized, plain - centered, atol=1e-12, rtol=1e-9)
    assert_close(plain, group_relative(3 * scores, group), atol=1e-9, rtol=1e-9)
    for values in plain.view(2, 4):
        assert_close(values.square().mean().item(), 1.0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("estimator", [group_relative, leave_one_out])
def test_a_group_of_one_is_refused(estimator):
    with pytest.raises(AssertionError, match="at least two responses"):
        estimator(torch.zeros(3), torch.tensor([0, 0, 1]))
