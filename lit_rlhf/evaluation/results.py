"""What a suite returns for a model: metrics with intervals and counts, notes, samples, tables."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import fsum, inf, sqrt
from typing import Any, Literal, NamedTuple

from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.win_rate import Z_95

Better = Literal["higher", "lower", ""]
Unit = Literal["share", "bits", "score", "points", "tokens", "nats"]

UNIT_RANGES = {"share": (0.0, 1.0), "score": (0.0, 1.0), "bits": (0.0, inf)}  # intervals are clipped to these


class MetricValue(NamedTuple):
    """One cell of a table: a value with its 95 % interval and row counts."""

    value: float | None  # None if no row could be measured
    count: int = 0  # type: ignore[assignment]  # rows it is computed from; hides tuple.count
    low: float | None = None  # 95 % interval
    high: float | None = None
    missing: int = 0  # rows excluded: no verdict of a judge, nothing to score
    unit: Unit = "share"
    better: Better = "higher"
    by_row: tuple[float | None, ...] = ()  # values of the rows, if the rows are the same for every model


class SuiteResult(NamedTuple):
    """Results of one suite for one model."""

    metrics: dict[str, MetricValue]
    num_rows: int  # rows of the data file that were used
    notes: list[str] = []  # for the reader: excluded rows, truncated prompts, missing verdicts
    samples: list[dict[str, Any]] = []  # keys: prompt, answer, group, verdict (name to value), variant if any
    tables: dict[str, Any] = {}  # further results, JSON-serializable


class Suite(ABC):
    """A part of the evaluation, such as a benchmark. `run` is called once per model, the baseline first."""

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """Raise a UserError for what would fail later; called before any weights are loaded. By default nothing.

        Args:
            models: all models of the evaluation.
        """

    @abstractmethod
    def run(self, model: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """Evaluate one model.

        Args:
            model: the model to evaluate.
            baseline: the model that others are compared with; may be `model` itself.
        """


def compute_mean_metric(
    values: Sequence[float | None], unit: Unit = "share", better: Better = "higher", missing: int = 0
) -> MetricValue:
    """Return the mean over independent rows with its normal 95 % interval; None counts as missing, never as 0."""
    known = [value for value in values if value is not None]
    count, missing = len(known), missing + len(values) - len(known)
    if not known:
        return MetricValue(None, 0, missing=missing, unit=unit, better=better)
    mean = fsum(known) / count
    if count == 1:
        return MetricValue(mean, 1, missing=missing, unit=unit, better=better)
    margin = Z_95 * sqrt(fsum((value - mean) ** 2 for value in known) / (count - 1) / count)
    lowest, highest = UNIT_RANGES.get(unit, (-inf, inf))
    return MetricValue(mean, count, max(lowest, mean - margin), min(highest, mean + margin), missing, unit, better)


def compute_paired_metric(
    values: Sequence[float | None], unit: Unit = "share", better: Better = "higher"
) -> MetricValue:
    """As `compute_mean_metric`, of rows that are the same for every model, in the same order: see `compute_change`."""
    return compute_mean_metric(values, unit, better)._replace(by_row=tuple(values))


def compute_change(metric: MetricValue, baseline: MetricValue) -> MetricValue | None:
    """Return the change against the baseline; None if either has no value.

    Where the rows are the same, it is the mean of the differences row by row, of the rows that both have, with its 95 %
    interval: far narrower than the two intervals let expect, where a row is easy or hard for both models.
    """
    if metric.value is None or baseline.value is None:
        return None
    if not metric.by_row or len(metric.by_row) != len(baseline.by_row):
        return MetricValue(metric.value - baseline.value)
    differences = [
        None if mine is None or theirs is None else mine - theirs
        for mine, theirs in zip(metric.by_row, baseline.by_row)
    ]
    change = compute_mean_metric(differences, "points")
    return None if change.value is None else change


def format_count_note(count: int, text: str) -> list[str]:
    """Return ["COUNT TEXT"], or [] if the count is 0."""
    return [f"{count:,} {text}"] if count else []
