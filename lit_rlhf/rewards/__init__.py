"""What scores a response: plug-ins behind one protocol, and the steps that wrap them."""

from lit_rlhf.rewards.adapter import AdapterReward
from lit_rlhf.rewards.combined import EnsembleReward, WeightedSum
from lit_rlhf.rewards.python import PythonReward
from lit_rlhf.rewards.remote import RemoteReward
from lit_rlhf.rewards.reward_model import RewardModelReward
from lit_rlhf.rewards.source import (
    RewardSource,
    finite_scores,
    load_source_state,
    ride_on_policy,
    source_critic,
    source_details,
    source_models,
    source_state,
)
from lit_rlhf.rewards.steps import ClippedReward, NormalisedReward, ScaledReward

__all__ = [
    "AdapterReward",
    "ClippedReward",
    "EnsembleReward",
    "NormalisedReward",
    "PythonReward",
    "RemoteReward",
    "RewardModelReward",
    "RewardSource",
    "ScaledReward",
    "WeightedSum",
    "finite_scores",
    "load_source_state",
    "ride_on_policy",
    "source_critic",
    "source_details",
    "source_models",
    "source_state",
]
