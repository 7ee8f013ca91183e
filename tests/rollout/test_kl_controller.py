"""Controllers of β: the formula of Ziegler et al. (2019), section 2.2, in log space; a controller of one method."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.rollout.kl_controller import AdaptiveKLController, FixedKLController, KLController


def test_the_adaptive_controller_follows_the_formula_over_100_updates():
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10_000)
    kls = [6.0 + 5.0 * math.sin(0.37 * step) + 0.03 * step for step in range(100)]
    log_coefficient = math.log(0.15)
    for step, kl in enumerate(kls):
        controller.update(kl, num_episodes=256)
        error = (kl - 6.0) / 6.0
        clipped = error if abs(error) <= 0.2 else math.copysign(0.2, error)
        log_coefficient += math.log1p(clipped * 256 / 10_000)
        assert controller.coefficient == pytest.approx(math.exp(log_coefficient), rel=1e-12), step


def test_the_error_is_clipped_at_20_percent():
    for kl, factor in ((100.0, 1 + 0.2 * 0.5), (0.0, 1 - 0.2 * 0.5), (6.6, 1 + 0.1 * 0.5), (6.0, 1.0)):
        controller = AdaptiveKLController(1.0, target=6.0, horizon=128)
        controller.update(kl, num_episodes=64)
        assert controller.coefficient == pytest.approx(factor, rel=1e-12)


@given(st.floats(0, 1e6), st.floats(0.01, 100), st.integers(1, 5000))
def test_kl_above_the_target_raises_the_coefficient_and_kl_below_lowers_it(kl, target, num_episodes):
    controller = AdaptiveKLController(0.1, target=target, horizon=10_000)
    controller.update(kl, num_episodes)
    assert controller.coefficient > 0
    if abs(kl / target - 1) > 1e-9:
        assert (controller.coefficient > 0.1) == (kl > target)


def test_the_coefficient_survives_a_restart():
    controller = AdaptiveKLController(0.2, target=3.0)
    for kl in (9.0, 1.0, 4.0):
        controller.update(kl, 512)
    resumed = AdaptiveKLController(0.2, target=3.0)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coefficient == controller.coefficient != 0.2


def test_the_fixed_controller_keeps_the_coefficient_of_the_recipe_after_a_restart():
    controller = FixedKLController(0.05)
    controller.update(1e9, 512)
    controller.load_state_dict(FixedKLController(0.7).state_dict())
    assert controller.coefficient == 0.05


@pytest.mark.parametrize("settings", [{"coefficient": 0.0}, {"target": -1.0}, {"horizon": 0}])
def test_settings_that_are_not_positive_are_refused(settings):
    with pytest.raises(UserError, match="must be positive"):
        AdaptiveKLController(**settings)


class UpdateOnly(KLController):
    """Doubles β at every update; `update` is its only method."""

    coefficient = 0.5

    def update(self, kl: float, num_episodes: int) -> None:
        self.coefficient *= 2


def test_a_controller_needs_update_alone():
    controller = UpdateOnly()
    controller.update(3.0, 8)
    assert controller.coefficient == 1.0
    assert controller.state_dict() == {}
    controller.load_state_dict({"coefficient": 0.1})  # of the controller of another recipe
    assert controller.coefficient == 1.0
    with pytest.raises(TypeError, match="abstract method"):
        KLController()
