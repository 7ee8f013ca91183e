"""Rollouts: from sampled responses to the micro-batches of the PPO update."""

from lit_rlhf.rollout.advantages import GAE, AdvantageEstimate, AdvantageEstimator, GRPOAdvantage, RLOOAdvantage
from lit_rlhf.rollout.experience import Episodes, Experience, Trajectories
from lit_rlhf.rollout.kl_controller import AdaptiveKLController, FixedKLController, KLController

__all__ = [
    "GAE",
    "AdaptiveKLController",
    "AdvantageEstimate",
    "AdvantageEstimator",
    "Episodes",
    "Experience",
    "FixedKLController",
    "GRPOAdvantage",
    "KLController",
    "RLOOAdvantage",
    "Trajectories",
]
