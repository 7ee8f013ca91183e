"""What may be given where a reward stands."""

from typing import Any

from torch import nn
from transformers import TextClassificationPipeline

from lit_rlhf.errors import UserError
from lit_rlhf.rewards.base import Reward
from lit_rlhf.rewards.function import FunctionReward
from lit_rlhf.rewards.reward_model import RewardModelScorer
from lit_rlhf.rewards.sequence_classifier import SequenceClassifierReward


def resolve_reward(reward: Any) -> Reward:
    """Return a reward: as it is, of a model a `RewardModelScorer`, of a function a `FunctionReward`.

    Of a text-classification pipeline of transformers, a `SequenceClassifierReward`.

    Raises:
        UserError: It is none of these.
    """
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, nn.Module):
        return RewardModelScorer(reward)
    if isinstance(reward, TextClassificationPipeline):
        return SequenceClassifierReward(reward)
    if callable(reward) and not isinstance(reward, type):
        return FunctionReward(reward)
    what = f"the class {reward.__name__}" if isinstance(reward, type) else f"a {type(reward).__name__}"
    raise UserError(
        f"reward: {what} is none; give a lit_rlhf.rewards.Reward such as RewardModelScorer(folder), "
        "a reward model, or a function from (prompts, responses, rows) to scores"
    )
