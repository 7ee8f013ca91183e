"""What scores a response: plug-ins behind one protocol, and the steps that wrap them."""

from lit_rlhf.rewards.base import (
    Reward,
    load_source_state,
    require_finite_scores,
    ride_on_policy,
    source_critic,
    source_details,
    source_models,
    source_state,
)
from lit_rlhf.rewards.combined import EnsembleReward, WeightedSum
from lit_rlhf.rewards.function import FunctionReward
from lit_rlhf.rewards.lora import LoRARewardModel
from lit_rlhf.rewards.remote import RemoteReward
from lit_rlhf.rewards.reward_model import RewardModelScorer
from lit_rlhf.rewards.wrappers import ClippedReward, NormalizedReward, ScaledReward

__all__ = [
    "ClippedReward",
    "EnsembleReward",
    "FunctionReward",
    "LoRARewardModel",
    "NormalizedReward",
    "RemoteReward",
    "Reward",
    "RewardModelScorer",
    "ScaledReward",
    "WeightedSum",
    "load_source_state",
    "require_finite_scores",
    "ride_on_policy",
    "source_critic",
    "source_details",
    "source_models",
    "source_state",
]
