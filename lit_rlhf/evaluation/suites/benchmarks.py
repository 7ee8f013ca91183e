"""Public benchmarks through lm-eval, with the paper's prompts: the alignment tax (sections 4.2 and App. D, E.1)."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.results import MetricValue, SuiteResult, format_count_note, compute_mean_metric

TASKS_DIR = Path(__file__).parent / "tasks"
METRIC_UNITS: dict[str, Any] = {"bleu": "points"}
MAX_SAMPLES = 25


@dataclass
class Benchmark:
    """One benchmark.

    Args:
        task: a file of `lit_rlhf/evaluation/tasks` or of `Benchmarks.include`, without its ending; or any task of
            lm-eval.
        path: its data: a file in the published layout, or a name of the hub. lm-eval's own tasks have theirs.
        shots: numbers of few-shot examples, each a figure of its own.
        shots_path: a file to take the examples from, such as the training set; by default from `path`, never the row
            itself.
        limit: rows to use, from the first; None for all.
    """

    task: str
    path: str | None = None
    shots: list[int] = field(default_factory=lambda: [0])
    shots_path: str | None = None
    limit: int | None = None


class Benchmarks:
    """Benchmarks before and after: the report sets each figure beside the baseline's.

    Greedy answers, cut at the first newline; multiple choice by the mean log-probability of a token. Text and option
    are tokenised together, as lm-eval does.

    Args:
        tasks: which.
        include: a folder of your own task files.
        seed: of the choice of few-shot examples.
    """

    def __init__(self, tasks: list[Benchmark], include: str | None = None, seed: int = 1234) -> None:
        self.tasks, self.include, self.seed = tasks, include, seed

    def check(self, models: Sequence[EvaluatedModel]) -> None:
        """See `Suite`: whether lm-eval is installed, and whether tasks and their data can be read."""
        import lm_eval  # noqa: F401

        for benchmark in self.tasks:
            if benchmark.limit is not None and benchmark.limit < 1:
                raise UserError(f"tasks: {benchmark.task}: limit must be 1 or more, or none, got {benchmark.limit}")
            if benchmark.task in self._task_names() and benchmark.path is None:
                raise UserError(f"tasks: {benchmark.task!r} needs the path of its data file, or a name of the hub")
            with silence_lm_eval():
                self._load_task(benchmark, 0)

    def run(self, subject: EvaluatedModel, baseline: EvaluatedModel) -> SuiteResult:
        """See `Suite.run`."""
        figures: dict[str, MetricValue] = {}
        samples: list[dict[str, Any]] = []
        notes: list[str] = []
        rows = 0
        for benchmark in self.tasks:
            for number, shots in enumerate(benchmark.shots):
                found, model = self._evaluate(subject, benchmark, shots)
                (name,) = found["results"]
                logged = found["samples"][name]
                label = f"{benchmark.task}, {shots}-shot" if shots else benchmark.task
                figures |= compute_task_metrics(label, logged, found["results"][name])
                notes += format_count_note(model.cut, f"prompts ({label}) were longer than the model's positions, cut in front")
                rows += len(logged) if number == 0 else 0
                if number == 0:
                    samples += [build_sample(benchmark.task, each) for each in logged[:MAX_SAMPLES]]
        return SuiteResult(figures, rows, notes, samples)

    def _evaluate(self, subject: EvaluatedModel, benchmark: Benchmark, shots: int) -> tuple[dict[str, Any], Any]:
        """Return lm-eval's results and the model they are of."""
        from lit_rlhf.evaluation.suites.lm_eval_model import LMEvalAdapter

        with silence_lm_eval():
            from lm_eval.evaluator import evaluate

            task = self._load_task(benchmark, shots)
            model = LMEvalAdapter(subject)
            found = evaluate(model, task, limit=benchmark.limit, bootstrap_iters=0)
        assert found is not None
        return dict(found), model

    @property
    def _folders(self) -> list[str]:
        return [str(TASKS_DIR), *([self.include] if self.include else [])]

    def _task_names(self) -> set[str]:
        """Return the names of the task files."""
        return {path.stem for folder in self._folders for path in Path(folder).glob("*.yaml")}

    def _load_task(self, benchmark: Benchmark, shots: int) -> Any:
        from lm_eval.tasks import TaskManager

        known = self._task_names()
        own = benchmark.task in known
        data = {"path": benchmark.path, "shots_path": benchmark.shots_path}  # what the readers get
        manager = TaskManager(include_path=self._folders, include_defaults=not own, metadata=data if own else None)
        if benchmark.task not in manager.all_tasks:
            names = ", ".join(sorted(known))
            raise UserError(f"tasks: no task {benchmark.task!r}; there are {names}, and lm-eval's own")
        loaded = manager.load([benchmark.task])
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", shots)
            if benchmark.shots_path is not None:
                if not own:
                    raise UserError(f"tasks: {benchmark.task!r} is lm-eval's own and has its own shots")
                task.fewshot_cfg.split = "shots"  # another split than the rows': no row can be its own example
                task.sampler.replace_df(list(task.dataset["shots"]))
            task.set_fewshot_seed(seed=self.seed)
        return loaded


def compute_task_metrics(label: str, logged: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, MetricValue]:
    """Return the figures of a task: means over rows with their intervals, the whole-set ones as lm-eval has them."""
    values: dict[str, list[Any]] = defaultdict(list)
    groups: dict[str, list[float]] = defaultdict(list)
    for row in logged:
        for metric in row["metrics"]:
            values[metric].append(row[metric])
            if "group" in row["doc"]:
                groups[f"{label}: {metric}, {row['doc']['group']}"].append(row[metric])
    figures = {}
    for metric, column in values.items():
        if all(isinstance(each, int | float) for each in column):
            figures[f"{label}: {metric}"] = compute_mean_metric(column)
        else:
            unit = METRIC_UNITS.get(metric, "share")
            figures[f"{label}: {metric}"] = MetricValue(float(results[f"{metric},none"]), len(column), unit=unit)
    return figures | {name: compute_mean_metric(column) for name, column in groups.items()}


def build_sample(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of lm-eval's log as a sample of the report."""
    verdict = {metric: row[metric] for metric in row["metrics"] if isinstance(row[metric], int | float)}
    if isinstance(row["filtered_resps"][0], str):
        answer = row["filtered_resps"][0].strip()
    else:
        means = [each[0] / each.tokens for each in row["filtered_resps"]]
        answer = str(row["arguments"][means.index(max(means))][1]).strip()
    return {"prompt": str(row["arguments"][0][0])[-600:], "answer": answer, "group": task, "verdict": verdict}


@contextmanager
def silence_lm_eval() -> Iterator[None]:
    """Keep lm-eval's log, which tells every task's settings, and its bars off the terminal; errors apart."""
    from lm_eval.api import task

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels, bar = [logger.level for logger in loggers], task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)  # it knows no setting for the bar over the building of requests
    try:
        yield
    finally:
        task.tqdm = bar
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
