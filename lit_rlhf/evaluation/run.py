"""An evaluation: every suite on every model, collected in one report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.results import MetricValue, Suite, SuiteResult, compute_change
from lit_rlhf.lineage.environment import read_versions
from lit_rlhf.loggers import log_table, media_loggers

LOGGED_CELLS = ("value", "low", "high", "change", "change_low", "change_high", "missing")
REPORTED_PACKAGES = ("lit-rlhf", "torch", "transformers", "lm-eval")


class Evaluation:
    """Settings and execution of `lit-rlhf evaluate`.

    Args:
        models: by name, in the order of the report.
        baseline: name of the model that all others are compared with: the SFT model in the paper.
        suites: by name.
        out: folder of `report.html`, `report.json` and the cache, from which an interrupted run resumes.
        seed: of the sampling noise.
        batch_size: prompts decoded in one batch.
        max_batch_tokens: maximum tokens per forward pass over given text.
        progress: whether to show progress bars.
        logger: one or several, for `log_report`: each gets every metric, a WandbLogger also the tables of metrics and
            samples.
    """

    def __init__(
        self,
        models: dict[str, ModelSpec],
        baseline: str,
        suites: dict[str, Suite],
        out: str | Path = "runs/evaluate",
        seed: int = 0,
        batch_size: int = 64,
        max_batch_tokens: int = 16384,
        progress: bool = True,
        logger: Logger | list[Logger] | None = None,
    ) -> None:
        if not models or not suites:
            raise UserError("an evaluation needs models and suites")
        if baseline not in models:
            raise UserError(f"baseline: there is no model {baseline!r}; there are {', '.join(models)}")
        self.models, self.baseline, self.suites, self.out = models, baseline, suites, out
        self.seed, self.batch_size, self.max_batch_tokens = seed, batch_size, max_batch_tokens
        self.progress = progress
        self.loggers = logger if isinstance(logger, list) else [logger] if logger else []

    def run(self) -> dict[str, Any]:
        """Evaluate all models and return the report.

        Raises:
            UserError: a problem of models, data or services that the user can fix.
        """
        cache = Cache(Path(self.out) / "cache", self.progress)
        settings = (cache, self.seed, self.batch_size, self.max_batch_tokens)
        models = {name: EvaluatedModel(name, spec, *settings) for name, spec in self.models.items()}
        baseline = models[self.baseline]
        for suite in self.suites.values():
            suite.check(list(models.values()))
        results: dict[str, dict[str, SuiteResult]] = {name: {} for name in self.suites}
        seconds: dict[str, dict[str, float]] = {name: {} for name in models}
        # the baseline first: its completions are cached when the others need them, so one model is loaded at a time
        for name in sorted(models, key=lambda name: name != self.baseline):
            for suite_name, suite in self.suites.items():
                start = time.perf_counter()
                results[suite_name][name] = suite.run(models[name], baseline)
                seconds[name][suite_name] = time.perf_counter() - start
                print(f"{name}: {suite_name}, {seconds[name][suite_name]:.0f} s", flush=True)
            models[name].release()
        return {
            "seed": self.seed,
            "baseline": self.baseline,
            "models": {name: {"path": model.path, "fingerprint": model.fingerprint} for name, model in models.items()},
            "suites": {name: self._build_suite_report(name, by_model) for name, by_model in results.items()},
            "seconds": seconds,
            "versions": read_package_versions(),
        }

    def _build_suite_report(self, name: str, results: dict[str, SuiteResult]) -> dict[str, Any]:
        """Return a suite's part of the report: metrics by name and model, samples side by side."""
        results = {model: results[model] for model in self.models}
        # the baseline lacks some metrics: the order is that of the model with the most
        longest_first = sorted(results.values(), key=lambda result: -len(result.metrics))
        metric_names = dict.fromkeys(metric for result in longest_first for metric in result.metrics)
        return {
            "kind": type(self.suites[name]).__name__,
            "rows": max(result.num_rows for result in results.values()),
            "metrics": {metric: self._build_metric_row(metric, results) for metric in metric_names},
            "notes": {model: result.notes for model, result in results.items() if result.notes},
            "samples": collect_samples(results),
            "tables": {model: result.tables for model, result in results.items() if result.tables},
        }

    def _build_metric_row(self, name: str, results: dict[str, SuiteResult]) -> dict[str, Any]:
        metrics = {model: result.metrics.get(name) for model, result in results.items()}
        known = next(metric for metric in metrics.values() if metric is not None)
        baseline = metrics[self.baseline]
        cells = {model: build_metric_cell(metric, baseline) for model, metric in metrics.items() if metric is not None}
        return {"unit": known.unit, "better": known.better, "models": cells}


def build_metric_cell(metric: MetricValue, baseline: MetricValue | None) -> dict[str, Any]:
    """Return a metric as a JSON object, with its change against the baseline and that change's interval."""
    keys = ("value", "low", "high", "count", "missing")
    cell: dict[str, Any] = {key: getattr(metric, key) for key in keys}
    change = None if baseline is None else compute_change(metric, baseline)
    if change is not None:
        cell |= {"change": change.value, "change_low": change.low, "change_high": change.high}
    return cell


def collect_samples(results: dict[str, SuiteResult]) -> list[dict[str, Any]]:
    """Return the samples of all models, one row per prompt, in the order of the first model."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for model, result in results.items():
        for sample in result.samples:
            key = (sample["prompt"], sample["group"], sample.get("variant", ""))
            row = rows.setdefault(key, {"prompt": key[0], "group": key[1], "variant": key[2], "answers": {}})
            row["answers"].setdefault(model, {"text": sample["answer"], "verdict": sample["verdict"]})
    return list(rows.values())


def read_package_versions() -> dict[str, str]:
    """Return the versions that the metrics were computed with."""
    return {"threads": str(torch.get_num_threads()), **read_versions(REPORTED_PACKAGES)}


def log_report(report: dict[str, Any], loggers: Sequence[Logger]) -> None:
    """Log all metrics, and what was evaluated; with a WandbLogger also the tables of metrics and samples."""
    for media_logger in media_loggers(loggers):
        media_logger.log_hyperparams({name: report[name] for name in ("seed", "baseline", "models", "versions")})
    metrics = {}
    for suite, part in report["suites"].items():
        rows = []
        for name, row in part["metrics"].items():
            for model, values in row["models"].items():
                if values["value"] is not None:
                    metrics[f"{suite}/{model}/{name}"] = values["value"]
                cells = {key: values.get(key) for key in LOGGED_CELLS}
                rows.append({"metric": name, "model": model, **cells})
        log_table(loggers, f"{suite}/metrics", rows)
        samples = [
            {
                **{column: sample[column] for column in ("group", "variant", "prompt")},
                "model": model,
                "answer": answer["text"],
                "verdict": str(answer["verdict"]),
            }
            for sample in part["samples"]
            for model, answer in sample["answers"].items()
        ]
        log_table(loggers, f"{suite}/samples", samples)
    for logger in loggers:
        logger.log_metrics(metrics)
        logger.save()
        logger.finalize("success")
