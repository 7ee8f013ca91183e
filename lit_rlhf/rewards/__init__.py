"""What scores a response: plug-ins behind one protocol."""

from lit_rlhf.rewards.sources import PythonReward, RewardModelReward, RewardSource, WeightedSum

__all__ = ["PythonReward", "RewardModelReward", "RewardSource", "WeightedSum"]
