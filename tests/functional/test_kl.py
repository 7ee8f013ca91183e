import math

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.functional import k1, k2, k3


def distributions():
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    return policy, reference, (policy.exp() * (policy - reference)).sum()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator):
    policy, reference, divergence = distributions()
    expectation = (policy.exp() * estimator(policy, reference)).sum()
    assert_close(expectation, divergence, rtol=1e-12, atol=1e-12)


def test_formulas():
    policy, reference = torch.tensor([-1.0, -2.5], dtype=torch.float64), torch.tensor([-1.75, -0.5]).double()
    assert k1(policy, reference).tolist() == [0.75, -2.0]  # negative, and not clamped
    assert k2(policy, reference).tolist() == [0.28125, 2.0]
    expected = torch.tensor([math.exp(-0.75) - 1 + 0.75, math.exp(2.0) - 1 - 2.0], dtype=torch.float64)
    assert_close(k3(policy, reference), expected, rtol=1e-14, atol=0)


def test_the_gradient_of_k2_is_that_of_the_divergence():
    _, reference, _ = distributions()
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    policy = logits.log_softmax(-1)
    (truth,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    # sampled: the probabilities weigh the estimate and are not differentiated
    (sampled,) = torch.autograd.grad((policy.exp().detach() * k2(policy, reference)).sum(), logits)
    assert_close(sampled, truth, rtol=1e-10, atol=1e-12)


def test_small_and_large_ratios_in_float32():
    zero = torch.zeros(())
    assert_close(k3(torch.tensor(1e-3), zero).item(), 4.998333749e-7, rtol=2e-4, atol=0)
    assert k1(torch.tensor(50.0), zero) == 50 and k3(torch.tensor(50.0), zero) == 49
    assert (k3(torch.randn(1000) * 3, torch.zeros(1000)) >= 0).all()


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        k1(torch.zeros(2, 1), torch.zeros(2, 3))
