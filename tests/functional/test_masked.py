import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import masked_mean, masked_sum, mean_and_variance, moments, whiten

values = st.floats(-100, 100, width=32)
entries = st.lists(st.tuples(values, st.booleans()), min_size=2, max_size=30).filter(
    lambda rows: any(valid for _, valid in rows)
)


def tensors(rows, dtype=torch.float64):
    return torch.tensor([x for x, _ in rows], dtype=dtype), torch.tensor([valid for _, valid in rows])


@given(entries)
def test_sum_and_mean_equal_a_loop(rows):
    selected = [x for x, valid in rows if valid]
    x, mask = tensors(rows)
    assert_close(masked_sum(x, mask).item(), math.fsum(selected), rtol=1e-12, atol=1e-10)
    assert_close(masked_mean(x, mask).item(), math.fsum(selected) / len(selected), rtol=1e-12, atol=1e-10)
    assert masked_sum(x, mask).shape == masked_mean(x, mask).shape == ()


def test_padding_affects_neither_value_nor_gradient(poison):
    x = torch.tensor([1.0, poison, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    total = masked_sum(x, mask)
    total.backward()
    assert total.item() == 4 and masked_mean(x, mask).item() == 2
    assert x.grad.tolist() == [1, 0, 1]
    assert moments(x.detach(), mask).tolist() == [2, 4, 10]
    assert whiten(x.detach(), mask, torch.tensor(2.0), torch.tensor(1.0)).tolist() == [-1, 0, 1]


def test_an_empty_mask_sums_to_zero_and_has_no_mean():
    x, mask = torch.ones(3), torch.zeros(3, dtype=torch.bool)
    assert masked_sum(x, mask).item() == 0
    assert masked_mean(x, mask).isnan()


def test_half_precision_is_summed_in_float32():
    x = torch.ones(1001, dtype=torch.bfloat16)
    assert masked_sum(x, torch.ones(1001, dtype=torch.bool)).item() == 1001  # bfloat16 holds 1000 and 1004


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shapes differ"):
        masked_sum(torch.ones(2, 1), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(AssertionError, match="shapes differ"):
        whiten(torch.ones(2, 1), torch.ones(2, 2, dtype=torch.bool), torch.tensor(0.0), torch.tensor(1.0))


@given(entries, st.integers(0, 30))
def test_moments_of_parts_add_up(rows, cut):
    x, mask = tensors(rows, torch.float32)
    parts = moments(x[:cut], mask[:cut]) + moments(x[cut:], mask[cut:])
    assert parts.dtype == torch.float64 and parts.shape == (3,)
    assert_close(parts, moments(x, mask), rtol=1e-12, atol=1e-9)
    mean, variance = mean_and_variance(parts)
    assert_close(mean, x[mask].double().mean(), rtol=1e-12, atol=1e-10)
    assert_close(variance, x[mask].double().var(correction=0), rtol=1e-9, atol=1e-9)


def test_variance_of_a_constant_is_not_negative():
    # the squares of 0.1 sum to a little less than the square of the mean does
    for n in range(1, 200):
        x = torch.full((n,), 0.1)
        assert mean_and_variance(moments(x, torch.ones(n, dtype=torch.bool)))[1] >= 0


@given(entries)
def test_whitening_gives_mean_0_and_variance_1(rows):
    x, mask = tensors(rows)
    mean, variance = mean_and_variance(moments(x, mask))
    whitened = whiten(x, mask, mean, variance)
    assert (whitened[~mask] == 0).all()
    assert_close(whitened[mask].mean().item(), 0.0, atol=1e-6, rtol=0)
    if variance > 1e-2:
        assert_close(whitened[mask].var(correction=0).item(), 1.0, atol=2e-6, rtol=0)


def test_whitening_a_constant_gives_zeros_and_keeps_float32():
    x, mask = torch.full((4,), 3.0), torch.ones(4, dtype=torch.bool)
    whitened = whiten(x, mask, *mean_and_variance(moments(x, mask)))
    assert whitened.tolist() == [0, 0, 0, 0] and whitened.dtype == torch.float32


def test_epsilon_is_under_the_square_root():
    one = torch.ones(1, dtype=torch.float64)
    whitened = whiten(one, one.bool(), one[0] * 0, one[0] * 1e-8)
    assert_close(whitened.item(), 1 / math.sqrt(2e-8), rtol=1e-12, atol=0)
