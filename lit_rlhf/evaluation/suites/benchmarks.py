"""Public benchmarks through lm-eval with the paper's prompts: the alignment tax (sections 4.2 and App. D, E.1)."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_rlhf.data.sources import DataSource, held_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.results import (
    Better,
    MetricValue,
    Suite,
    SuiteResult,
    Unit,
    compute_paired_metric,
    format_count_note,
)
from lit_rlhf.progress import without_progress_bar

TASKS_DIR = Path(__file__).parents[1] / "tasks"
METRIC_UNITS: dict[str, Unit] = {"bleu": "points"}
BETTER: dict[bool | None, Better] = {True: "higher", False: "lower", None: ""}
MAX_SAMPLES = 25


@dataclass
class Benchmark:
    """Settings of one benchmark.

    Args:
        task: a file of `lit_rlhf/evaluation/tasks` or of `Benchmarks.include`, without its suffix; or an lm-eval task.
        path: its data: a file in the published format, a hub name, or such rows in memory. lm-eval's own tasks need
            none.
        shots: numbers of few-shot examples, each a metric of its own.
        shots_path: the few-shot examples, likewise, such as the training set; by default `path`, excluding the row
            itself.
        limit: use the first so many rows; None for all.
    """

    task: str
    path: DataSource | None = None
    shots: list[int] = field(default_factory=lambda: [0])
    shots_path: DataSource | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Keep rows that can be read once."""
        self.path, self.shots_path = (
            None if each is None else held_rows(each) for each in (self.path, self.shots_path)
        )


