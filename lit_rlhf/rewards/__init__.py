"""Rewards: what scores a response, as plug-ins of one base class, and wrappers around them."""

from lit_rlhf.rewards.base import Reward
from lit_rlhf.rewards.combined import EnsembleReward, WeightedSum
from lit_rlhf.rewards.function import FunctionReward
from lit_rlhf.rewards.lora import LoRARewardModel
from lit_rlhf.rewards.remote import RemoteReward
from lit_rlhf.rewards.resolve import resolve_reward
from lit_rlhf.rewards.reward_model import RewardModelScorer
from lit_rlhf.rewards.sequence_classifier import SequenceClassifierReward
from lit_rlhf.rewards.vllm import VLLMRewardModel
from lit_rlhf.rewards.wrappers import ClippedReward, NormalizedReward, RewardWrapper, ScaledReward

__all__ = [
    "ClippedReward",
    "EnsembleReward",
    "FunctionReward",
    "LoRARewardModel",
    "NormalizedReward",
    "RemoteReward",
    "Reward",
    "RewardModelScorer",
    "RewardWrapper",
    "ScaledReward",
    "SequenceClassifierReward",
    "VLLMRewardModel",
    "WeightedSum",
    "resolve_reward",
]
