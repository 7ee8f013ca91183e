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
    load_source_state,
    source_critic,
    source_details,
    source_state,
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
    assert source_details(source)["reward/ensemble_std"].tolist() == pytest.approx(spread, abs=1e-6)


def test_an_ensemble_needs_a_member_and_a_caution_that_is_one():
    with pytest.raises(UserError, match="EnsembleReward needs at least one source"):
        EnsembleReward([])
    with pytest.raises(UserError, match=r"num_std must not be negative, got -1\.0"):
        ensemble(num_std=-1.0)


def test_a_critic_starts_from_the_first_member_and_from_no_part_of_a_sum():
    members = [RewardModelScorer("one"), RewardModelScorer("two")]
    assert source_critic(EnsembleReward(members)) == "one"
    assert source_critic(WeightedSum(members, [1.0, 1.0])) is None


def test_a_sum_tells_its_parts_before_their_weights_and_theirs():
    source = WeightedSum([ensemble(), Times(3.0)], [0.5, -1.0], ["quality", "length"])
    assert source.score(scored([1.0, 2.0])).tolist() == pytest.approx([-1.5, -3.0])
    details = source_details(source)
    assert list(details) == ["reward/quality", "reward/quality_ensemble_spread", "reward/length"]
    assert details["reward/quality"].tolist() == pytest.approx([3.0, 6.0])
    assert details["reward/length"].tolist() == pytest.approx([3.0, 6.0])
    numbered = WeightedSum([Known(), Known()], [1.0, 1.0])
    numbered.score(scored([1.0]))
    assert list(source_details(numbered)) == ["reward/0", "reward/1"]


@pytest.mark.parametrize("names", [["one"], ["one", "one"]])
def test_names_are_one_each(names):
    with pytest.raises(UserError, match="give each a name of its own"):
        WeightedSum([Known(), Known()], [1.0, 1.0], names)


def test_every_part_keeps_its_own_state():
    def make() -> WeightedSum:
        return WeightedSum([NormalizedReward(Known()), ClippedReward(NormalizedReward(Times(4.0)))], [1.0, 1.0])

    source, resumed = make(), make()
    source.score(scored([0.0, 2.0, 10.0]))
    load_source_state(resumed, source_state(source))
    torch.testing.assert_close(resumed.score(scored([1.0])), source.score(scored([1.0])))
    with pytest.raises(UserError, match=r"the checkpoint's reward has 2 sources, this recipe's has 1"):
        load_source_state(WeightedSum([Known()], [1.0]), source_state(source))
