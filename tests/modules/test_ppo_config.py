"""`PPOConfig`: the paper's values by default; values out of range are refused by name."""

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.modules import PPOConfig
from lit_rlhf.rollout.advantages import GAE


def test_defaults_are_those_of_the_paper():
    config = PPOConfig()
    assert (config.rollout_batch_size, config.ppo_epochs, config.clip_range) == (512, 1, 0.2)
    assert GAE().discount == 1.0
    assert config.critic_learning_rate == 9e-6


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rollout_batch_size", 0, "be at least 1"),
        ("micro_batch_size", 0, "be at least 1"),
        ("ppo_epochs", -1, "be at least 1"),
        ("forward_batch_size", 0, "be at least 1"),
        ("clip_range", 0.0, "be positive"),
        ("entropy_coefficient", -0.1, "not be negative"),
        ("critic_warmup_iterations", -1, "not be negative"),
        ("value_clip_range", -0.2, "be positive"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value, rule):
    with pytest.raises(UserError, match=rf"ppo\.{name} must {rule}, got {value}"):
        PPOConfig(**{name: value})
