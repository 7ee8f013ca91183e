"""Eq. 1 on real rankings, in batches as in training, against a sum over pairs in float64."""

import math
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.functional import PairNormalizer, ranking_loss

FILES = ["finegrained_qa.jsonl.gz", "oasst_kwise.jsonl.gz", "hh_harmless.jsonl.gz", "polite_rude.json"]


def loss_over_pairs(scores: list[float], ranks: list[int], pair_normalizer: PairNormalizer) -> float:
    """Return the loss of one ranking, in Python floats."""
    losses = []
    for one, other in combinations(range(len(ranks)), 2):
        if ranks[one] != ranks[other]:
            margin = scores[one] - scores[other] if ranks[one] < ranks[other] else scores[other] - scores[one]
            losses.append(math.log1p(math.exp(-margin)))
    return math.fsum(losses) / (len(losses) if pair_normalizer == "untied_pairs" else math.comb(len(ranks), 2))


@pytest.mark.parametrize("pair_normalizer", ["untied_pairs", "all_pairs"])
@pytest.mark.parametrize("name", FILES)
def test_the_loss_is_the_mean_over_pairs(name: str, pair_normalizer: PairNormalizer, real_data: Path) -> None:
    rows = read_rows(str(real_data / "preferences" / name))
    records = read_records(rows, "ranking", Ranking, "auto", DatasetReport(name))
    random = Random(0)
    for start in range(0, len(records), 64):
        batch = records[start : start + 64]
        scores = [[random.gauss(0, 2) for _ in record.ranks] for record in batch]
        expected = math.fsum(loss_over_pairs(s, record.ranks, pair_normalizer) for s, record in zip(scores, batch))
        ranking_index = torch.tensor([number for number, record in enumerate(batch) for _ in record.ranks])
        ranks = torch.tensor([rank for record in batch for rank in record.ranks])
        result = ranking_loss(torch.cat([torch.tensor(each) for each in scores]), ranking_index, ranks, pair_normalizer)
        assert float(result.loss) == pytest.approx(expected, rel=1e-6)
        assert int(result.rankings) == len(batch)
