"""What some loggers take besides numbers: tables, histograms, images, pages, and how metrics are drawn.

A logger is asked here and nowhere else. Lightning's WandbLogger takes everything; any other logger gets the numbers
alone, and these functions pass it over.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.loggers.logger import Logger
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

ITERATION = "iteration"
AXES = (ITERATION, "episodes", "tokens")
VALIDATION_METRICS = (
    "validation/loss",
    "validation/accuracy",
    "validation/ece",
    "validation/score",
    "validation/kl",
    "validation/reward_score",
    "validation/pretraining_loss",
)
#: what the summary of a run has of a metric, if not its last value
SUMMARIES = {
    "train/loss": "min",
    "validation/loss": "min",
    "validation/pretraining_loss": "min",
    "validation/accuracy": "max",
    "validation/score": "max",
    "validation/reward_score": "max",
}


class Histogram(NamedTuple):
    """Counts of values in bins."""

    counts: Sequence[float]
    edges: Sequence[float]  # one more than counts


def media_loggers(loggers: Iterable[Logger]) -> list[WandbLogger]:
    """Return the loggers that take tables, histograms, images and pages."""
    return [logger for logger in loggers if isinstance(logger, WandbLogger)]


@rank_zero_only
def define_metrics(loggers: Iterable[Logger], names: Iterable[str], axis: str | None = None) -> None:
    """Say how metrics are drawn and summarized, before their first value.

    Args:
        loggers: of the run.
        names: of the metrics.
        axis: the metric on the x-axis; None for the optimizer step, which Lightning sets.
    """
    for logger in media_loggers(loggers):
        for name in names:
            # a name, not a pattern: Lightning's own pattern "*" fits every name as well
            step = "trainer/global_step" if axis is None or name in AXES else axis
            summary = SUMMARIES.get(name)
            logger.experiment.define_metric(name, step_metric=step, summary=summary and f"{summary},last")


@rank_zero_only
def log_table(loggers: Iterable[Logger], name: str, rows: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
    """Log a table.

    Args:
        loggers: of the run.
        name: of the table.
        rows: with equal keys, the columns.
        step: the optimizer step, for a table that is logged repeatedly.
    """
    for logger in media_loggers(loggers) if rows else ():
        logger.log_metrics({name: make_table(list(rows[0]), rows)}, step=step)


def make_table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]], log_mode: Any = "IMMUTABLE") -> Any:
    """Return a table of W&B, whose columns may hold values of several types."""
    import wandb

    data = [[row.get(column) for column in columns] for row in rows]
    return wandb.Table(columns=list(columns), data=data, log_mode=log_mode, allow_mixed_types=True)


class GrowingTable:
    """One table of a run, to which rows are added as it goes on.

    Args:
        name: of the table.
        columns: of all its rows.
    """

    def __init__(self, name: str, columns: Sequence[str]) -> None:
        self.name, self.columns = name, list(columns)
        self.tables: dict[int, Any] = {}  # by logger

    @rank_zero_only
    def add(self, loggers: Iterable[Logger], rows: Sequence[Mapping[str, Any]], step: int, **axes: float) -> None:
        """Add rows, with the optimizer step and the values of other axes at which they were sampled."""
        for logger in media_loggers(loggers):
            if id(logger) not in self.tables:
                # incremental: what was logged before is not written again
                self.tables[id(logger)] = make_table(self.columns, [], "INCREMENTAL")
            table = self.tables[id(logger)]
            for row in rows:
                table.add_data(*(row.get(column) for column in self.columns))
            logger.log_metrics({self.name: table, **axes}, step=step)


@rank_zero_only
def log_histograms(
    loggers: Iterable[Logger], histograms: Mapping[str, Histogram], step: int | None = None, **axes: float
) -> None:
    """Log histograms by name, with the optimizer step and the values of other axes."""
    for logger in media_loggers(loggers):
        import wandb

        drawn: dict[str, Any] = {
            name: wandb.Histogram(np_histogram=(list(each.counts), list(each.edges)))
            for name, each in histograms.items()
        }
        logger.log_metrics({**drawn, **axes}, step=step)


@rank_zero_only
def log_image(loggers: Iterable[Logger], name: str, image: Any, step: int | None = None) -> None:
    """Log an image: an array, a PIL image or a path."""
    for logger in media_loggers(loggers):
        logger.log_image(name, [image], step=step)


@rank_zero_only
def log_page(loggers: Iterable[Logger], name: str, path: Path, step: int | None = None) -> None:
    """Log an HTML page that needs no other file."""
    for logger in media_loggers(loggers):
        import wandb

        page: Any = wandb.Html(path.read_text(encoding="utf-8"), inject=False)
        logger.log_metrics({name: page}, step=step)


@rank_zero_only
def finish_runs(loggers: Iterable[Logger], succeeded: bool = True) -> None:
    """End the runs of loggers that keep one open; the next run of this process would log to it."""
    if media_loggers(loggers):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=0 if succeeded else 1)
