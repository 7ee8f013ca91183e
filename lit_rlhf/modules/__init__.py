"""The paper's three steps as Lightning modules."""

from lit_rlhf.modules.critics import Critic, LoRACritic, SeparateCritic, SharedBackboneCritic
from lit_rlhf.modules.ppo import PPOModule
from lit_rlhf.modules.ppo_config import PPOConfig
from lit_rlhf.modules.reward import RewardModule
from lit_rlhf.modules.sft import SFTModule

__all__ = [
    "Critic",
    "LoRACritic",
    "PPOConfig",
    "PPOModule",
    "RewardModule",
    "SFTModule",
    "SeparateCritic",
    "SharedBackboneCritic",
]
