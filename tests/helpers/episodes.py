"""Four episodes over the word tokenizer, and a reward that reads their scores from a column."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional import pad_left, pad_right
from lit_rlhf.rewards import Reward
from lit_rlhf.rollout import Episodes

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4]]
RESPONSES = [[14, 1], [15, 16, 17, 18], [19, 20, 1], [1]]


class ColumnReward(Reward):
    """Scores a row by its metadata column `score`."""

    def score(self, episodes: Episodes) -> Tensor:
        """Return the column."""
        return torch.tensor([float(row["score"]) for row in episodes.rows])


class ScaledColumnReward(ColumnReward):
    """The column times a factor."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def score(self, episodes: Episodes) -> Tensor:
        """Return the column times the factor."""
        return self.factor * super().score(episodes)


def make_episodes(tokenizer: Any, rows: list[int] | None = None) -> Episodes:
    """Return prompts padded on the left, responses on the right; row i has the metadata {"index": i}."""
    rows = rows if rows is not None else list(range(4))
    prompts, prompt_mask = pad_left([PROMPTS[row] for row in rows], 0)
    responses, response_mask = pad_right([RESPONSES[row] for row in rows], 0)
    return Episodes(
        torch.cat([prompts, responses], 1),
        torch.cat([prompt_mask, response_mask], 1),
        [tokenizer.decode(PROMPTS[row]) for row in rows],
        [tokenizer.decode(RESPONSES[row], skip_special_tokens=True) for row in rows],
        [{"index": row} for row in rows],
        prompts.shape[1],
    )


def episodes_with_scores(scores: Sequence[float], training: bool = True) -> Episodes:
    """Return episodes of two tokens whose metadata holds their scores."""
    ids = torch.ones(len(scores), 2, dtype=torch.int64)
    rows = [{"score": score} for score in scores]
    return Episodes(ids, ids, ["p"] * len(scores), ["r"] * len(scores), rows, 1, training)
