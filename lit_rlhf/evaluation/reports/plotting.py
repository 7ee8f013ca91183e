"""Matplotlib figures as inline SVG for a self-contained page: one style, text as outlines."""

import re
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]  # [[step, value], ...]
INK, MUTED, RULE = "#1c2530", "#5d6875", "#dde2e8"
STYLE = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#b9c1cb",
    **dict.fromkeys(("axes.axisbelow", "axes.grid"), True),
    "grid.color": RULE,
    "text.color": INK,
    "text.parse_math": False,  # a task's name may contain a dollar sign
    **dict.fromkeys(("xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "lines.linewidth": 1.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "lit_rlhf",
    "figure.constrained_layout.use": True,
}
WIDE, NARROW = (5.4, 3.4), (3.7, 2.8)  # inches: two and three panels per row


def draw_plots(
    drawers: Sequence[Callable[[dict[str, Any]], list[Figure]]], report: dict[str, Any]
) -> dict[str, list[str]]:
    """Draw every plot that the report has data for: name of its function -> SVG elements with unique ids."""
    with rc_context(STYLE):
        drawn = {draw.__name__: draw(report) for draw in drawers}
        return {
            key: [figure_to_svg(figure, f"{key}{i}") for i, figure in enumerate(panels)]
            for key, panels in drawn.items()
            if panels
        }


def figure_to_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element whose ids start with `name`."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<!--.*?-->|\n\s*(?=[<\n])", "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{figure.axes[0].get_title("left")}" ', 1)


def make_panel(title: str, x: str = "", y: str = "", size: tuple[float, float] = WIDE) -> tuple[Figure, Any]:
    """Return a figure with one panel, and its axes."""
    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes


def plot_curve(axes: Any, points: Points, label: str, color: str, smooth: bool = False) -> None:
    """Plot points; with `smooth`, faintly, and their running mean over 1/40 of the run on top."""
    x, y = np.array(points, dtype=float).T
    window = max(1, len(x) // 40) if smooth else 1
    if window > 1:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        x, y = (np.convolve(values, np.ones(window) / window, "valid") for values in (x, y))
    axes.plot(x, y, color=color, label=label, marker="o" if len(x) <= 15 else None, markersize=4)
