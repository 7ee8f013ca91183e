"""The paper's three steps as Lightning modules."""

from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_config import PPOConfig
from lit_rlhf.modules.reward import RewardModule
from lit_rlhf.modules.sft import SFTModule

__all__ = ["PPOConfig", "PPOModule", "RewardModule", "SFTModule"]
