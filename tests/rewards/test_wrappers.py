"""Wrappers: fixed scale, running normalization, clip; their states, and on two ranks."""

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
from tests.helpers.episodes import ColumnReward, episodes_with_scores
from tests.helpers.ranks import on_ranks

score_lists = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=6)


def test_a_fixed_scale():
    assert ScaledReward(ColumnReward(), mean=3.0, std=2.0).score(episodes_with_scores([3, 5, 0])).tolist() == [
        0.0,
        1.0,
        -1.5,
    ]
    for mean, std in ((math.nan, 1.0), (0.0, 0.0), (0.0, -1.0)):
        with pytest.raises(UserError, match="a finite mean and a positive std"):
            ScaledReward(ColumnReward(), mean, std)


def test_a_clip_and_its_fraction():
    reward = ClippedReward(ColumnReward(), -1.0, 2.0)
    assert reward.score(episodes_with_scores([-5, -1, 0.5, 2, 9])).tolist() == [-1.0, -1.0, 0.5, 2.0, 2.0]
    assert reward.metrics()["reward/clip_fraction"].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    with pytest.raises(UserError, match=r"ClippedReward\.low must be below its high, got 2\.0 and 2\.0"):
        ClippedReward(ColumnReward(), 2.0, 2.0)


def test_a_clip_keeps_scores_that_are_not_finite():
    scores = ClippedReward(ColumnReward(), -1.0, 2.0).score(episodes_with_scores([math.inf, -math.inf, math.nan, 0]))
    assert scores.isfinite().tolist() == [False, False, False, True]


@given(st.lists(score_lists, min_size=1, max_size=4))
def test_the_running_mean_and_std_cover_all_episodes_so_far(rollouts):
    reward, counted = NormalizedReward(ColumnReward()), []
    for rollout in rollouts:
        counted += rollout
        mean, std = statistics.fmean(counted), math.sqrt(statistics.pvariance(counted) + 1e-8)
        expected = [(score - mean) / std for score in rollout]
        assert reward.score(episodes_with_scores(rollout)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_validation_episodes_are_normalized_and_not_counted():
    reward = NormalizedReward(ColumnReward())
    assert reward.score(episodes_with_scores([7.0, 9.0], training=False)).tolist() == [
        7.0,
        9.0,
    ]  # nothing was counted yet
    reward.score(episodes_with_scores([0.0, 2.0]))
    before = reward.state_dict()
    assert reward.score(episodes_with_scores([1.0, 5.0], training=False)).tolist() == pytest.approx([0.0, 4.0])
    assert reward.state_dict() == before


def test_counting_stops_at_max_episodes():
    reward = NormalizedReward(ColumnReward(), max_episodes=3)
    reward.score(episodes_with_scores([0.0, 2.0]))
    assert reward.score(episodes_with_scores([4.0, 6.0])).tolist() == pytest.approx(
        [x / math.sqrt(5) for x in (1.0, 3.0)]
    )
    assert reward.score(episodes_with_scores([100.0])).tolist() == pytest.approx([97 / math.sqrt(5)])
    with pytest.raises(UserError, match=r"NormalizedReward\.max_episodes must be at least 1"):
        NormalizedReward(ColumnReward(), max_episodes=0)


def test_equal_scores_become_zero():
    assert NormalizedReward(ColumnReward()).score(episodes_with_scores([3.0, 3.0])).tolist() == [0.0, 0.0]


def test_the_state_survives_a_restart(tmp_path):
    reward = ClippedReward(NormalizedReward(ColumnReward()))
    reward.score(episodes_with_scores([0.0, 2.0, 10.0]))
    torch.save(reward.state_dict(), tmp_path / "state")
    resumed = ClippedReward(NormalizedReward(ColumnReward()))
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    next_episodes = episodes_with_scores([1.0, 3.0])
    assert resumed.score(next_episodes).tolist() == reward.score(next_episodes).tolist()


def test_a_state_of_another_recipe_is_ignored():
    reward = ClippedReward(NormalizedReward(ColumnReward()))
    for state in ({}, ColumnReward().state_dict(), ClippedReward(ColumnReward()).state_dict()):
        reward.load_state_dict(state)
    assert reward.score(episodes_with_scores([0.0, 2.0])).tolist() == pytest.approx([-1.0, 1.0])
    ColumnReward().load_state_dict({"moments": [1.0, 2.0, 3.0]})


def test_ranks_share_their_moments(tmp_path):
    rollouts = [[0.0, 1.0, 5.0, 2.0], [3.0, -4.0, 8.0, 1.0]]

    def score_on_rank() -> list[list[float]]:
        torch.distributed.init_process_group("gloo")
        rank, reward = torch.distributed.get_rank(), NormalizedReward(ColumnReward())
        return [reward.score(episodes_with_scores(rollout[rank::2])).tolist() for rollout in rollouts]

    rank_0, rank_1 = on_ranks(score_on_rank, tmp_path)
    single = NormalizedReward(ColumnReward())
    for number, rollout in enumerate(rollouts):
        expected = single.score(episodes_with_scores(rollout)).tolist()
        assert rank_0[number] == pytest.approx(expected[::2], abs=1e-6)
        assert rank_1[number] == pytest.approx(expected[1::2], abs=1e-6)


def test_a_wrapper_passes_on_what_a_critic_is_initialized_from():
    model = RewardModelScorer("runs/reward/model")
    assert ClippedReward(NormalizedReward(model)).critic_init_path() == "runs/reward/model"
    assert ClippedReward(ColumnReward()).critic_init_path() is None


@given(score_lists)
def test_wrappers_apply_from_the_inside_out(scores):
    inner = (
        ScaledReward(ClippedReward(ColumnReward(), -1.0, 1.0), mean=0.0, std=0.5)
        .score(episodes_with_scores(scores))
        .tolist()
    )
    assert inner == pytest.approx([2 * min(max(score, -1.0), 1.0) for score in scores])
    outer = ClippedReward(ScaledReward(ColumnReward(), std=0.5), -1.0, 1.0).score(episodes_with_scores(scores)).tolist()
    assert outer == pytest.approx([min(max(2 * score, -1.0), 1.0) for score in scores])
    ranked = [y for _, y in sorted(zip(scores, outer))]
    assert all(one <= two for one, two in pairwise(ranked))
