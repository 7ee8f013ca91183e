"""The K-wise reward-model loss (InstructGPT §3.5, Eq. 1)."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

PairNormalizer = Literal["untied_pairs", "all_pairs"]
"""What the loss of a ranking is divided by: its untied pairs, or all C(K, 2)."""


class RankingLoss(NamedTuple):
    """Sums over a batch, all 0-d: add up over micro-batches and ranks, then divide."""

    loss: Tensor
    """Sum over rankings of that ranking's weighted pairs ("untied_pairs": their mean), float32, in nats."""
    rankings: Tensor
    """Number of rankings with at least one untied pair, int64. Dividing by it gives the loss per ranking."""
    pairs: Tensor
    """Number of untied pairs, int64."""
    correct: Tensor
    """Number of pairs whose better row has the higher score, float32; equal scores count half."""
    margin_sum: Tensor
    """Sum over pairs of the better score minus the worse, float32."""


def ranking_pairs(
    ranking: Tensor, ranks: Tensor, pair_normalizer: PairNormalizer = "untied_pairs"
) -> tuple[Tensor, Tensor, Tensor]:
    """Find all pairs of rows of one ranking with different ranks, and their weights.

    Ties (equal ranks) are dropped (App. C.2). The paper does not say what then becomes of the factor 1 / C(K, 2) of
    Eq. 1; the two readings differ only where there are ties.

    Args:
        ranking: (N,) int64, the ranking of each row, from 0 on.
        ranks: (N,) int64, 0 is best.
        pair_normalizer: "untied_pairs" divides by the ranking's untied pairs: every ranking with one has weight 1.
            "all_pairs" divides by C(K, 2): a ranking's weight is its fraction of untied pairs.

    Returns:
        Row of the better and of the worse completion of each pair, (pairs,) int64 each, and its weight, (pairs,)
        float32.
    """
    assert ranking.shape == ranks.shape and ranking.ndim == 1
    assert pair_normalizer in get_args(PairNormalizer), pair_normalizer
    same = ranking.unsqueeze(1) == ranking  # (N, N)
    better, worse = torch.nonzero(same & (ranks.unsqueeze(1) < ranks), as_tuple=True)
    owner = ranking[better]
    if pair_normalizer == "untied_pairs":
        pairs = torch.bincount(owner)
    else:
        completions = torch.bincount(ranking)  # K of each ranking
        pairs = completions * (completions - 1) / 2
    return better, worse, pairs[owner].float().reciprocal()


def ranking_loss(
    scores: Tensor, ranking: Tensor, ranks: Tensor, pair_normalizer: PairNormalizer = "untied_pairs"
) -> RankingLoss:
    """Compute the pairwise logistic loss of InstructGPT's Eq. 1, over all pairs of each ranking.

    `sum over rankings of 1 / pairs * sum over pairs of -log sigmoid(score_better - score_worse)`

    A batch without untied pairs has loss 0, with a gradient of zeros.

    Args:
        scores: (N,), any floating dtype; the loss is computed in float32.
        ranking: (N,) int64, the ranking of each row, from 0 on.
        ranks: (N,) int64, 0 is best, equal is a tie.
        pair_normalizer: What `pairs` counts, see `ranking_pairs`.
    """
    assert scores.shape == ranking.shape
    better, worse, weight = ranking_pairs(ranking, ranks, pair_normalizer)
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
