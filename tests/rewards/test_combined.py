"""Weighted sums and ensembles: by Python's own statistics, with their figures and states."""

import statistics

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import (
    ClippedReward,
    EnsembleReward,
    NormalizedReward,
    RewardModelScorer,
    WeightedSum,
)
from tests.helpers.episodes import Known, Times, scored

FACTORS = (1.0, 2.0, 6.0)
SCORES = [1.0, -2.0, 0.0]


def ensemble(**settings: object) -> EnsembleReward:
    return EnsembleReward([Times(factor) for factor in FACTORS], **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [statistics.fmean(f * s for f in FACTORS) for s in SCORES]),
        ({"aggregation": "min"}, [min(f * s for f in FACTORS) for s in SCORES]),
        (
            {"aggregation": "mean_minus_std", "num_std": 0.5},
            [
                statistics.fmean(f * s for f in FACTORS) - 0.5 * statistics.pstdev(f * s for f in FACTORS)
                for s in SCORES
            ],
        ),
    ],
)
def test_an_ensemble_aggregates_and_tells_its_spread(settings, expected):
    source = ensemble(**settings)
    assert source.score(scored(SCORES)).tolist() == pytest.approx(expected, abs=1e-6)
    spread = [statistics.pstdev(f * s for f in FACTORS) for s in SCORES]
    assert source.metrics()["reward/ensemble_std"].tolist() == pytest.approx(spread, abs=1e-6)


def test_an_ensemble_needs_a_member_and_a_caution_that_is_one():
    with pytest.raises(UserError, match="EnsembleReward needs at least one reward"):
        EnsembleReward([])
    with pytest.raises(UserError, match=r"num_std must not be negative, got -1\.0"):
        ensemble(num_std=-1.0)


def test_a_critic_starts_from_the_first_member_and_from_no_part_of_a_sum():
    members = [RewardModelScorer("one"), RewardModelScorer("two")]
    assert EnsembleReward(members).critic_init_path() == "one"
    assert WeightedSum(members, [1.0, 1.0]).critic_init_path() is None


def test_a_sum_tells_its_parts_before_their_weights_and_theirs():
    source = WeightedSum([ensemble(), Times(3.0)], [0.5, -1.0], ["quality", "length"])
    assert source.score(scored([1.0, 2.0])).tolist() == pytest.approx([-1.5, -3.0])
    metrics = source.metrics()
    assert list(metrics) == ["reward/quality", "reward/quality_ensemble_std", "reward/length"]
    assert metrics["reward/quality"].tolist() == pytest.approx([3.0, 6.0])
    assert metrics["reward/length"].tolist() == pytest.approx([3.0, 6.0])
    numbered = WeightedSum([Known(), Known()], [1.0, 1.0])
    numbered.score(scored([1.0]))
    assert list(numbered.metrics()) == ["reward/0", "reward/1"]


@pytest.mark.parametrize("names", [["one"], ["one", "one"]])
def test_names_are_one_each(names):
    with pytest.raises(UserError, match="give each a name of its own"):
        WeightedSum([Known(), Known()], [1.0, 1.0], names)


def test_every_part_keeps_its_own_state():
    def make() -> WeightedSum:
        return WeightedSum([NormalizedReward(Known()), ClippedReward(NormalizedReward(Times(4.0)))], [1.0, 1.0])

    source, resumed = make(), make()
    source.score(scored([0.0, 2.0, 10.0]))
    resumed.load_state_dict(source.state_dict())
    torch.testing.assert_close(resumed.score(scored([1.0])), source.score(scored([1.0])))
    with pytest.raises(UserError, match=r"the checkpoint's reward has 2 parts, this recipe's has 1"):
        WeightedSum([Known()], [1.0]).load_state_dict(source.state_dict())
