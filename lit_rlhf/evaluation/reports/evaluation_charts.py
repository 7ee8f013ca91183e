"""A suite's main figures as one plot: a dot with its interval for each model."""

from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import MUTED, STYLE, figure_to_svg

MODEL_COLORS = ("#7a8594", "#9a6fc4", "#2b6cb8", "#d2562a", "#16876a", "#b8860b", "#c23b7a", "#3a8fa3")
MARKERS = ("s", "D", "o", "^", "v", "P", "X", "*")
MAX_METRICS = 20  # figures in a plot: the first of the suite
WIDTH = 8.2  # inches


def draw_charts(part: dict[str, Any], colors: dict[str, str], prefix: str) -> list[str]:
    """Draw a suite's first figures of each unit that has at least one value, fit to stand in one page together.

    Args:
        part: the suite's part of the report.
        colours: of the models.
        prefix: of every id, different for each suite.

    Returns:
        SVG elements, one a unit. The same report gives the same bytes.
    """
    if part["kind"] == "Benchmarks":  # one figure a task and number of shots
        first = {name.split(": ")[0]: name for name in reversed(part["figures"])}
        part = {**part, "figures": {name: row for name, row in part["figures"].items() if name in first.values()}}
    units: dict[str, list[str]] = {}
    for name, row in part["figures"].items():
        if any(cell["value"] is not None for cell in row["models"].values()):
            units.setdefault(row["unit"], []).append(name)
    won = [name for name in units.get("share", []) if name.endswith("win rate")]
    if won:  # ties, orders and further shares would hide them
        units["share"] = won
    with rc_context(STYLE):
        return [
            figure_to_svg(draw_chart(part, names[:MAX_METRICS], colors), f"chart-{prefix}{place}")
            for place, (unit, names) in enumerate(units.items())
            if unit in ("share", "bits", "score", "points")
        ][:2]


def draw_chart(part: dict[str, Any], names: list[str], colors: dict[str, str]) -> Figure:
    """Draw one plot."""
    figure = Figure(figsize=(WIDTH, 0.9 + len(names) * (0.22 + 0.075 * len(colors))))
    axes = figure.add_subplot()
    unit = part["figures"][names[0]]["unit"]
    scale = 100.0 if unit == "share" else 1.0
    axes.set_title({"share": "%", "bits": "bits", "score": "score", "points": "points"}[unit], fontsize=9)
    step = 0.7 / max(len(colors), 1)
    for place, (model, colour) in enumerate(colors.items()):
        offset = (place - (len(colors) - 1) / 2) * step
        for row, name in enumerate(names):
            cell = part["figures"][name]["models"].get(model)
            if cell is None or cell["value"] is None:
                continue
            value = scale * cell["value"]
            if cell["low"] is not None:
                low, high = scale * cell["low"], scale * cell["high"]
                axes.plot([low, high], [row + offset] * 2, color=colour, linewidth=1.3, alpha=0.65)
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(value, row + offset, color=colour, marker=marker, markersize=5, linestyle="none")
        axes.plot([], [], color=colour, marker=MARKERS[place % len(MARKERS)], linestyle="none", label=model)
    if names[0].endswith("win rate"):
        axes.axvline(50, color=MUTED, linewidth=1.1, linestyle="--")
    if unit == "share":
        axes.set_xlim(-2, 102)
    elif axes.dataLim.x0 >= 0:  # scores and bits: no axis of what cannot be
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
