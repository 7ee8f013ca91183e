"""The numbers of the update: the paper's by default, and senseless ones refused by name."""

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.modules import PPOConfig
from lit_rlhf.rollout.advantages import GAE


def test_the_defaults_are_the_papers():
    settings = PPOConfig()
    assert (settings.rollout_batch_size, settings.ppo_epochs, settings.clip_range) == (512, 1, 0.2)
    assert GAE().discount == 1.0
    assert settings.critic_learning_rate == 9e-6


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rollout_batch_size", 0, "be at least 1"),
        ("micro_batch_size", 0, "be at least 1"),
        ("epochs", -1, "be at least 1"),
        ("chunk", 0, "be at least 1"),
        ("clip", 0.0, "be positive"),
        ("entropy_coefficient", -0.1, "not be negative"),
        ("critic_warmup_iterations", -1, "not be negative"),
        ("value_clip_range", -0.2, "be positive"),
    ],
)
def test_a_senseless_number_is_refused_by_name(name, value, rule):
    with pytest.raises(UserError, match=rf"ppo\.{name} must {rule}, got {value}"):
        PPOConfig(**{name: value})
