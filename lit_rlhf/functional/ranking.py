"""The reward model's loss over whole rankings (InstructGPT §3.5, Eq. 1)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RankingLoss(NamedTuple):
    """Sums over a batch, all 0-d: add over micro-batches and ranks, then divide."""

    loss: Tensor
    """Sum over rankings of the mean over that ranking's kept pairs, float32, in nats."""
    rankings: Tensor
    """Rankings with at least one kept pair, int64. The loss is per ranking when divided by this."""
    pairs: Tensor
    """Kept pairs, int64."""
    correct: Tensor
    """Pairs whose better row has the higher score, float32; an equal score counts half."""
    margin_sum: Tensor
    """Sum over pairs of the better score minus the worse, float32."""


def ranking_pairs(ranking: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of rows of the same ranking that a labeler told apart.

    Ties (equal ranks) are dropped, which the paper leaves open: a ranking of K rows has C(K, 2) pairs less its ties.

    Args:
        ranking: (N,) int64, the ranking that a row belongs to, from 0 on.
        ranks: (N,) int64, 0 is best.

    Returns:
        Rows of the better and of the worse completion of each pair, (pairs,) int64, and the weight of each pair,
        (pairs,) float32: one over the number of kept pairs of its ranking.
    """
    assert ranking.shape == ranks.shape and ranking.ndim == 1
    same = ranking.unsqueeze(1) == ranking  # (N, N)
    better, worse = torch.nonzero(same & (ranks.unsqueeze(1) < ranks), as_tuple=True)
    owner = ranking[better]
    weight = torch.bincount(owner)[owner].float().reciprocal()
    return better, worse, weight


def ranking_loss(scores: Tensor, ranking: Tensor, ranks: Tensor) -> RankingLoss:
    """Pairwise logistic loss of InstructGPT's Eq. 1, with every pair of a ranking in one element.

    `sum over rankings of 1 / pairs * sum over pairs of -log sigmoid(score_better - score_worse)`

    The paper's 1 / C(K, 2) is here one over the kept pairs: the same without ties, and with them every ranking still
    weighs 1. A batch without any kept pair gives a loss of 0 that still has a gradient (of zeros).

    Args:
        scores: (N,), one per completion, any floating dtype; the loss is computed in float32.
        ranking: (N,) int64, the ranking that a row belongs to, from 0 on.
        ranks: (N,) int64, 0 is best, equal is a tie.
    """
    assert scores.shape == ranking.shape
    better, worse, weight = ranking_pairs(ranking, ranks)
    scores = scores.float()
    margin = scores[better] - scores[worse]  # (pairs,)
    detached = margin.detach()
    return RankingLoss(
        loss=(weight * -F.logsigmoid(margin)).sum(),
        rankings=(torch.bincount(ranking[better]) > 0).sum(),
        pairs=torch.tensor(len(better), device=scores.device),
        correct=((detached > 0).float() + (detached == 0).float() / 2).sum(),
        margin_sum=detached.sum(),
    )
