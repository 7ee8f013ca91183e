"""Weighted sums and ensembles: by Python's own statistics, with their figures and states."""

import statistics

import pytest
import torch
from episodes import Known, Times, scored

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import (
    ClippedReward,
    EnsembleReward,
    NormalisedReward,
    RewardModelReward,
    WeightedSum,
    load_source_state,
    source_critic,
    source_details,
    source_state,
)

FACTORS = (1.0, 2.0, 6.0)
SCORES = [1.0, -2.0, 0.0]


def ensemble(**settings: object) -> EnsembleReward:
    return EnsembleReward([Times(factor) for factor in FACTORS], **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [statistics.fmean(f * s for f in FACTORS) for s in SCORES]),
        ({"aggregation": "minimum"}, [min(f * s for f in FACTORS) for s in SCORES]),
        (
            {"aggregation": "lower_bound", "deviations": 0.5},
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
    assert source_details(source)["reward/ensemble_spread"].tolist() == pytest.approx(spread, abs=1e-6)


def test_an_ensemble_needs_a_member_and_a_caution_that_is_one():
    with pytest.raises(UserError, match="EnsembleReward needs at least one source"):
        EnsembleReward([])
    with pytest.raises(UserError, match=r"deviations must not be negative, got -1\.0"):
        ensemble(deviations=-1.0)


def test_a_critic_starts_from_the_first_member_and_from_no_part_of_a_sum():
    members = [RewardModelReward("one"), RewardModelReward("two")]
    assert source_critic(EnsembleReward(members)) == "one"
    assert source_critic(WeightedSum(members, [1.0, 1.0])) is None


def test_a_sum_tells_its_parts_before_their_weights_and_theirs():
    source = WeightedSum([ensemble(), Times(3.0)], [0.5, -1.0], ["quality", "length"])
    assert source.score(scored([1.0, 2.0])).tolist() == pytest.approx([-1.5, -3.0])
    details = source_details(source)
    assert list(details) == ["reward/part_quality", "reward/part_quality_ensemble_spread", "reward/part_length"]
    assert details["reward/part_quality"].tolist() == pytest.approx([3.0, 6.0])
    assert details["reward/part_length"].tolist() == pytest.approx([3.0, 6.0])
    numbered = WeightedSum([Known(), Known()], [1.0, 1.0])
    numbered.score(scored([1.0]))
    assert list(source_details(numbered)) == ["reward/part_0", "reward/part_1"]


@pytest.mark.parametrize("names", [["one"], ["one", "one"]])
def test_names_are_one_each(names):
    with pytest.raises(UserError, match="give each a name of its own"):
        WeightedSum([Known(), Known()], [1.0, 1.0], names)


def test_every_part_keeps_its_own_state():
    def make() -> WeightedSum:
        return WeightedSum([NormalisedReward(Known()), ClippedReward(NormalisedReward(Times(4.0)))], [1.0, 1.0])

    source, resumed = make(), make()
    source.score(scored([0.0, 2.0, 10.0]))
    load_source_state(resumed, source_state(source))
    torch.testing.assert_close(resumed.score(scored([1.0])), source.score(scored([1.0])))
    with pytest.raises(UserError, match=r"the checkpoint's reward has 2 sources, this recipe's has 1"):
        load_source_state(WeightedSum([Known()], [1.0]), source_state(source))
