"""Weighted sums and ensembles against Python's own statistics; their metrics and states."""

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
from lit_rlhf.rewards.base import RESERVED_NAMES
from lit_rlhf.rollout.experience import Trajectories
from lit_rlhf.rollout.metrics import compute_rollout_metrics
from tests.helpers.episodes import ColumnReward, ScaledColumnReward, episodes_with_scores

FACTORS = (1.0, 2.0, 6.0)
SCORES = [1.0, -2.0, 0.0]


def make_ensemble(**settings: object) -> EnsembleReward:
    return EnsembleReward([ScaledColumnReward(factor) for factor in FACTORS], **settings)


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
def test_an_ensemble_aggregates_and_logs_its_standard_deviation(settings, expected):
    reward = make_ensemble(**settings)
    assert reward.score(episodes_with_scores(SCORES)).tolist() == pytest.approx(expected, abs=1e-6)
    std = [statistics.pstdev(f * s for f in FACTORS) for s in SCORES]
    assert reward.metrics()["reward/ensemble_std"].tolist() == pytest.approx(std, abs=1e-6)


def test_an_ensemble_needs_members_and_a_num_std_that_is_not_negative():
    with pytest.raises(UserError, match="EnsembleReward needs at least one reward"):
        EnsembleReward([])
    with pytest.raises(UserError, match=r"num_std must not be negative, got -1\.0"):
        make_ensemble(num_std=-1.0)


def test_a_critic_is_initialized_from_the_first_member_and_from_no_part_of_a_sum():
    members = [RewardModelScorer("one"), RewardModelScorer("two")]
    assert EnsembleReward(members).critic_init_path() == "one"
    assert WeightedSum(members, [1.0, 1.0]).critic_init_path() is None


def test_a_sum_logs_the_scores_of_its_parts_before_the_weights_and_their_metrics():
    reward = WeightedSum([make_ensemble(), ScaledColumnReward(3.0)], [0.5, -1.0], ["quality", "length"])
    assert reward.score(episodes_with_scores([1.0, 2.0])).tolist() == pytest.approx([-1.5, -3.0])
    metrics = reward.metrics()
    assert list(metrics) == ["reward/quality", "reward/quality_ensemble_std", "reward/length"]
    assert metrics["reward/quality"].tolist() == pytest.approx([3.0, 6.0])
    assert metrics["reward/length"].tolist() == pytest.approx([3.0, 6.0])
    numbered = WeightedSum([ColumnReward(), ColumnReward()], [1.0, 1.0])
    numbered.score(episodes_with_scores([1.0]))
    assert list(numbered.metrics()) == ["reward/0", "reward/1"]


@pytest.mark.parametrize("names", [["one"], ["one", "one"]])
def test_names_must_differ(names):
    with pytest.raises(UserError, match="give each a name of its own"):
        WeightedSum([ColumnReward(), ColumnReward()], [1.0, 1.0], names)


@pytest.mark.parametrize("name", ["score", "score_std", "kl", "kl_k2", "kl_k3", "kl_coefficient", "kl_penalized_score"])
def test_names_of_ppos_own_metrics_are_refused(name):
    with pytest.raises(UserError, match=f"a part cannot be named '{name}': reward/{name} is PPO's own metric"):
        WeightedSum([ColumnReward(), ColumnReward()], [1.0, 1.0], ["helpful", name])


def test_all_of_ppos_reward_metrics_are_reserved_names():
    mask = torch.ones(2, 3, dtype=torch.bool)
    zeros = torch.zeros(2, 3)
    trajectories = Trajectories(
        input_ids=mask.long(),
        attention_mask=mask.long(),
        response_mask=mask,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=torch.zeros(2),
        finished=mask[:, 0],
        rollout_logprobs=zeros,
        prompt_index=torch.arange(2),
    )
    metrics = compute_rollout_metrics(trajectories, 0.1, zeros, zeros)
    assert {name.removeprefix("reward/") for name in metrics if name.startswith("reward/")} == RESERVED_NAMES


def test_every_part_keeps_its_own_state():
    def make() -> WeightedSum:
        return WeightedSum(
            [NormalizedReward(ColumnReward()), ClippedReward(NormalizedReward(ScaledColumnReward(4.0)))], [1.0, 1.0]
        )

    reward, resumed = make(), make()
    reward.score(episodes_with_scores([0.0, 2.0, 10.0]))
    resumed.load_state_dict(reward.state_dict())
    torch.testing.assert_close(resumed.score(episodes_with_scores([1.0])), reward.score(episodes_with_scores([1.0])))
    with pytest.raises(UserError, match=r"the checkpoint's reward has 2 parts, this recipe's has 1"):
        WeightedSum([ColumnReward()], [1.0]).load_state_dict(reward.state_dict())
