"""The controllers of β against Ziegler et al. 2019, section 2.2, written out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.kl_controller import AdaptiveKLController, FixedKLController


def test_the_adaptive_controller_is_the_papers_product_over_100_updates():
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10_000)
    kls = [6.0 + 5.0 * math.sin(0.37 * step) + 0.03 * step for step in range(100)]
    logarithm = math.log(0.15)
    for step, kl in enumerate(kls):
        controller.update(kl, episodes=256)
        error = (kl - 6.0) / 6.0
        clipped = error if abs(error) <= 0.2 else math.copysign(0.2, error)
        logarithm += math.log1p(clipped * 256 / 10_000)
        assert controller.coefficient == pytest.approx(math.exp(logarithm), rel=1e-12), step


def test_the_error_is_clipped_at_a_fifth():
    for kl, factor in ((100.0, 1 + 0.2 * 0.5), (0.0, 1 - 0.2 * 0.5), (6.6, 1 + 0.1 * 0.5), (6.0, 1.0)):
        controller = AdaptiveKLController(1.0, target=6.0, horizon=128)
        controller.update(kl, episodes=64)
        assert controller.coefficient == pytest.approx(factor, rel=1e-12)


@given(st.floats(0, 1e6), st.floats(0.01, 100), st.integers(1, 5000))
def test_too_much_kl_raises_the_coefficient_and_too_little_lowers_it(kl, target, episodes):
    controller = AdaptiveKLController(0.1, target=target, horizon=10_000)
    controller.update(kl, episodes)
    assert controller.coefficient > 0
    if abs(kl / target - 1) > 1e-9:
        assert (controller.coefficient > 0.1) == (kl > target)


def test_the_coefficient_survives_a_restart():
    controller = AdaptiveKLController(0.2, target=3.0)
    for kl in (9.0, 1.0, 4.0):
        controller.update(kl, 512)
    again = AdaptiveKLController(0.2, target=3.0)
    again.load_state_dict(controller.state_dict())
    assert again.coefficient == controller.coefficient != 0.2


def test_the_fixed_controller_stays_and_takes_the_recipes_value_at_a_restart():
    controller = FixedKLController(0.05)
    controller.update(1e9, 512)
    controller.load_state_dict(FixedKLController(0.7).state_dict())
    assert controller.coefficient == 0.05


@pytest.mark.parametrize("settings", [{"coefficient": 0.0}, {"target": -1.0}, {"horizon": 0}])
def test_what_must_be_positive_is(settings):
    with pytest.raises(UserError, match="must be positive"):
        AdaptiveKLController(**settings)
