"""An evaluation: every suite on every model, into one report."""

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.results import MetricValue, Suite, SuiteResult

PACKAGES = ("lit-rlhf", "torch", "transformers", "lm-eval")


class Evaluation:
    """What `lit-rlhf evaluate` runs.

    Args:
        models: by name. The order is that of the report.
        baseline: the model that others are compared with and whose figures changes are taken from: the SFT model in
            the paper.
        suites: by name.
        out: folder of `report.html`, `report.json` and of what was computed, from which an interrupted run goes on.
        seed: of the sampling noise.
        batch_size: prompts decoded at once.
        max_batch_tokens: most tokens of a forward pass over given text.
        progress: whether to show progress bars.
        logger: gets every figure and, if it has tables (Weights & Biases), the tables of figures and samples.
    """

    def __init__(
        self,
        models: dict[str, ModelSpec],
        baseline: str,
        suites: dict[str, Suite],
        out: str = "runs/evaluate",
        seed: int = 0,
        batch_size: int = 64,
        max_batch_tokens: int = 16384,
        progress: bool = True,
        logger: Logger | None = None,
    ) -> None:
        if not models or not suites:
            raise UserError("an evaluation needs models and suites")
        if baseline not in models:
            raise UserError(f"baseline: there is no model {baseline!r}; there are {', '.join(models)}")
        self.models, self.baseline, self.suites, self.out = models, baseline, suites, out
        self.seed, self.batch_size, self.max_batch_tokens = seed, batch_size, max_batch_tokens
        self.progress, self.logger = progress, logger

    def run(self) -> dict[str, Any]:
        """Evaluate; return the report.

        Raises:
            UserError: whatever of models, data or services the user can mend.
        """
        cache = Cache(Path(self.out) / "cache", self.progress)
        settings = (cache, self.seed, self.batch_size, self.max_batch_tokens)
        subjects = {name: EvaluatedModel(name, candidate, *settings) for name, candidate in self.models.items()}
        baseline = subjects[self.baseline]
        for suite in self.suites.values():
            check = getattr(suite, "check", None)
            if check is not None:
                check(list(subjects.values()))
        found: dict[str, dict[str, SuiteResult]] = {name: {} for name in self.suites}
        seconds: dict[str, dict[str, float]] = {name: {} for name in subjects}
        # the baseline first: what the others are compared with is in the cache by then, and one model is loaded
        for name in sorted(subjects, key=lambda name: name != self.baseline):
            for suite_name, suite in self.suites.items():
                start = time.perf_counter()
                found[suite_name][name] = suite.run(subjects[name], baseline)
                seconds[name][suite_name] = time.perf_counter() - start
                print(f"{name}: {suite_name}, {seconds[name][suite_name]:.0f} s", flush=True)
            subjects[name].release()
        return {
            "seed": self.seed,
            "baseline": self.baseline,
            "models": {
                name: {"path": each.candidate.path, "identity": each.identity} for name, each in subjects.items()
            },
            "suites": {name: self._suite(name, findings) for name, findings in found.items()},
            "seconds": seconds,
            "versions": versions(),
        }

    def _suite(self, name: str, findings: dict[str, SuiteResult]) -> dict[str, Any]:
        """Return a suite's part of the report: figures by name and model, samples side by side."""
        findings = {model: findings[model] for model in self.models}
        # the baseline lacks some figures: the order is that of the model with most
        longest_first = sorted(findings.values(), key=lambda each: -len(each.metrics))
        names = dict.fromkeys(figure for each in longest_first for figure in each.metrics)
        return {
            "kind": type(self.suites[name]).__name__,
            "rows": max(each.rows for each in findings.values()),
            "figures": {figure: self._row(figure, findings) for figure in names},
            "notes": {model: each.notes for model, each in findings.items() if each.notes},
            "samples": side_by_side(findings),
            "tables": {model: each.tables for model, each in findings.items() if each.tables},
        }

    def _row(self, name: str, findings: dict[str, SuiteResult]) -> dict[str, Any]:
        figures = {model: each.metrics.get(name) for model, each in findings.items()}
        known = next(figure for figure in figures.values() if figure is not None)
        base = figures[self.baseline]
        models = {model: cell(figure, base) for model, figure in figures.items() if figure is not None}
        return {"unit": known.unit, "better": known.better, "models": models}


def cell(figure: MetricValue, baseline: MetricValue | None) -> dict[str, Any]:
    """Return a figure as JSON takes it, with its change against the baseline."""
    keys = ("value", "low", "high", "count", "missing")
    found: dict[str, Any] = {key: getattr(figure, key) for key in keys}
    if baseline is not None and None not in (figure.value, baseline.value):
        assert figure.value is not None and baseline.value is not None
        found["change"] = figure.value - baseline.value
    return found


def side_by_side(findings: dict[str, SuiteResult]) -> list[dict[str, Any]]:
    """Return the samples of all models, those of one prompt together, in the order of the first model."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for model, each in findings.items():
        for sample in each.samples:
            key = (sample["prompt"], sample["group"], sample.get("variant", ""))
            row = rows.setdefault(key, {"prompt": key[0], "group": key[1], "variant": key[2], "answers": {}})
            row["answers"].setdefault(model, {"text": sample["answer"], "verdict": sample["verdict"]})
    return list(rows.values())


def versions() -> dict[str, str]:
    """Return what the figures were made with."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not there
            continue
    return found


def log_report(report: dict[str, Any], logger: Logger) -> None:
    """Hand figures, and tables where the logger has them, to a logger."""
    metrics = {}
    for suite, part in report["suites"].items():
        rows = []
        for figure, row in part["figures"].items():
            for model, values in row["models"].items():
                if values["value"] is not None:
                    metrics[f"{suite}/{model}/{figure}"] = values["value"]
                rows.append(
                    [figure, model, *(values.get(key) for key in ("value", "low", "high", "change", "missing"))]
                )
        log_table = getattr(logger, "log_table", None)
        if log_table is not None:
            columns = ["figure", "model", "value", "low", "high", "change", "missing"]
            log_table(key=f"{suite}/figures", columns=columns, data=rows)
            samples = [
                [sample["group"], sample["variant"], sample["prompt"], model, answer["text"], str(answer["verdict"])]
                for sample in part["samples"]
                for model, answer in sample["answers"].items()
            ]
            columns = ["group", "variant", "prompt", "model", "answer", "verdict"]
            log_table(key=f"{suite}/samples", columns=columns, data=samples)
    logger.log_metrics(metrics)
    logger.save()
    logger.finalize("success")
