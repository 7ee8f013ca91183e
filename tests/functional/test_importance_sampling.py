"""Truncated importance weights: ratio, truncation, mask, gradient, and the expectation that they correct."""

import math

import pytest
import torch

from lit_rlhf.functional import truncated_importance_weights


def test_weights_are_ratios_up_to_the_cap_and_nothing_outside_the_mask():
    new = torch.tensor([[0.4, 0.1, 0.9, 0.5]]).log().requires_grad_()
    old = torch.tensor([[0.2, 0.2, 0.1, 0.0]]).log()
    mask = torch.tensor([[True, True, True, False]])
    weights = truncated_importance_weights(new, old, mask, 3.0)
    assert weights.tolist() == [[pytest.approx(2.0), pytest.approx(0.5), 3.0, 0.0]]
    assert not weights.requires_grad
    nan = torch.where(mask, new, torch.nan)
    assert torch.equal(truncated_importance_weights(nan, old, mask, 3.0), weights)


def test_without_truncation_they_correct_an_expectation():
    generator = torch.Generator().manual_seed(0)
    behavior, target = (torch.rand(8, generator=generator).softmax(0) for _ in range(2))
    values = torch.rand(8, generator=generator)
    actions = torch.multinomial(behavior, 200_000, replacement=True, generator=generator)[None]
    mask = torch.ones_like(actions, dtype=torch.bool)
    weights = truncated_importance_weights(target.log()[actions], behavior.log()[actions], mask, math.inf)
    expected = float((target * values).sum())
    assert float((weights * values[actions]).mean()) == pytest.approx(expected, abs=5e-3)
    assert abs(float(values[actions].mean()) - expected) > 5e-3
