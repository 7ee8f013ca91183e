"""Results of a sweep (one run per value of a setting and seed) as files, as a table and as one HTML page."""

import csv
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import MUTED, NARROW, STYLE, figure_to_svg, make_panel
from lit_rlhf.evaluation.reports.quickstart_report import align_columns
from lit_rlhf.evaluation.reports.templates import load_template

# drawn by default: the first of each group that was logged
DEFAULT_METRIC_GROUPS = (
    ("validation/score", "reward/score", "validation/accuracy", "validation/reward_score"),
    ("validation/loss", "train/loss"),
    ("validation/kl", "reward/kl"),
    ("validation/pretraining_loss", "pretraining/loss"),
)
MAX_PANELS = 4
LINE_COLORS = ("#d2562a", "#2b6cb8", "#16876a", "#9a6fc4", "#7a8594", "#b58a12")


class RunResult(NamedTuple):
    """Result of one run."""

    values: dict[str, Any]  # setting -> value
    seed: int
    seconds: float
    metrics: dict[str, float]  # final values; empty if the run failed
    error: str = ""


class Sweep(NamedTuple):
    """All runs over the values of one or two settings."""

    title: str
    over: dict[str, list[Any]]  # setting -> values, in order
    runs: list[RunResult]
    metrics: list[str]  # to draw
    references: dict[str, dict[str, float]] = {}  # metric -> label -> value, drawn as a horizontal line
    note: str = ""

    def values_at(self, metric: str, *values: Any) -> list[float]:
        """Return the metric of the runs at the given values of the settings, one per seed that has it."""
        settings = dict(zip(self.over, values))
        return [run.metrics[metric] for run in self.runs if run.values == settings and metric in run.metrics]

    def failed_runs(self) -> list[RunResult]:
        """Return the runs that failed."""
        return [run for run in self.runs if run.error]


def read_final_metrics(path: Path, last: int = 1) -> dict[str, float]:
    """Return the mean of the last `last` values of each metric of a metrics.csv."""
    columns: dict[str, list[float]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("epoch", "step"):
                    columns.setdefault(name, []).append(float(text))
    return {name: fmean(values[-last:]) for name, values in columns.items()}


def select_default_metrics(runs: Sequence[RunResult]) -> list[str]:
    """Return the metrics to draw by default."""
    logged = {name for run in runs for name in run.metrics}
    selected = [next((name for name in group if name in logged), "") for group in DEFAULT_METRIC_GROUPS]
    return [name for name in selected if name] or sorted(logged)[:MAX_PANELS]


def write_results(sweep: Sweep, folder: Path) -> None:
    """Write results.json (everything) and results.csv (one row per run, one column per metric)."""
    rows = [run._asdict() for run in sweep.runs]
    content = {"title": sweep.title, "over": sweep.over, "metrics": sweep.metrics, "runs": rows}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    names = sorted({name for run in sweep.runs for name in run.metrics})
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*sweep.over, "seed", "seconds", "error", *names])
        for run in sweep.runs:
            values = [run.metrics.get(name, "") for name in names]
            writer.writerow([*(run.values[key] for key in sweep.over), run.seed, run.seconds, run.error, *values])


def read_results(folder: Path) -> Sweep:
    """Read what `write_results` wrote."""
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    runs = [RunResult(**run) for run in content["runs"]]
    return Sweep(content["title"], content["over"], runs, content["metrics"])


def build_table_rows(sweep: Sweep) -> list[list[str]]:
    """Return the header and one row per combination of values: mean over seeds, with their range in brackets."""
    rows = [[*(key.split(".")[-1] for key in sweep.over), "runs", *sweep.metrics]]
    for values in product(*sweep.over.values()):
        num_done = sum(run.values == dict(zip(sweep.over, values)) and not run.error for run in sweep.runs)
        row = [*map(str, values), str(num_done)]
        for metric in sweep.metrics:
            by_seed = sweep.values_at(metric, *values)
            spread = f" [{min(by_seed):.3f}, {max(by_seed):.3f}]" if len(by_seed) > 1 else ""
            row.append(f"{fmean(by_seed):.3f}{spread}" if by_seed else "–")
        rows.append(row)
    return rows


def format_sweep(sweep: Sweep) -> str:
    """Format a sweep for the terminal."""
    lines = [align_columns(build_table_rows(sweep))]
    lines += [f"failed: {describe_run(run)}: {run.error}" for run in sweep.failed_runs()]
    return "\n".join(lines)


def describe_run(run: RunResult) -> str:
    """Return the values and the seed of a run as text."""
    return ", ".join([*(f"{key.split('.')[-1]} {value}" for key, value in run.values.items()), f"seed {run.seed}"])


def draw_sweep(sweep: Sweep) -> list[Figure]:
    """Draw one panel per metric: the mean over seeds against the first setting, and each seed as a dot.

    The values are evenly spaced, in the order given. Of a second setting each value has its own line.
    """
    keys = list(sweep.over)
    positions = range(len(sweep.over[keys[0]]))
    panels = []
    for metric in sweep.metrics:
        figure, axes = make_panel(metric, keys[0].split(".")[-1], size=NARROW)
        for number, others in enumerate(product(*(sweep.over[key] for key in keys[1:]))):
            color = LINE_COLORS[number % len(LINE_COLORS)]
            points = [sweep.values_at(metric, value, *others) for value in sweep.over[keys[0]]]
            for position, by_seed in zip(positions, points):
                axes.plot([position] * len(by_seed), by_seed, "o", color=color, markersize=3, alpha=0.5)
            means = [(position, fmean(by_seed)) for position, by_seed in zip(positions, points) if by_seed]
            label = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in zip(keys[1:], others))
            axes.plot(*zip(*means), color=color, label=label or None) if means else None
        for label, value in sweep.references.get(metric, {}).items():
            axes.axhline(value, color=MUTED, linestyle="--", linewidth=1.1)
            axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=MUTED)
        axes.set_xticks(positions, [str(value) for value in sweep.over[keys[0]]])
        if len(keys) > 1:
            axes.legend()
        panels.append(figure)
    return panels


def write_sweep_page(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """Write one self-contained HTML page with the panels, the table and the failed runs of every sweep."""
    with rc_context(STYLE):
        parts = [
            {
                "sweep": sweep,
                "panels": [Markup(figure_to_svg(figure, f"s{n}p{i}")) for i, figure in enumerate(draw_sweep(sweep))],
                "rows": build_table_rows(sweep),
                "failed": [(describe_run(run), run.error) for run in sweep.failed_runs()],
            }
            for n, sweep in enumerate(sweeps)
        ]
    page = load_template("sweep.html.jinja").render(title=title, parts=parts)
    path.write_text(page, encoding="utf-8")
