"""From verdicts to a win rate: both orders, ties, position bias, missing verdicts."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import CompletionPair, Judge, Verdict
from lit_rlhf.evaluation.length_control import length_controlled_win_rate
from lit_rlhf.evaluation.results import MetricValue, compute_mean_metric
from lit_rlhf.evaluation.win_rate import WinRate, win_rate


class PairVerdict(NamedTuple):
    """One verdict as preference for the model's completion, whichever was shown first."""

    pair_index: int  # the cluster of the interval: verdicts on one prompt are not independent
    judge: str
    preference: float  # 1: the model's completion is better than the baseline's
    reason: str


class ComparisonResult(NamedTuple):
    """Verdicts of a judge, or of a group of labelers, on a set of pairs."""

    verdicts: list[PairVerdict]
    num_missing: int  # verdicts that failed, or exist for one order only
    first_position_preferences: list[float]  # of both orders alternating: preference for the completion shown first
    order_consistency: list[float]  # per pair and judge: 1 if both orders gave the same verdict
    length_differences: list[float]  # per verdict: tokens of the model's completion minus the baseline's

    def compute_win_rate(self) -> WinRate:
        """Return the win rate with its interval, clustered by prompt."""
        return win_rate([each.preference for each in self.verdicts], [each.pair_index for each in self.verdicts])

    def _mean_per_pair(self, values: Sequence[float]) -> list[float]:
        """Return the mean over the verdicts on each pair: an interval counts a prompt once, whatever its verdicts."""
        by_pair: dict[int, list[float]] = defaultdict(list)
        for verdict, value in zip(self.verdicts, values, strict=True):
            by_pair[verdict.pair_index].append(value)
        return [sum(each) / len(each) for each in by_pair.values()]

    def compute_metrics(self) -> dict[str, MetricValue]:
        """Return all metrics of the comparison by name."""
        ties = compute_mean_metric(self._mean_per_pair([float(v.preference == 0.5) for v in self.verdicts]), better="")
        metrics = {"win rate": MetricValue(None, missing=self.num_missing), "ties": ties}
        if self.verdicts:
            rate = self.compute_win_rate()
            preferences = [verdict.preference for verdict in self.verdicts]
            controlled = length_controlled_win_rate(preferences, self.length_differences)
            metrics["win rate"] = MetricValue(rate.rate, rate.count, rate.low, rate.high, self.num_missing)
            metrics["win rate at equal length"] = MetricValue(controlled, rate.count, missing=self.num_missing)
            metrics["longer by"] = compute_mean_metric(self._mean_per_pair(self.length_differences), "tokens", "")
        if self.first_position_preferences:
            both_orders = zip(self.first_position_preferences[::2], self.first_position_preferences[1::2])
            position_bias = [(one + other) / 2 for one, other in both_orders]
            metrics["first shown preferred"] = compute_mean_metric(position_bias, better="")
            metrics["same in both orders"] = compute_mean_metric(self.order_consistency)
        return metrics


def compare_completions(judge: Judge, pairs: Sequence[CompletionPair], cache: Cache) -> ComparisonResult:
    """Let a judge compare the model's completions (first) with the baseline's (second).

    An order-sensitive judge compares each pair in both orders, and both verdicts count; if one of them is missing, the
    other is excluded too, for alone it would carry the judge's position bias. Two identical texts are a tie without a
    verdict of such a judge, so a model against itself has exactly 0.5.

    Args:
        judge: compares the pairs.
        pairs: the model's completion first.
        cache: for expensive verdicts.
    """
    if not judge.is_order_sensitive:
        verdicts_by_pair = judge.compare(list(pairs), cache)
        verdicts = [
            PairVerdict(i, verdict.judge, verdict.preference, verdict.reason)
            for i, on_pair in enumerate(verdicts_by_pair)
            for verdict in on_pair
            if verdict.preference is not None
        ]
        num_missing = sum(verdict.preference is None for on_pair in verdicts_by_pair for verdict in on_pair)
        return ComparisonResult(verdicts, num_missing, [], [], compute_length_differences(verdicts, pairs))
    different = [i for i, pair in enumerate(pairs) if pair.first.text != pair.second.text]
    forward = judge.compare([pairs[i] for i in different], cache)
    swapped = judge.compare([pairs[i]._replace(first=pairs[i].second, second=pairs[i].first) for i in different], cache)
    verdicts, num_missing = [], 0
    first_position_preferences: list[float] = []
    order_consistency: list[float] = []
    for i, forward_verdicts, swapped_verdicts in zip(different, forward, swapped, strict=True):
        for one, other in match_orders(forward_verdicts, swapped_verdicts):
            if one.preference is None or other.preference is None:
                num_missing += 1
                continue
            mirrored = 1.0 - other.preference
            verdicts += [
                PairVerdict(i, one.judge, one.preference, one.reason),
                PairVerdict(i, other.judge, mirrored, other.reason),
            ]
            first_position_preferences += [one.preference, other.preference]
            order_consistency.append(float(one.preference == mirrored))
    judges = list(dict.fromkeys(verdict.judge for verdict in verdicts)) or ["rule"]
    for i in sorted(set(range(len(pairs))) - set(different)):
        verdicts += [PairVerdict(i, name, 0.5, "the same text") for name in judges for _ in range(2)]
    length_differences = compute_length_differences(verdicts, pairs)
    return ComparisonResult(verdicts, num_missing, first_position_preferences, order_consistency, length_differences)


def match_orders(forward: Sequence[Verdict], swapped: Sequence[Verdict]) -> list[tuple[Verdict, Verdict]]:
    """Return each judge's verdicts in both orders; the second has no preference if it is missing."""
    by_judge = {verdict.judge: verdict for verdict in swapped}
    return [(verdict, by_judge.get(verdict.judge, Verdict(verdict.judge, None))) for verdict in forward]


def compute_length_differences(verdicts: Sequence[PairVerdict], pairs: Sequence[CompletionPair]) -> list[float]:
    """Return the length difference of each verdict's pair, first minus second, in tokens."""
    return [
        float(pairs[verdict.pair_index].first.num_tokens - pairs[verdict.pair_index].second.num_tokens)
        for verdict in verdicts
    ]
