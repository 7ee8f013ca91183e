"""Steps that wrap a source: fixed scale, running normalisation, clip; their states, and on two ranks."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.rewards import (
    ClippedReward,
    NormalizedReward,
    RewardModelScorer,
    ScaledReward,
)
from tests.helpers.episodes import Known, scored
from tests.helpers.ranks import on_ranks

some = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6)


def test_a_fixed_scale():
    assert ScaledReward(Known(), mean=3.0, std=2.0).score(scored([3, 5, 0])).tolist() == [0.0, 1.0, -1.5]
    for mean, std in ((math.nan, 1.0), (0.0, 0.0), (0.0, -1.0)):
        with pytest.raises(UserError, match="a finite mean and a positive std"):
            ScaledReward(Known(), mean, std)


def test_a_clip_and_what_it_clipped():
    source = ClippedReward(Known(), -1.0, 2.0)
    assert source.score(scored([-5, -1, 0.5, 2, 9])).tolist() == [-1.0, -1.0, 0.5, 2.0, 2.0]
    assert source.metrics()["reward/clip_fraction"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    with pytest.raises(UserError, match=r"ClippedReward\.low must be below its high, got 2\.0 and 2\.0"):
        ClippedReward(Known(), 2.0, 2.0)


def test_a_clip_hides_no_score_that_is_no_number():
    scores = ClippedReward(Known(), -1.0, 2.0).score(scored([math.inf, -math.inf, math.nan, 0]))
    assert scores.isfinite().tolist() == [False, False, False, True]


@given(st.lists(some, min_size=1, max_size=4))
def test_the_running_mean_and_deviation_are_those_of_all_so_far(rollouts):
    source, seen = NormalizedReward(Known()), []
    for rollout in rollouts:
        seen += rollout
        mean, deviation = statistics.fmean(seen), math.sqrt(statistics.pvariance(seen) + 1e-8)
        expected = [(score - mean) / deviation for score in rollout]
        assert source.score(scored(rollout)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_validation_is_normalised_and_not_counted():
    source = NormalizedReward(Known())
    assert source.score(scored([7.0, 9.0], training=False)).tolist() == [7.0, 9.0]  # nothing is known yet
    source.score(scored([0.0, 2.0]))
    before = source.state_dict()
    assert source.score(scored([1.0, 5.0], training=False)).tolist() == pytest.approx([0.0, 4.0])
    assert source.state_dict() == before


def test_counting_may_end():
    source = NormalizedReward(Known(), episodes=3)
    source.score(scored([0.0, 2.0]))
    assert source.score(scored([4.0, 6.0])).tolist() == pytest.approx([x / math.sqrt(5) for x in (1.0, 3.0)])
    assert source.score(scored([100.0])).tolist() == pytest.approx([97 / math.sqrt(5)])
    with pytest.raises(UserError, match=r"NormalizedReward\.episodes must be at least 1"):
        NormalizedReward(Known(), episodes=0)


def test_equal_scores_become_zero():
    assert NormalizedReward(Known()).score(scored([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_the_state_survives_a_restart(tmp_path):
    source = ClippedReward(NormalizedReward(Known()))
    source.score(scored([0.0, 2.0, 10.0]))
    torch.save(source.state_dict(), tmp_path / "state")
    resumed = ClippedReward(NormalizedReward(Known()))
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    after = scored([1.0, 3.0])
    assert resumed.score(after).tolist() == source.score(after).tolist()


def test_a_state_of_another_recipe_is_left_alone():
    source = ClippedReward(NormalizedReward(Known()))
    for state in ({}, Known().state_dict(), ClippedReward(Known()).state_dict()):
        source.load_state_dict(state)
    assert source.score(scored([0.0, 2.0])).tolist() == pytest.approx([-1.0, 1.0])
    Known().load_state_dict({"moments": [1.0, 2.0, 3.0]})


def test_ranks_share_their_moments(tmp_path):
    rows = [[0.0, 1.0, 5.0, 2.0], [3.0, -4.0, 8.0, 1.0]]

    def rank() -> list[list[float]]:
        torch.distributed.init_process_group("gloo")
        me, source = torch.distributed.get_rank(), NormalizedReward(Known())
        return [source.score(scored(rollout[me::2])).tolist() for rollout in rows]

    one, other = on_ranks(rank, tmp_path)
    alone = NormalizedReward(Known())
    for number, rollout in enumerate(rows):
        expected = alone.score(scored(rollout)).tolist()
        assert one[number] == pytest.approx(expected[::2], abs=1e-6)
        assert other[number] == pytest.approx(expected[1::2], abs=1e-6)


def test_a_step_passes_on_the_reward_model_a_critic_starts_from():
    model = RewardModelScorer("runs/reward/model")
    assert ClippedReward(NormalizedReward(model)).critic_init_path() == "runs/reward/model"
    assert ClippedReward(Known()).critic_init_path() is None


@given(some)
def test_steps_compose_in_the_order_they_are_written(scores):
    inner = ScaledReward(ClippedReward(Known(), -1.0, 1.0), mean=0.0, std=0.5).score(scored(scores)).tolist()
    assert inner == pytest.approx([2 * min(max(score, -1.0), 1.0) for score in scores])
    outer = ClippedReward(ScaledReward(Known(), std=0.5), -1.0, 1.0).score(scored(scores)).tolist()
    assert outer == pytest.approx([min(max(2 * score, -1.0), 1.0) for score in scores])
    ranked = [y for _, y in sorted(zip(scores, outer))]
    assert all(one <= two for one, two in pairwise(ranked))
