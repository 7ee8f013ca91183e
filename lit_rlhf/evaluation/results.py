"""What a suite finds of a model: figures with their intervals and counts, and samples to read."""

from collections.abc import Sequence
from math import fsum, inf, sqrt
from typing import Any, Literal, NamedTuple, Protocol

from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.win_rate import Z_95

Better = Literal["higher", "lower", ""]
Unit = Literal["share", "bits", "score", "points", "tokens", "nats"]

RANGES = {"share": (0.0, 1.0), "score": (0.0, 1.0), "bits": (0.0, inf)}  # no interval goes beyond


class MetricValue(NamedTuple):
    """One number of a table."""

    value: float | None  # None where no row could be measured
    count: int = 0  # type: ignore[assignment]  # rows it is made of; hides tuple.count
    low: float | None = None  # 95 % interval
    high: float | None = None
    missing: int = 0  # rows left out: no answer of a judge, nothing to score
    unit: Unit = "share"
    better: Better = "higher"


class SuiteResult(NamedTuple):
    """What a suite returns."""

    metrics: dict[str, MetricValue]
    rows: int  # of the data file that were used
    notes: list[str] = []  # what a reader must know: rows left out, prompts cut, verdicts that did not come
    samples: list[dict[str, Any]] = []  # with prompt, answer, group, verdict, and variant where there are several
    tables: dict[str, Any] = {}  # further results, as JSON takes them


class Suite(Protocol):
    """A part of the evaluation. `run` is called once for each model, the baseline first.

    A suite that can tell early what would fail has a method `check(subjects)` besides, with a `UserError`: it is called
    before any model is loaded.
    """

    def run(self, subject: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """Evaluate one model.

        Args:
            subject: the model.
            baseline: the model that others are compared with; may be the same.
        """
        ...


def check_early(part: object) -> None:
    """Call the method `check()` of a judge or scorer that has one: it raises what would fail once models are loaded."""
    check = getattr(part, "check", None)
    if check is not None:
        check()


def mean_of(
    values: Sequence[float | None], unit: Unit = "share", better: Better = "higher", missing: int = 0
) -> MetricValue:
    """Return the mean of independent rows with its normal 95 % interval; None counts as missing, never as 0."""
    known = [value for value in values if value is not None]
    count, missing = len(known), missing + len(values) - len(known)
    if not known:
        return MetricValue(None, 0, missing=missing, unit=unit, better=better)
    mean = fsum(known) / count
    if count == 1:
        return MetricValue(mean, 1, missing=missing, unit=unit, better=better)
    margin = Z_95 * sqrt(fsum((value - mean) ** 2 for value in known) / (count - 1) / count)
    lowest, highest = RANGES.get(unit, (-inf, inf))
    return MetricValue(mean, count, max(lowest, mean - margin), min(highest, mean + margin), missing, unit, better)


def counted(number: int, what: str) -> list[str]:
    """Return a note where something happened, nothing where it did not."""
    return [f"{number:,} {what}"] if number else []
