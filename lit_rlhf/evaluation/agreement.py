"""Agreement between judges or labelers on the items that both compared (InstructGPT, section 3.4)."""

from collections.abc import Hashable, Mapping
from itertools import combinations
from math import sqrt
from typing import Generic, NamedTuple, TypeVar

from lit_rlhf.evaluation.win_rate import Z_95

Item = TypeVar("Item", bound=Hashable)
ItemPreferences = Mapping[Item, float]  # item -> 1: the first is better, 0.5: tie, 0: the second is better


class JointDecision(NamedTuple, Generic[Item]):
    """Preferences of two judges on an item that neither called a tie."""

    item: Item
    first: float  # 1 or 0, of the first judge
    second: float  # 1 or 0, of the second judge

    @property
    def agrees(self) -> bool:
        """Whether both judges prefer the same completion."""
        return self.first == self.second


class Agreement(NamedTuple):
    """Agreement of two judges."""

    share: float | None  # fraction of the items decided by both on which they agree; None without such an item
    kappa: float | None  # Cohen's: 0 is chance, 1 is perfect; None if chance agreement is perfect
    count: int  # type: ignore[assignment]  # items decided by both; hides tuple.count
    ties: int  # items that either called a tie, excluded
    margin: float | None  # half width of the 95 % interval of the share


def match_decisions(
    first: ItemPreferences[Item], second: ItemPreferences[Item]
) -> tuple[list[JointDecision[Item]], int]:
    """Return the items that both judges decided, in the order of the first, and how many either called a tie."""
    shared = [JointDecision(item, first[item], second[item]) for item in first if item in second]
    decided = [decision for decision in shared if decision.first != 0.5 and decision.second != 0.5]
    return decided, len(shared) - len(decided)


def compute_agreement(first: ItemPreferences[Item], second: ItemPreferences[Item]) -> Agreement:
    """Return the agreement of two judges; ties are excluded, as in the paper."""
    decided, ties = match_decisions(first, second)
    count = len(decided)
    if not count:
        return Agreement(None, None, 0, ties, None)
    share = sum(decision.agrees for decision in decided) / count
    first_rate, second_rate = sum(each.first for each in decided) / count, sum(each.second for each in decided) / count
    chance = first_rate * second_rate + (1 - first_rate) * (1 - second_rate)
    kappa = (share - chance) / (1 - chance) if chance < 1 else None
    return Agreement(share, kappa, count, ties, Z_95 * sqrt(share * (1 - share) / count))


def compute_mean_agreement(preferences: Mapping[str, ItemPreferences[Item]]) -> float | None:
    """Return the agreement over all pairs of judges, each weighted by its number of items; None without any item.

    Args:
        preferences: judge -> preferences.
    """
    pairs = [compute_agreement(preferences[one], preferences[other]) for one, other in combinations(preferences, 2)]
    count = sum(pair.count for pair in pairs)
    return sum(pair.share * pair.count for pair in pairs if pair.share is not None) / count if count else None
