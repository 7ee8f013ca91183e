"""What came of a sweep: the same run at several values of a setting and several seeds, as files, table and one page."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import MUTED, NARROW, STYLE, make_panel, figure_to_svg
from lit_rlhf.evaluation.reports.quickstart_report import align_columns, format_html_number
from lit_rlhf.evaluation.reports.templates import load_template

# drawn where nothing is asked for: of each group the first that was logged
DEFAULT_METRIC_GROUPS = (
    ("validation/score", "reward/score", "validation/accuracy", "validation/reward_score"),
    ("validation/loss", "train/loss"),
    ("validation/kl", "reward/kl"),
    ("validation/pretraining_loss", "pretraining/loss"),
)
MAX_PANELS = 4
LINE_COLORS = ("#d2562a", "#2b6cb8", "#16876a", "#9a6fc4", "#7a8594", "#b58a12")


class RunResult(NamedTuple):
    """One run."""

    values: dict[str, Any]  # setting -> value
    seed: int
    seconds: float
    metrics: dict[str, float]  # at the end; none where it failed
    error: str = ""


class Sweep(NamedTuple):
    """All runs over the values of one setting or two."""

    title: str
    over: dict[str, list[Any]]  # setting -> values, in order
    runs: list[RunResult]
    metrics: list[str]  # what is drawn
    references: dict[str, dict[str, float]] = {}  # metric -> label -> value, a horizontal line
    note: str = ""

    def values_at(self, metric: str, *values: Any) -> list[float]:
        """Return the metric of every seed at these values, of those that have it."""
        asked = dict(zip(self.over, values))
        return [run.metrics[metric] for run in self.runs if run.values == asked and metric in run.metrics]

    def failed_runs(self) -> list[RunResult]:
        """The runs that did not end well."""
        return [run for run in self.runs if run.error]


def read_final_metrics(path: Path, last: int = 1) -> dict[str, float]:
    """Return each metric of a metrics.csv, as the mean of its `last` last values."""
    columns: dict[str, list[float]] = {}
    with open(path, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                if text and name not in ("epoch", "step"):
                    columns.setdefault(name, []).append(float(text))
    return {name: fmean(values[-last:]) for name, values in columns.items()}


def select_default_metrics(outcomes: Sequence[RunResult]) -> list[str]:
    """Return the metrics to draw where none were asked for."""
    logged = {name for run in outcomes for name in run.metrics}
    usual = [next((name for name in group if name in logged), "") for group in DEFAULT_METRIC_GROUPS]
    return [name for name in usual if name] or sorted(logged)[:MAX_PANELS]


def write_results(sweep: Sweep, folder: Path) -> None:
    """Write results.json (all of it) and results.csv (a row a run, a column a metric)."""
    rows = [run._asdict() for run in sweep.runs]
    about = {"title": sweep.title, "over": sweep.over, "metrics": sweep.metrics, "runs": rows}
    (folder / "results.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    names = sorted({name for run in sweep.runs for name in run.metrics})
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*sweep.over, "seed", "seconds", "error", *names])
        for run in sweep.runs:
            figures = [run.metrics.get(name, "") for name in names]
            writer.writerow([*(run.values[key] for key in sweep.over), run.seed, run.seconds, run.error, *figures])


def read_results(folder: Path) -> Sweep:
    """Return what `write_results` wrote."""
    about = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    outcomes = [RunResult(**run) for run in about["runs"]]
    return Sweep(about["title"], about["over"], outcomes, about["metrics"])


def combinations(over: dict[str, list[Any]]) -> list[tuple[Any, ...]]:
    """Return every combination of values, the last setting changing fastest."""
    found: list[tuple[Any, ...]] = [()]
    for values in over.values():
        found = [(*before, value) for before in found for value in values]
    return found


def build_table_rows(sweep: Sweep) -> list[list[str]]:
    """Return header and one row a combination: mean over seeds, with the range in brackets where there are several."""
    rows = [[*(key.split(".")[-1] for key in sweep.over), "runs", *sweep.metrics]]
    for values in combinations(sweep.over):
        done = sum(run.values == dict(zip(sweep.over, values)) and not run.error for run in sweep.runs)
        row = [*map(str, values), str(done)]
        for metric in sweep.metrics:
            found = sweep.values_at(metric, *values)
            spread = f" [{min(found):.3f}, {max(found):.3f}]" if len(found) > 1 else ""
            row.append(f"{fmean(found):.3f}{spread}" if found else "–")
        rows.append(row)
    return rows


def format_sweep(sweep: Sweep) -> str:
    """Format a sweep for the terminal."""
    lines = [align_columns(build_table_rows(sweep))]
    lines += [f"failed: {describe_run(run)}: {run.error}" for run in sweep.failed_runs()]
    return "\n".join(lines)


def describe_run(run: RunResult) -> str:
    """Return a run in words: its values and its seed."""
    return ", ".join([*(f"{key.split('.')[-1]} {value}" for key, value in run.values.items()), f"seed {run.seed}"])


def draw_sweep(sweep: Sweep) -> list[Figure]:
    """Draw a panel a metric: the mean over seeds against the first setting, every seed as a dot.

    The values stand at equal distances in the order given. A second setting makes one line a value.
    """
    keys = list(sweep.over)
    places = range(len(sweep.over[keys[0]]))
    figures = []
    for metric in sweep.metrics:
        figure, axes = make_panel(metric, keys[0].split(".")[-1], size=NARROW)
        for number, others in enumerate(combinations({key: sweep.over[key] for key in keys[1:]})):
            colour = LINE_COLORS[number % len(LINE_COLORS)]
            found = [sweep.values_at(metric, value, *others) for value in sweep.over[keys[0]]]
            for place, figure_of_seeds in zip(places, found):
                axes.plot([place] * len(figure_of_seeds), figure_of_seeds, "o", color=colour, markersize=3, alpha=0.5)
            means = [(place, fmean(each)) for place, each in zip(places, found) if each]
            label = ", ".join(f"{key.split('.')[-1]} {value}" for key, value in zip(keys[1:], others))
            axes.plot(*zip(*means), color=colour, label=label or None) if means else None
        for label, value in sweep.references.get(metric, {}).items():
            axes.axhline(value, color=MUTED, linestyle="--", linewidth=1.1)
            axes.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=MUTED)
        axes.set_xticks(places, [str(value) for value in sweep.over[keys[0]]])
        if len(keys) > 1:
            axes.legend()
        figures.append(figure)
    return figures


def write_sweep_page(sweeps: Sequence[Sweep], title: str, path: Path) -> None:
    """Write one HTML page that needs no network: for every sweep its panels, its table, and what failed."""
    with rc_context(STYLE):
        parts = [
            {
                "sweep": sweep,
                "panels": [Markup(figure_to_svg(made, f"s{n}p{i}")) for i, made in enumerate(draw_sweep(sweep))],
                "rows": build_table_rows(sweep),
                "failed": [(describe_run(run), run.error) for run in sweep.failed_runs()],
            }
            for n, sweep in enumerate(sweeps)
        ]
    page = load_template("sweep.html.jinja", number=format_html_number).render(title=title, parts=parts)
    path.write_text(page, encoding="utf-8")
