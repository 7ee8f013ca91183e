"""Plots of the report on a reward model, as inline SVG."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import (
    INK,
    MUTED,
    NARROW,
    STYLE,
    WIDE,
    draw_plots,
    make_panel,
    plot_curve,
)
from lit_rlhf.evaluation.reports.quickstart_plots import MODEL_STYLES

Report = dict[str, Any]
MAIN, OTHER, BAD = MODEL_STYLES["sft"].color, MODEL_STYLES["base"].color, MODEL_STYLES["ppo"].color
CURVE_TITLES = {
    "accuracy": "Accuracy",
    "log_loss": "Log loss (nats per pair)",
    "calibration_error": "Calibration error",
    "length_correlation_within": "Correlation of score with length",
    "degenerate": "Worst degenerate answer, share won",
}


def draw_panels(report: Report) -> dict[str, list[str]]:
    """Draw the panels of every plot that the report has data for: name -> SVG elements with unique ids."""
    drawers: Sequence[Callable[[Report], list[Figure]]] = (
        reliability,
        by_margin,
        by_size,
        by_length,
        length,
        degenerate_answers,
        training,
    )
    return draw_plots(drawers, report)


def reliability(report: Report) -> list[Figure]:
    """Draw the reliability diagram: confidence σ(|Δ|) against accuracy, with the number of pairs per bin."""
    bins = report.get("reliability")
    if not bins:
        return []
    confidence, accuracy, count = (np.array(bins[key], dtype=float) for key in ("confidence", "accuracy", "count"))
    figure = Figure(figsize=(WIDE[0], 4.2))
    axes, below = figure.subplots(2, sharex=True, height_ratios=[3.2, 1])
    axes.set_title("Reliability of σ(Δ)")
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    margin = 1.96 * np.sqrt(accuracy * (1 - accuracy) / count)
    axes.errorbar(confidence, accuracy, margin, color=MAIN, marker="o", capsize=3, label="reward model, 95 % interval")
    axes.set(ylabel="accuracy", ylim=(min(0.4, float((accuracy - margin).min()) - 0.03), 1.04))
    axes.legend(loc="upper left")
    below.bar(confidence, count, width=0.018, color=MAIN, alpha=0.55)
    below.set(xlabel="predicted probability of the completion with the higher score", ylabel="pairs", xlim=(0.49, 1.01))
    return [figure]


def render_reliability_image(report: Report) -> Any:
    """Return the reliability diagram as an image, (height, width, 3) uint8."""
    with rc_context(STYLE):
        figure = reliability(report)[0]
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def by_margin(report: Report) -> list[Figure]:
    """Draw accuracy and mean confidence by margin."""
    rows = report.get("by_margin")
    if not rows:
        return []
    figure, axes = make_panel("By margin", "|Δ|, groups of equal size", "accuracy")
    plot_accuracy_bars(axes, rows, [f"{row['low']:.2f}–{row['high']:.2f}" for row in rows])
    axes.plot(range(len(rows)), [row["confidence"] for row in rows], "o", color=INK, markerfacecolor="white")
    return [figure]


def by_size(report: Report) -> list[Figure]:
    """Draw accuracy by K."""
    rows = report.get("by_size")
    if not rows:
        return []
    figure, axes = make_panel("By size of the ranking", "K completions", "accuracy")
    plot_accuracy_bars(axes, rows, [str(row["K"]) for row in rows])
    return [figure]


def by_length(report: Report) -> list[Figure]:
    """Draw accuracy by length difference."""
    rows = report.get("by_length")
    if not rows:
        return []
    figure, axes = make_panel("By length difference", "tokens of the better completion minus the worse", "accuracy")
    plot_accuracy_bars(axes, rows, [f"{row['low']:+.0f} … {row['high']:+.0f}".replace("-", "−") for row in rows])
    return [figure]


def plot_accuracy_bars(axes: Any, rows: Sequence[Report], labels: Sequence[str]) -> None:
    """Draw bars of accuracy by group, with the number of pairs in each and a line at chance."""
    bars = axes.bar(range(len(rows)), [row["accuracy"] for row in rows], color=MAIN, width=0.72)
    axes.bar_label(bars, [f"{row['pairs']:,}" for row in rows], label_type="center", color="white", fontsize=8)
    axes.axhline(0.5, color=MUTED, linestyle="--", linewidth=1.2)
    axes.set_xticks(range(len(rows)), labels, fontsize=8 if len(rows) < 5 else 7.2)
    axes.set_ylim(0, 1.04)
    axes.grid(axis="x", visible=False)


def length(report: Report) -> list[Figure]:
    """Draw score against length, one point per completion."""
    points = report.get("points")
    if not points:
        return []
    figure, axes = make_panel("Score against length", "tokens of the completion", "score")
    x, y = np.array(points, dtype=float).T
    axes.scatter(x, y, s=9, color=MAIN, alpha=0.35, linewidth=0)
    return [figure]


def degenerate_answers(report: Report) -> list[Figure]:
    """Draw how often each kind of degenerate answer outscores the best real one."""
    rows = report.get("degenerate")
    if not rows:
        return []
    figure, axes = make_panel("Outscores the best real answer", "% of prompts")
    shares = [100 * row["outscores"] for row in rows]
    bars = axes.barh(range(len(rows)), shares, color=[BAD if share > 10 else OTHER for share in shares], height=0.6)
    axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=4, fontsize=8.8)
    axes.set_yticks(range(len(rows)), [row["kind"].replace("_", " ") for row in rows])
    axes.set_xlim(0, max(20.0, 1.12 * max(shares)))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return [figure]


def training(report: Report) -> list[Figure]:
    """Draw the summary metrics over the validations of a run; nothing for a single one."""
    history: list[Report] = report.get("history", [])
    panels = []
    for key, title in CURVE_TITLES.items():
        points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
        if len(points) > 1:
            figure, axes = make_panel(title, "optimizer step", size=NARROW)
            plot_curve(axes, points, key, MAIN)
            panels.append(figure)
    return panels
