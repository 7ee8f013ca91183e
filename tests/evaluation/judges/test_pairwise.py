"""From verdicts to a win rate: both orders, position bias, ties, missing verdicts; length control."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import CompletionPair, Judge, Verdict
from lit_rlhf.evaluation.judges.pairwise import compare_completions
from lit_rlhf.evaluation.length_control import length_controlled_win_rate
from lit_rlhf.evaluation.models.generation import Completion

NO_CACHE = Cache(None)


def pair(first: str, second: str, prompt: str = "p") -> CompletionPair:
    return CompletionPair(prompt, {}, Completion(first, True, len(first)), Completion(second, True, len(second)))


class LongestJudge(Judge):
    """Prefers the longer completion and records the pairs."""

    def __init__(self, is_order_sensitive: bool = True) -> None:
        self.is_order_sensitive, self.calls = is_order_sensitive, []

    def compare(self, pairs, cache):
        self.calls.append([(pair.first.text, pair.second.text) for pair in pairs])
        sizes = [(len(pair.first.text), len(pair.second.text)) for pair in pairs]
        return [[Verdict("longest", 0.5 if a == b else float(a > b))] for a, b in sizes]


class FirstPositionJudge(Judge):
    """Always prefers the completion that is shown first."""

    def compare(self, pairs, cache):
        return [[Verdict("first", 1.0)] for _ in pairs]


class FailingJudge(Judge):
    """Has no verdict if the first completion starts with a question mark."""

    def compare(self, pairs, cache):
        return [[Verdict("failing", None if pair.first.text.startswith("?") else 1.0)] for pair in pairs]


def test_both_orders_are_compared_and_mirrored() -> None:
    judge = LongestJudge()
    result = compare_completions(judge, [pair("aaa", "b"), pair("a", "bb"), pair("aa", "bb")], NO_CACHE)
    assert judge.calls == [[("aaa", "b"), ("a", "bb"), ("aa", "bb")], [("b", "aaa"), ("bb", "a"), ("bb", "aa")]]
    assert [vote.preference for vote in result.verdicts] == [1, 1, 0, 0, 0.5, 0.5]
    assert [vote.pair_index for vote in result.verdicts] == [0, 0, 1, 1, 2, 2]
    assert result.length_differences == [2, 2, -1, -1, 0, 0]
    metrics = result.compute_metrics()
    assert metrics["win rate"].value == 0.5
    assert metrics["ties"].value == pytest.approx(1 / 3)
    assert metrics["first shown preferred"].value == 0.5
    assert metrics["same in both orders"].value == 1.0


def test_a_position_bias_cancels_and_is_measured() -> None:
    metrics = compare_completions(FirstPositionJudge(), [pair("a", "b"), pair("c", "d")], NO_CACHE).compute_metrics()
    assert metrics["win rate"].value == 0.5
    assert metrics["first shown preferred"].value == 1.0
    assert metrics["same in both orders"].value == 0.0


@pytest.mark.parametrize("judge", [LongestJudge(), LongestJudge(is_order_sensitive=False), FirstPositionJudge()])
def test_a_model_against_itself_is_exactly_one_half(judge) -> None:
    won = compare_completions(judge, [pair(text, text) for text in ("a", "bb", "", "ccc")], NO_CACHE).compute_win_rate()
    assert (won.rate, won.low, won.high) == (0.5, 0.5, 0.5)


def test_identical_texts_are_a_tie_without_a_verdict() -> None:
    judge = LongestJudge()
    compare_completions(judge, [pair("a", "a"), pair("a", "bb")], NO_CACHE)
    assert judge.calls == [[("a", "bb")], [("bb", "a")]]


def test_a_verdict_in_one_order_only_is_missing_and_no_loss() -> None:
    result = compare_completions(FailingJudge(), [pair("?", "b"), pair("a", "b"), pair("a", "?")], NO_CACHE)
    assert result.num_missing == 2
    assert [vote.pair_index for vote in result.verdicts] == [1, 1]
    metrics = compare_completions(FailingJudge(), [pair("?", "??")], NO_CACHE).compute_metrics()
    assert (metrics["win rate"].value, metrics["win rate"].missing) == (None, 1)


def test_the_interval_counts_both_orders_of_a_prompt_once() -> None:
    pairs = [pair("aa", "b")] * 30 + [pair("a", "bb")] * 70
    won = compare_completions(LongestJudge(), pairs, NO_CACHE).compute_win_rate()
    margin = 1.959963984540054 * math.sqrt(0.3 * 0.7 / 99)
    assert (won.rate, won.count) == (pytest.approx(0.3), 200)
    assert won.high - won.low == pytest.approx(2 * margin, abs=1e-12)


def test_length_control_without_a_difference_is_the_win_rate() -> None:
    assert length_controlled_win_rate([1, 1, 0, 0.5], [3, 3, 3, 3]) == pytest.approx(0.625)
    assert length_controlled_win_rate([1, 0, 1, 1], [0, 0, 0, 0]) == 0.75
    assert length_controlled_win_rate([1, 1], [5, -5]) == 1.0


def test_length_control_finds_the_constant_of_a_logistic_model() -> None:
    rng = random.Random(1)
    differences = [rng.gauss(30, 40) for _ in range(20_000)]
    spread = math.sqrt(sum((d - sum(differences) / 20_000) ** 2 for d in differences) / 20_000)
    truth, effect = -0.4, 1.2
    chance = [1 / (1 + math.exp(-(truth + effect * math.tanh(d / spread)))) for d in differences]
    preferences = [float(rng.random() < p) for p in chance]
    assert sum(preferences) / 20_000 > 0.53
    controlled = length_controlled_win_rate(preferences, differences)
    assert controlled == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.015)


def test_length_control_is_one_half_if_length_alone_decides() -> None:
    differences = [float(d) for d in range(-50, 150) if d]
    preferences = [float(d > 0) for d in differences]
    assert sum(preferences) / len(preferences) > 0.7
    assert length_controlled_win_rate(preferences, differences) == pytest.approx(0.5, abs=0.05)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-60, 60)), min_size=2, max_size=40))
def test_swapping_the_models_mirrors_the_controlled_rate(rows) -> None:
    preferences, differences = zip(*rows)
    there = length_controlled_win_rate(preferences, differences)
    back = length_controlled_win_rate([1 - p for p in preferences], [-d for d in differences])
    assert there == pytest.approx(1 - back, abs=1e-6)
