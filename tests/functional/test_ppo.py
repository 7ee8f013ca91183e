import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import clipped_policy_loss, clipped_value_loss, explained_variance

B, R = 3, 5
seeds = st.integers(0, 10_000)


def batch(count, seed=0):
    """Return `count` float64 tensors (B, R) and a mask with at least one action."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, R, generator=generator) < 0.6
    mask[0, 0] = True
    return *torch.randn(count, B, R, generator=generator, dtype=torch.float64), mask


@given(seeds, st.sampled_from([0.05, 0.2, 1.0]))
def test_policy_loss_equals_a_loop(seed, clip):
    new, old, advantages, mask = batch(3, seed)
    result = clipped_policy_loss(new, old, advantages, mask, clip)
    loss, clipped, approx_kl, count = 0.0, 0, 0.0, 0
    for b in range(B):
        for t in range(R):
            if not mask[b, t]:
                continue
            log_ratio, advantage = (new[b, t] - old[b, t]).item(), advantages[b, t].item()
            ratio = math.exp(log_ratio)
            inside = -advantage * min(max(ratio, 1 - clip), 1 + clip)
            loss += max(-advantage * ratio, inside)
            clipped += inside > -advantage * ratio
            approx_kl += ratio - 1 - log_ratio
            count += 1
    assert_close(result.loss.item(), loss, rtol=1e-10, atol=1e-12)
    assert_close(result.approx_kl.item(), approx_kl, rtol=1e-10, atol=1e-12)
    assert (result.num_clipped.item(), result.count.item()) == (clipped, count)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -2.4, 0.0),  # already above the clip range, no gradient
        (1.5, -2.0, 3.0, 3.0),  # above the clip range in the wrong direction, full gradient
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.1, 2.0, -2.2, -2.2),
    ],
)
def test_the_four_corners_of_the_clip(ratio, advantage, loss, slope):
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.float64)
    result = clipped_policy_loss(new, 0 * one, advantage * one, one.bool(), 0.2)
    result.loss.backward()
    assert_close((result.loss.item(), new.grad.item()), (loss, slope), rtol=1e-12, atol=1e-12)
    assert result.num_clipped.item() == (slope == 0)


def test_the_first_minibatch_is_a_plain_policy_gradient():
    old, advantages, mask = batch(2)
    new = old.clone().requires_grad_()
    result = clipped_policy_loss(new, old, advantages, mask, 0.2)
    result.loss.backward()
    assert result.num_clipped.item() == 0 and result.approx_kl.item() == 0
    assert_close(result.loss.item(), -advantages[mask].sum().item(), rtol=1e-12, atol=1e-12)
    assert_close(new.grad, torch.where(mask, -advantages, 0), rtol=1e-12, atol=0)


def test_policy_gradient_equals_finite_differences():
    new, old, advantages, mask = batch(3)
    new = (old + 0.5 * new).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_policy_loss(x, old, advantages, mask, 0.2).loss, new)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_policy_padding_affects_neither_value_nor_gradient(index, poison):
    tensors = list(batch(4)[:3])
    mask = batch(3)[3]
    clean = clipped_policy_loss(*tensors, mask, 0.2)
    tensors[index] = tensors[index].masked_fill(~mask, poison)
    tensors[0].requires_grad_()
    dirty = clipped_policy_loss(*tensors, mask, 0.2)
    dirty.loss.backward()
    assert all(torch.equal(actual.detach(), expected) for actual, expected in zip(dirty, clean))
    assert tensors[0].grad.isfinite().all() and (tensors[0].grad[~mask] == 0).all()


@given(seeds, st.sampled_from([0.05, 0.2, 1.0, math.inf]))
def test_value_loss_equals_a_loop(seed, clip):
    values, old, returns, mask = batch(3, seed)
    result = clipped_value_loss(values, old, returns, mask, clip)
    loss, clipped, count = 0.0, 0, 0
    for b in range(B):
        for t in range(R):
            if not mask[b, t]:
                continue
            v, v_old, target = values[b, t].item(), old[b, t].item(), returns[b, t].item()
            plain, limited = (v - target) ** 2, (min(max(v, v_old - clip), v_old + clip) - target) ** 2
            loss += 0.5 * max(plain, limited)
            clipped += limited > plain
            count += 1
    assert_close(result.loss.item(), loss, rtol=1e-10, atol=1e-12)
    assert (result.num_clipped.item(), result.count.item()) == (clipped, count)


def test_value_gradient_equals_finite_differences():
    values, old, returns, mask = batch(3)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_value_loss(x, old, returns, mask, 0.2).loss, values)


def test_a_clipped_value_has_no_gradient():
    one = torch.ones(1, 1)
    values = torch.tensor([[0.5]], requires_grad=True)
    result = clipped_value_loss(values, 0 * one, one, one.bool(), 0.2)  # moved 0.5 towards 1, clipped at 0.2
    result.loss.backward()
    assert_close(result.loss.item(), 0.32, rtol=1e-6, atol=0)
    assert values.grad.item() == 0 and result.num_clipped.item() == 1


@pytest.mark.parametrize("index", [0, 1, 2])
def test_value_padding_affects_neither_value_nor_gradient(index, poison):
    *tensors, mask = batch(3)
    clean = clipped_value_loss(*tensors, mask, 0.2)
    tensors[index] = tensors[index].masked_fill(~mask, poison)
    tensors[0].requires_grad_()
    dirty = clipped_value_loss(*tensors, mask, 0.2)
    dirty.loss.backward()
    assert all(torch.equal(actual.detach(), expected) for actual, expected in zip(dirty, clean))
    assert tensors[0].grad.isfinite().all() and (tensors[0].grad[~mask] == 0).all()


def test_micro_batches_add_up():
    new, old, advantages, mask = batch(3)
    for full, parts in [
        (
            clipped_policy_loss(new, old, advantages, mask, 0.2),
            [clipped_policy_loss(new[[b]], old[[b]], advantages[[b]], mask[[b]], 0.2) for b in range(B)],
        ),
        (
            clipped_value_loss(new, old, advantages, mask, 0.2),
            [clipped_value_loss(new[[b]], old[[b]], advantages[[b]], mask[[b]], 0.2) for b in range(B)],
        ),
    ]:
        for expected, field in zip(full, zip(*parts)):
            assert_close(torch.stack(field).sum(), expected, rtol=1e-12, atol=1e-12)


def test_only_the_loss_carries_a_gradient():
    new, old, advantages, mask = batch(3)
    new.requires_grad_()
    for result in (
        clipped_policy_loss(new, old, advantages, mask, 0.2),
        clipped_value_loss(new, old, advantages, mask, 0.2),
    ):
        assert [x.requires_grad for x in result] == [True] + [False] * (len(result) - 1)
        assert all(x.shape == () for x in result)


@pytest.mark.parametrize("loss", [clipped_policy_loss, clipped_value_loss])
def test_shapes_must_agree(loss):
    x = torch.zeros(2, 3)
    with pytest.raises(AssertionError):
        loss(x, x, x[:, :1], x.bool(), 0.2)


def test_explained_variance(poison):
    values, returns, mask = batch(2)
    dirty = values.masked_fill(~mask, poison), returns.masked_fill(~mask, poison), mask
    masked_values, masked_returns = values[mask], returns[mask]
    expected = 1 - (masked_returns - masked_values).var(correction=0) / masked_returns.var(correction=0)
    assert_close(explained_variance(*dirty), expected, rtol=1e-12, atol=1e-12)
    assert_close(explained_variance(returns, returns, mask).item(), 1.0, rtol=0, atol=1e-12)
    # a critic with a constant error explains everything, a constant critic nothing
    assert_close(explained_variance(returns + 3, returns, mask).item(), 1.0, rtol=0, atol=1e-12)
    assert_close(explained_variance(torch.full_like(values, 3.0), returns, mask).item(), 0.0, rtol=0, atol=1e-12)