class Benchmarks(Suite):
    """Benchmarks; the report compares each metric with the baseline's.

    Completions are greedy and truncated at the first newline. Multiple choice takes the option with the highest mean
    log-probability per token. Prompt and option are tokenized jointly, as in lm-eval.

    Args:
        tasks: the benchmarks.
        include: a folder of your own task files.
        seed: of the choice of few-shot examples.
    """

    def __init__(self, tasks: list[Benchmark], include: str | Path | None = None, seed: int = 1234) -> None:
        self.tasks, self.include, self.seed = tasks, include, seed

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """See `Suite.check`: lm-eval must be installed, and tasks and their data must be readable."""
        import lm_eval  # noqa: F401

        for benchmark in self.tasks:
            if benchmark.limit is not None and benchmark.limit < 1:
                raise UserError(f"tasks: {benchmark.task}: limit must be 1 or more, or none, got {benchmark.limit}")
            if benchmark.task in self._task_names() and benchmark.path is None:
                raise UserError(f"tasks: {benchmark.task!r} needs the path of its data file, or a name of the hub")
            with silence_lm_eval():
                self._load_task(benchmark, 0)

    def run(self, model: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        metrics: dict[str, MetricValue] = {}
        samples: list[dict[str, Any]] = []
        notes: list[str] = []
        num_rows = 0
        for benchmark in self.tasks:
            for number, shots in enumerate(benchmark.shots):
                task, results, num_truncated = self._evaluate(model, benchmark, shots)
                (name,) = results["results"]
                label = f"{benchmark.task}, {shots}-shot" if shots else benchmark.task
                rows_by_filter = group_by_filter(results["samples"][name])
                for filter_name, rows in rows_by_filter.items():
                    own_label = label if len(rows_by_filter) == 1 else f"{label}, {filter_name}"
                    aggregated = {key: results["results"][name][f"{key},{filter_name}"] for key in metric_names(rows)}
                    metrics |= compute_task_metrics(own_label, rows, aggregated, task)
                note = f"prompts ({label}) exceeded the context and were left-truncated"
                notes += format_count_note(num_truncated, note)
                if number == 0:
                    rows = next(iter(rows_by_filter.values()))
                    num_rows += len(rows)
                    samples += [build_sample(benchmark.task, row) for row in rows[:MAX_SAMPLES]]
        return SuiteResult(metrics, num_rows, notes, samples)

    def _evaluate(self, model: EvaluatedModel, benchmark: Benchmark, shots: int) -> tuple[Any, dict[str, Any], int]:
        """Return lm-eval's task and results, and the number of truncated prompts."""
        from lit_rlhf.evaluation.suites.lm_eval_model import LMEvalAdapter

        with silence_lm_eval():
            from lm_eval.evaluator import evaluate

            loaded = self._load_task(benchmark, shots)
            adapter = LMEvalAdapter(model)
            results = evaluate(adapter, loaded, limit=benchmark.limit, bootstrap_iters=0)
        assert results is not None
        (task,) = loaded["tasks"].values()
        return task, dict(results), adapter.num_truncated

    @property
    def _folders(self) -> list[str]:
        return [str(TASKS_DIR), *([str(self.include)] if self.include else [])]

    def _task_names(self) -> set[str]:
        """Return the names of the task files."""
        return {path.stem for folder in self._folders for path in Path(folder).glob("*.yaml")}

    def _load_task(self, benchmark: Benchmark, shots: int) -> Any:
        from lm_eval.tasks import TaskManager

        names = self._task_names()
        has_task_file = benchmark.task in names
        manager = TaskManager(
            include_path=self._folders,
            include_defaults=not has_task_file,
            # the arguments of the readers
            metadata={"path": benchmark.path, "shots_path": benchmark.shots_path} if has_task_file else None,
        )
        if benchmark.task not in manager.all_tasks:
            known = ", ".join(sorted(names))
            raise UserError(f"tasks: no task {benchmark.task!r}; there are {known}, and lm-eval's own")
        loaded = manager.load([benchmark.task])
        if loaded["groups"] or len(loaded["tasks"]) != 1:
            members = ", ".join(sorted(loaded["tasks"]))
            raise UserError(f"tasks: {benchmark.task!r} is a group; name its tasks, each a benchmark: {members:.300}")
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", shots)
            if benchmark.shots_path is not None:
                if not has_task_file:
                    raise UserError(f"tasks: {benchmark.task!r} is lm-eval's own and has its own shots")
                task.fewshot_cfg.split = "shots"  # another split than the rows': no row can be its own example
                task.sampler.replace_df(list(task.dataset["shots"]))
            task.set_fewshot_seed(seed=self.seed)
        return loaded


def group_by_filter(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return lm-eval's log of a task by filter: it holds each row once for each way to extract the answer."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["filter"]].append(row)
    return dict(groups)


def metric_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the metrics that any row has."""
    return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def compute_task_metrics(
    label: str, rows: Sequence[dict[str, Any]], aggregated: dict[str, float], task: Any
) -> dict[str, MetricValue]:
    """Return the metrics of a task: means over rows with intervals, and lm-eval's value of all other metrics.

    Args:
        label: prefix of the names.
        rows: lm-eval's log of the task, of one filter.
        aggregated: lm-eval's value of each metric, of that filter.
        task: lm-eval's task, for how metrics are aggregated and which are better if lower.
    """
    from lm_eval.api.metrics import mean

    aggregations, directions = task.aggregation(), task.higher_is_better()
    values: dict[str, list[Any]] = defaultdict(list)
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name in row["metrics"]:
            values[name].append(row[name])
            if "group" in row["doc"]:
                groups[f"{label}: {name}, {row['doc']['group']}"].append(row[name])
    metrics = {}
    for name, column in values.items():
        better: Better = BETTER[directions.get(name, True)]
        # lm-eval takes the mean of a metric without an aggregation
        if aggregations.get(name, mean) is mean and all(isinstance(value, int | float) for value in column):
            metrics[f"{label}: {name}"] = compute_paired_metric(column, find_unit(name, column), better)
        else:
            value = float(aggregated[name])
            unit = find_unit(name, [value])
            metrics[f"{label}: {name}"] = MetricValue(value, len(column), unit=unit, better=better)
    return metrics | {name: compute_paired_metric(column) for name, column in groups.items()}


def find_unit(name: str, values: Sequence[float]) -> Unit:
    """Return the unit of a metric: values that are all from 0 to 1 are shares."""
    return METRIC_UNITS.get(name) or ("share" if all(0 <= value <= 1 for value in values) else "points")


def build_sample(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of lm-eval's log as a sample of the report."""
    verdict = {name: row[name] for name in row["metrics"] if isinstance(row[name], int | float)}
    if isinstance(row["filtered_resps"][0], str):
        answer = row["filtered_resps"][0].strip()
    else:
        means = [option[0] / option.num_tokens for option in row["filtered_resps"]]
        answer = str(row["arguments"][means.index(max(means))][1]).strip()
    return {"prompt": str(row["arguments"][0][0])[-600:], "answer": answer, "group": task, "verdict": verdict}


@contextmanager
def silence_lm_eval() -> Iterator[None]:
    """Suppress lm-eval's log below errors, and its progress bars."""
    from lm_eval.api import task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with without_progress_bar(task):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
