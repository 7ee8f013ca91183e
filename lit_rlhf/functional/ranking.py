"""The reward model's loss over whole rankings (InstructGPT §3.5, Eq. 1)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PairNormalizer = Literal["kept", "all"]


class RankingLoss(NamedTuple):
    """Sums over a batch, all 0-d: add over micro-batches and ranks, then divide."""

    loss: Tensor
    """Sum over rankings of that ranking's weighted pairs ("kept": their mean), float32, in nats."""
    rankings: Tensor
    """Rankings with at least one kept pair, int64. The loss is per ranking when divided by this."""
    pairs: Tensor
    """Kept pairs, int64."""
    correct: Tensor
    """Pairs whose better row has the higher score, float32; an equal score counts half."""
    margin_sum: Tensor
    """Sum over pairs of the better score minus the worse, float32."""


def ranking_pairs(
    ranking: Tensor, ranks: Tensor, pair_normalizer: PairNormalizer = "kept"
) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of rows of the same ranking that a labeler told apart.

    Ties (equal ranks) are dropped (App. C.2). What then becomes of the 1 / C(K, 2) of Eq. 1 the paper leaves open; the
    two readings differ only where there are ties.

    Args:
        ranking: (N,) int64, the ranking that a row belongs to, from 0 on.
        ranks: (N,) int64, 0 is best.
        pair_normalizer: "kept", one over the ranking's pairs without ties: every ranking with a pair weighs 1. "all",
            one over C(K, 2), ties included: a ranking weighs its share of pairs that were told apart.

    Returns:
        Rows of the better and of the worse completion of each pair, (pairs,) int64, and the weight of each pair,
        (pairs,) float32.
    """
    assert ranking.shape == ranks.shape and ranking.ndim == 1
    assert pair_normalizer in ("kept", "all"), pair_normalizer
    same = ranking.unsqueeze(1) == ranking  # (N, N)
    better, worse = torch.nonzero(same & (ranks.unsqueeze(1) < ranks), as_tuple=True)
    owner = ranking[better]
    if pair_normalizer == "kept":
        pairs = torch.bincount(owner)
    else:
        completions = torch.bincount(ranking)  # K of each ranking
        pairs = completions * (completions - 1) / 2
    return better, worse, pairs[owner].float().reciprocal()


def ranking_loss(
    scores: Tensor, ranking: Tensor, ranks: Tensor, pair_normalizer: PairNormalizer = "kept"
) -> RankingLoss:
    """Pairwise logistic loss of InstructGPT's Eq. 1, with every pair of a ranking in one element.

    `sum over rankings of 1 / pairs * sum over pairs of -log sigmoid(score_better - score_worse)`

    A batch without any kept pair gives a loss of 0 that still has a gradient (of zeros).

    Args:
        scores: (N,), one per completion, any floating dtype; the loss is computed in float32.
        ranking: (N,) int64, the ranking that a row belongs to, from 0 on.
        ranks: (N,) int64, 0 is best, equal is a tie.
        pair_normalizer: what `pairs` counts, see `ranking_pairs`.
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
