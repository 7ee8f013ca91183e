"""How often judges agree with each other, and with people (InstructGPT, section 3.4)."""

from collections import defaultdict
from collections.abc import Hashable, Mapping
from itertools import combinations
from math import sqrt
from typing import NamedTuple

from lit_rlhf.evaluation.win_rate import Z_95

Verdicts = Mapping[str, Mapping[Hashable, float]]  # judge -> item -> preference: 1, 0.5, 0


class Agreement(NamedTuple):
    """Of two judges, or of many pairs of them."""

    share: float | None  # of the items that both decided, on how many they said the same; None without any
    kappa: float | None  # Cohen's: 0 is chance, 1 is always; None where chance alone would always agree
    count: int  # type: ignore[assignment]  # items that both decided; hides tuple.count
    ties: int  # items that either called a tie, left out
    margin: float | None  # half of the 95 % interval of the share


def between(one: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> Agreement:
    """Compare two judges on the items that both saw. Ties are left out, as in the paper's figures."""
    shared = [(one[item], other[item]) for item in one if item in other]
    decided = [(mine, theirs) for mine, theirs in shared if mine != 0.5 and theirs != 0.5]
    count, ties = len(decided), len(shared) - len(decided)
    if not count:
        return Agreement(None, None, 0, ties, None)
    share = sum(mine == theirs for mine, theirs in decided) / count
    first, second = (sum(side) / count for side in zip(*decided))
    chance = first * second + (1 - first) * (1 - second)
    kappa = (share - chance) / (1 - chance) if chance < 1 else None
    return Agreement(share, kappa, count, ties, Z_95 * sqrt(share * (1 - share) / count))


def agreements(verdicts: Verdicts) -> dict[str, dict[str, Agreement]]:
    """Return the agreement of every two judges, under both orders of their names."""
    found: dict[str, dict[str, Agreement]] = defaultdict(dict)
    for one, other in combinations(verdicts, 2):
        found[one][other] = found[other][one] = between(verdicts[one], verdicts[other])
    return dict(found)


def overall(verdicts: Verdicts) -> float | None:
    """Return the share over all pairs of judges and items; None without any."""
    pairs = [between(verdicts[one], verdicts[other]) for one, other in combinations(verdicts, 2)]
    count = sum(pair.count for pair in pairs)
    return sum(pair.share * pair.count for pair in pairs if pair.share is not None) / count if count else None
