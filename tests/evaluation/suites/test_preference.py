"""The win rate and its interval against closed forms."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.win_rate import WinRate, win_rate

VERDICTS = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=60)


def test_independent_comparisons_have_the_variance_of_a_bernoulli_mean() -> None:
    result = win_rate([1.0] * 30 + [0.0] * 70)
    margin = 1.959963984540054 * math.sqrt(0.3 * 0.7 / 99)
    assert result.count == 100
    assert result.rate == pytest.approx(0.3, abs=1e-15)
    assert result.low == pytest.approx(0.3 - margin, abs=1e-14)
    assert result.high == pytest.approx(0.3 + margin, abs=1e-14)


def test_two_clusters_by_hand() -> None:
    # rate 0.4; residual sums: (0.6 + 0.6 - 0.4) = 0.8 and (-0.4 - 0.4) = -0.8; variance 2/1 * 2 * 0.64 / 25 = 0.1024
    result = win_rate([1, 1, 0, 0, 0], ["a", "a", "a", "b", "b"])
    assert result.rate == pytest.approx(0.4, abs=1e-15)
    assert result.low == 0.0  # 0.4 - 1.96 * 0.32 is below 0
    assert result.high == 1.0  # 0.4 + 1.96 * 0.32 = 1.027


def test_unequal_clusters_by_hand() -> None:
    # 20 clusters of one comparison (10 wins) and one of two ties: rate 11 / 22; variance 21/20 * 20 * 0.25 / 484
    result = win_rate([1.0] * 10 + [0.0] * 10 + [0.5, 0.5], [*range(20), 20, 20])
    margin = 1.959963984540054 * math.sqrt(21 / 20 * 5 / 484)
    assert (result.rate, result.count) == (0.5, 22)
    assert result.high - result.low == pytest.approx(2 * margin, abs=1e-14)


@given(VERDICTS, st.integers(2, 6))
def test_judges_who_always_agree_count_as_one(verdicts: list[float], judges: int) -> None:
    one = win_rate(verdicts)
    repeated = win_rate(
        [v for v in verdicts for _ in range(judges)], [i for i in range(len(verdicts)) for _ in range(judges)]
    )
    assert repeated[:3] == pytest.approx(one[:3], abs=1e-12)
    assert repeated.count == judges * one.count


@given(VERDICTS)
def test_swapping_the_models_mirrors_the_interval(verdicts: list[float]) -> None:
    there, back = win_rate(verdicts), win_rate([1 - v for v in verdicts])
    assert (1 - back.rate, 1 - back.high, 1 - back.low) == pytest.approx(there[:3], abs=1e-12)
    assert 0 <= there.low <= there.rate <= there.high <= 1


def test_a_model_against_itself_is_exactly_one_half() -> None:
    assert win_rate([0.5] * 7) == WinRate(0.5, 0.5, 0.5, 7)
    assert win_rate([0.5] * 999, [i // 3 for i in range(999)]) == WinRate(0.5, 0.5, 0.5, 999)


def test_one_cluster_tells_nothing_of_its_spread() -> None:
    assert win_rate([1, 0.5, 1, 1], ["prompt"] * 4) == WinRate(0.875, 0.0, 1.0, 4)
    assert win_rate([1]) == WinRate(1.0, 0.0, 1.0, 1)


def test_the_interval_covers_the_truth_in_19_of_20_samples() -> None:
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        verdicts, prompts = [], []
        for prompt in range(100):
            liked = rng.random()  # judges of one prompt share how likely the response is to win: mean 1/2
            verdicts += [float(rng.random() < liked) for _ in range(4)]
            prompts += [prompt] * 4
        result = win_rate(verdicts, prompts)
        covered += result.low <= 0.5 <= result.high
    assert 0.935 < covered / 2000 < 0.965


@pytest.mark.parametrize("preferences, words", [([], "no comparisons"), ([1, 0.7], "comparison 1 has preference 0.7")])
def test_refuses_what_is_no_verdict(preferences: list[float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        win_rate(preferences)


def test_refuses_nan_and_unpaired_clusters() -> None:
    with pytest.raises(UserError, match="preference nan"):
        win_rate([math.nan, 1.0])
    with pytest.raises(AssertionError, match="1 cluster labels for 2 comparisons"):
        win_rate([1.0, 0.0], ["a"])
