"""From opinions to a win rate: both orders, ties, position bias, what is missing."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import AnswerPair, Judge, Verdict
from lit_rlhf.evaluation.length_control import length_controlled_win_rate
from lit_rlhf.evaluation.results import MetricValue, mean_of
from lit_rlhf.evaluation.win_rate import WinRate, win_rate


class Vote(NamedTuple):
    """One verdict, turned to the model's side."""

    pair: int  # the cluster: verdicts on one prompt belong together
    judge: str
    preference: float  # 1: the model's answer is better than the baseline's
    reason: str


class ComparisonResult(NamedTuple):
    """What a judge, or a group of labelers, made of a set of pairs."""

    votes: list[Vote]
    missing: int  # opinions that did not come, or came in one order only
    first_shown: list[float]  # verdicts in both orders, as preference for the answer shown first
    consistent: list[float]  # 1 where both orders gave the same verdict
    differences: list[float]  # length of the model's answer minus the baseline's, in tokens, of each vote

    def rate(self) -> WinRate:
        """Return the win rate with its interval, clustered by prompt."""
        return win_rate([vote.preference for vote in self.votes], [vote.pair for vote in self.votes])

    def _by_pair(self, values: Sequence[float]) -> list[float]:
        """Return the mean over the votes on each pair: an interval counts a prompt once, however many judge it."""
        own: dict[int, list[float]] = defaultdict(list)
        for vote, value in zip(self.votes, values, strict=True):
            own[vote.pair].append(value)
        return [sum(each) / len(each) for each in own.values()]

    def metrics(self) -> dict[str, MetricValue]:
        """Return everything the report shows of a comparison."""
        ties = mean_of(self._by_pair([float(vote.preference == 0.5) for vote in self.votes]), better="")
        found = {"win rate": MetricValue(None, missing=self.missing), "ties": ties}
        if self.votes:
            won = self.rate()
            controlled = length_controlled_win_rate([vote.preference for vote in self.votes], self.differences)
            found["win rate"] = MetricValue(won.rate, won.count, won.low, won.high, self.missing)
            found["win rate at equal length"] = MetricValue(controlled, won.count, missing=self.missing)
            found["longer by"] = mean_of(self._by_pair(self.differences), "tokens", "")
        if self.first_shown:
            both = zip(self.first_shown[::2], self.first_shown[1::2])
            found["first shown preferred"] = mean_of([(one + other) / 2 for one, other in both], better="")
            found["same in both orders"] = mean_of(self.consistent)
        return found


def compare_answers(judge: Judge, pairs: Sequence[AnswerPair], cache: Cache) -> ComparisonResult:
    """Have a judge compare the model's answers (first) with the baseline's (second).

    A judge that sees an order is asked in both, and both verdicts count; where one of them is missing, the other is
    left out as well, for alone it would carry the judge's bias for a position. Two answers of the same text are a tie
    and such a judge is not asked, so a model against itself has exactly 0.5.

    Args:
        judge: who decides.
        pairs: the model's answer first.
        cache: for what is costly.
    """
    if not getattr(judge, "sees_order", True):
        there = judge.compare(list(pairs), cache)
        votes = [
            Vote(i, opinion.judge, opinion.preference, opinion.reason)
            for i, opinions in enumerate(there)
            for opinion in opinions
            if opinion.preference is not None
        ]
        missing = sum(opinion.preference is None for opinions in there for opinion in opinions)
        return ComparisonResult(votes, missing, [], [], differences_of(votes, pairs))
    asked = [i for i, pair in enumerate(pairs) if pair.first.text != pair.second.text]
    there = judge.compare([pairs[i] for i in asked], cache)
    turned = [pairs[i]._replace(first=pairs[i].second, second=pairs[i].first) for i in asked]
    back = judge.compare(turned, cache)
    votes, missing = [], 0
    first_shown: list[float] = []
    consistent: list[float] = []
    for i, opinions, others in zip(asked, there, back, strict=True):
        for one, other in matched(opinions, others):
            if one.preference is None or other.preference is None:
                missing += 1
                continue
            mirrored = 1.0 - other.preference
            votes += [Vote(i, one.judge, one.preference, one.reason), Vote(i, other.judge, mirrored, other.reason)]
            first_shown += [one.preference, other.preference]
            consistent.append(float(one.preference == mirrored))
    names = list(dict.fromkeys(vote.judge for vote in votes)) or ["rule"]
    for i in sorted(set(range(len(pairs))) - set(asked)):
        votes += [Vote(i, name, 0.5, "the same text") for name in names for _ in range(2)]
    return ComparisonResult(votes, missing, first_shown, consistent, differences_of(votes, pairs))


def matched(opinions: Sequence[Verdict], others: Sequence[Verdict]) -> list[tuple[Verdict, Verdict]]:
    """Return the opinions of each judge in both orders; one that spoke only once has a missing second."""
    theirs = {opinion.judge: opinion for opinion in others}
    return [(opinion, theirs.get(opinion.judge, Verdict(opinion.judge, None))) for opinion in opinions]


def differences_of(votes: Sequence[Vote], pairs: Sequence[AnswerPair]) -> list[float]:
    """Return the difference of length behind each vote."""
    return [float(pairs[vote.pair].first.tokens - pairs[vote.pair].second.tokens) for vote in votes]
