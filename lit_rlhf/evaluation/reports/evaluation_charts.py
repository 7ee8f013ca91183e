"""Plots of a suite's main metrics: a dot with its interval per model."""

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import MUTED, STYLE, figure_to_svg

MODEL_COLORS = ("#7a8594", "#9a6fc4", "#2b6cb8", "#d2562a", "#16876a", "#b8860b", "#c23b7a", "#3a8fa3")
MARKERS = ("s", "D", "o", "^", "v", "P", "X", "*")
MAX_METRICS = 20  # per plot: the first of the suite
WIDTH = 8.2  # inches


def draw_charts(part: dict[str, Any], colors: dict[str, str], prefix: str) -> list[str]:
    """Draw the first metrics of a suite, one plot per unit that has a value.

    Args:
        part: the suite's part of the report.
        colors: model -> color.
        prefix: of every id in the SVG, unique per suite, so that one page can contain several plots.

    Returns:
        SVG elements, one per unit. The same report gives the same bytes.
    """
    if part["kind"] == "Benchmarks":  # one metric per task and number of shots
        first = {name.split(": ")[0]: name for name in reversed(part["metrics"])}
        part = {**part, "metrics": {name: row for name, row in part["metrics"].items() if name in first.values()}}
    units: dict[str, list[str]] = {}
    for name, row in part["metrics"].items():
        if any(cell["value"] is not None for cell in row["models"].values()):
            units.setdefault(row["unit"], []).append(name)
    win_rates = [name for name in units.get("share", []) if name.endswith("win rate")]
    if win_rates:  # without ties, position bias and further shares, which would hide them
        units["share"] = win_rates
    with rc_context(STYLE):
        return [
            figure_to_svg(draw_chart(part, names[:MAX_METRICS], colors), f"chart-{prefix}{index}")
            for index, (unit, names) in enumerate(units.items())
            if unit in ("share", "bits", "score", "points")
        ][:2]


def draw_chart(part: dict[str, Any], names: list[str], colors: dict[str, str]) -> Figure:
    """Draw the given metrics, which have one unit, in one plot."""
    figure = Figure(figsize=(WIDTH, 0.9 + len(names) * (0.22 + 0.075 * len(colors))))
    axes = figure.add_subplot()
    unit = part["metrics"][names[0]]["unit"]
    scale = 100.0 if unit == "share" else 1.0
    axes.set_title({"share": "%", "bits": "bits", "score": "score", "points": "points"}[unit], fontsize=9)
    step = 0.7 / max(len(colors), 1)
    for index, (model, color) in enumerate(colors.items()):
        marker = MARKERS[index % len(MARKERS)]
        offset = (index - (len(colors) - 1) / 2) * step
        for row, name in enumerate(names):
            cell = part["metrics"][name]["models"].get(model)
            if cell is None or cell["value"] is None:
                continue
            value = scale * cell["value"]
            if cell["low"] is not None:
                low, high = scale * cell["low"], scale * cell["high"]
                axes.plot([low, high], [row + offset] * 2, color=color, linewidth=1.3, alpha=0.65)
            axes.plot(value, row + offset, color=color, marker=marker, markersize=5, linestyle="none")
        axes.plot([], [], color=color, marker=marker, linestyle="none", label=model)
    if names[0].endswith("win rate"):
        axes.axvline(50, color=MUTED, linewidth=1.1, linestyle="--")
    if unit == "share":
        axes.set_xlim(-2, 102)
    elif axes.dataLim.x0 >= 0:  # scores and bits: no negative range
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
