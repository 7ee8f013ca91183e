"""Measured values with intervals, pooled over seeds, and what they say about a claim of the paper."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Literal, NamedTuple

from lit_rlhf.evaluation.results import Unit, compute_mean_metric

MAX_SHOWN = 3  # comparisons in a finding
Outcome = Literal["agrees", "disagrees", "undecided"]
DECISIVE: tuple[Outcome, ...] = ("disagrees", "undecided")  # one such comparison decides over a claim
Values = Mapping[str, "Estimate"]


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def estimate_mean(values: Sequence[float], unit: Unit = "share") -> Estimate:
    """Return the mean over independent rows with its normal 95 % interval; of a single row without spread.

    Raises:
        ValueError: there is no value.
    """
    metric = compute_mean_metric(values, unit)
    if metric.value is None:
        raise ValueError("no values to take a mean of")
    low = metric.value if metric.low is None else metric.low
    high = metric.value if metric.high is None else metric.high
    return Estimate(metric.value, low, high)


def pool_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over seeds: s estimates with independent half-widths h_i have the half-width sqrt(Σ h_i²) / s.

    The interval is that of the prompts of these seeds; the spread between seeds is not in it.
    """
    count = len(estimates)
    mean = sum(each.value for each in estimates) / count
    low = sqrt(sum((each.value - each.low) ** 2 for each in estimates)) / count
    high = sqrt(sum((each.high - each.value) ** 2 for each in estimates)) / count
    return Estimate(mean, mean - low, mean + high)


def subtract(first: Estimate, second: Estimate) -> Estimate:
    """Return the difference of two estimates, as if they were independent: on the same prompts it is conservative."""
    value = first.value - second.value
    low = sqrt((first.value - first.low) ** 2 + (second.high - second.value) ** 2)
    high = sqrt((first.high - first.value) ** 2 + (second.value - second.low) ** 2)
    return Estimate(value, value - low, value + high)


class Finding(NamedTuple):
    """What our numbers say about a claim."""

    outcome: Outcome
    detail: str


class PaperClaim(NamedTuple):
    """A claim of the paper about pairs of measured values.

    Attributes:
        text: the claim.
        pairs: keys (a, b) of values.
        kind: "above": a is above b in every pair. "not below": a is above b, or below by at most `tolerance`. "within":
            the two differ by at most `tolerance`. "mostly": a is above b in more than half of the pairs whose values
            differ, as in a sign test.
        tolerance: of "not below" and "within".
    """

    text: str
    pairs: Sequence[tuple[str, str]]
    kind: Literal["above", "not below", "within", "mostly"] = "above"
    tolerance: float = 0.0

    def check(self, values: Values) -> Finding:
        """Compare the claim with values.

        A claim agrees if the 95 % intervals of all its differences do, disagrees if that of one contradicts, and is
        undecided otherwise.
        """
        differences = {(a, b): subtract(values[a], values[b]) for a, b in self.pairs}
        if self.kind == "mostly":
            above, below = (sum(sign * each.value > 0 for each in differences.values()) for sign in (1, -1))
            outcome: Outcome = "agrees" if above > below else "disagrees" if below else "undecided"
            equal = len(differences) - above - below
            return Finding(outcome, f"{above} of {above + below}" + (f", {equal} equal" if equal else ""))
        outcomes = {pair: self._judge_difference(each) for pair, each in differences.items()}
        for outcome in DECISIVE:
            pairs = [pair for pair, found in outcomes.items() if found == outcome]
            if pairs:
                shown = [describe_pair(pair, differences[pair]) for pair in pairs[:MAX_SHOWN]]
                more = [f"and {len(pairs) - MAX_SHOWN} more"] if len(pairs) > MAX_SHOWN else []
                return Finding(outcome, f"{len(pairs)} of {len(differences)}: {'; '.join([*shown, *more])}")
        if len(differences) == 1:
            return Finding("agrees", f"1 of 1: {describe_pair(*next(iter(differences.items())))}")
        return Finding("agrees", f"all {len(differences)} comparisons")

    def _judge_difference(self, difference: Estimate) -> Outcome:
        if self.kind != "within":
            least = -self.tolerance  # 0 for "above"
            return "agrees" if difference.low > least else "disagrees" if difference.high < least else "undecided"
        if -self.tolerance <= difference.low and difference.high <= self.tolerance:
            return "agrees"
        return "disagrees" if difference.low > self.tolerance or difference.high < -self.tolerance else "undecided"


def describe_pair(pair: tuple[str, str], difference: Estimate) -> str:
    """Return a comparison in words."""
    names = [key.replace("_", "-").replace("/", " ") for key in pair]
    value, low, high = (f"{number:+.3f}".replace("-", "−") for number in difference)
    return f"{names[0]} less {names[1]} is {value} [{low}, {high}]"
