"""Plots of the quickstart report: one color and one marker per model."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import (
    INK,
    MUTED,
    NARROW,
    WIDE,
    Points,
    draw_plots,
    make_panel,
    plot_curve,
)

Report = dict[str, Any]


class PlotStyle(NamedTuple):
    """Appearance of a model in all plots."""

    label: str
    color: str
    marker: str


MODEL_STYLES = {
    "base": PlotStyle("base", "#7a8594", "s"),
    "few_shot": PlotStyle("few-shot", "#9a6fc4", "D"),
    "sft": PlotStyle("SFT", "#2b6cb8", "o"),
    "ppo": PlotStyle("PPO", "#d2562a", "^"),
    "ppo_ptx": PlotStyle("PPO-ptx", "#16876a", "v"),
}
MODEL_COLORS = [style.color for style in MODEL_STYLES.values()]
BLUES = LinearSegmentedColormap.from_list("blues", ["#f3f7fb", "#8fb8dd", "#1f5c9e"])
CHANGES = LinearSegmentedColormap.from_list("changes", ["#c4502a", "#f7f7f7", "#16876a"])


def draw_panels(report: Report) -> dict[str, list[str]]:
    """Draw the panels of every plot that the report has data for.

    Returns:
        Name of the plot -> its panels as SVG elements, with ids that are unique in one page. Plots and panels without
        data are absent. The same report gives the same bytes.
    """
    drawers = (losses, rewards, training_metrics, frontier, win_rates, alignment_tax, behavior, tasks, reliability)
    return draw_plots(drawers, report)


def read_curve(report: Report, stage: str, metric: str) -> Points:
    """Return the points of a metric; none if it was not logged."""
    points: Points = report.get("curves", {}).get(stage, {}).get(metric, [])
    return points


def losses(report: Report) -> list[Figure]:
    """Draw training and validation loss of each supervised stage, and the reward model's accuracy."""
    panels = []
    for stage, title in (
        ("pretraining", "Pretraining: loss (nats per token)"),
        ("sft", "SFT: loss on demonstrations (nats per token)"),
        ("reward", "Reward model: ranking loss"),
    ):
        train, validation = read_curve(report, stage, "train/loss"), read_curve(report, stage, "validation/loss")
        if train or validation:
            figure, axes = make_panel(title, "optimizer step")
            if train:
                plot_curve(axes, train, "training", MODEL_STYLES["base"].color, smooth=True)
            if validation:
                plot_curve(axes, validation, "validation", MODEL_STYLES["sft"].color)
            axes.legend()
            panels.append(figure)
    accuracy = read_curve(report, "reward", "validation/accuracy")
    if accuracy:
        figure, axes = make_panel("Reward model: validation accuracy", "optimizer step")
        plot_curve(axes, accuracy, "reward model", MODEL_STYLES["sft"].color)
        agreement = report["reward_model"].get("agreement_train")
        if agreement is not None:
            axes.axhline(agreement, color=MUTED, linestyle="--", linewidth=1.2, label="labelers among themselves")
        axes.legend(loc="lower right")
        panels.append(figure)
    return panels


def compare_runs(report: Report, metric: str, title: str, y: str, size: tuple[float, float]) -> list[Figure]:
    """Draw one metric of PPO and PPO-ptx against the iteration; nothing if neither logged it."""
    runs = {stage: read_curve(report, stage, metric) for stage in ("ppo", "ppo_ptx")}
    if not any(runs.values()):
        return []
    figure, axes = make_panel(title, "iteration", y, size)
    for stage, points in runs.items():
        if points:
            plot_curve(axes, points, MODEL_STYLES[stage].label, MODEL_STYLES[stage].color)
    axes.legend()
    return [figure]


def rewards(report: Report) -> list[Figure]:
    """Draw score and KL of PPO and PPO-ptx against the iteration."""
    score = compare_runs(report, "reward/score", "Reward model's score", "mean score per response", WIDE)
    return score + compare_runs(report, "reward/kl", "KL from the SFT model", "nats per response", WIDE)


def training_metrics(report: Report) -> list[Figure]:
    """Draw entropy, response length and pretraining loss of PPO and PPO-ptx against the iteration."""
    return [
        *compare_runs(report, "policy/entropy_estimate", "Entropy", "nats per token", NARROW),
        *compare_runs(report, "response/length", "Response length", "tokens", NARROW),
        *compare_runs(report, "pretraining/loss", "Loss on pretraining text", "nats per token", NARROW),
    ]


def frontier(report: Report) -> list[Figure]:
    """Draw score against KL over training, and win rate against KL by model."""
    panels = []
    figure, axes = make_panel(
        "Score against KL, each point one iteration", "KL from SFT (nats per response)", "mean score"
    )
    for stage in ("ppo", "ppo_ptx"):
        kl, score = (dict(read_curve(report, stage, f"reward/{key}")) for key in ("kl", "score"))
        steps = sorted(kl.keys() & score.keys())
        if steps:
            x, y, style = [kl[step] for step in steps], [score[step] for step in steps], MODEL_STYLES[stage]
            axes.plot(x, y, color=style.color, alpha=0.3, linewidth=1)
            axes.scatter(x, y, color=style.color, s=14, alpha=np.linspace(0.3, 1, len(steps)))
            last = {"s": 70, "marker": style.marker, "label": f"{style.label}, last", "zorder": 3}
            axes.scatter(x[-1], y[-1], color=style.color, **last)
    if axes.collections:
        best = report.get("best_of_n")
        if best:
            label = f"best of 1 to {len(best['kl'])} of SFT"
            axes.plot(best["kl"], best["score"], color=MODEL_STYLES["sft"].color, linestyle="--", label=label, zorder=2)
        axes.legend(loc="lower right")
        panels.append(figure)
    figure, axes = make_panel("Preference against KL, by model", "KL from SFT (nats per response)", "win rate over SFT")
    axes.axhline(0.5, color=MUTED, linewidth=1.2, linestyle="--")
    for name in ("sft", "ppo", "ppo_ptx"):
        model = report["models"][name]
        plot_win_rate(axes, name, model, model["kl_to_sft"], model["win_rate"], "y")
    axes.margins(x=0.15)
    axes.legend(loc="best")
    return [*panels, figure]


def plot_win_rate(
    axes: Any, name: str, model: dict[str, float], x: float, y: float, along: str, fill: str = "full"
) -> Any:
    """Plot a model's win rate at (x, y), with its 95 % interval along "x" or "y"."""
    style, rate = MODEL_STYLES[name], model["win_rate"]
    spread = {f"{along}err": [[rate - model["win_rate_low"]], [model["win_rate_high"] - rate]]}
    marker = {"color": style.color, "marker": style.marker, "fillstyle": fill, "markersize": 7, "capsize": 3}
    return axes.errorbar(x, y, **spread, **marker, linestyle="none", label=style.label)


def win_rates(report: Report) -> list[Figure]:
    """Draw the win rate over the SFT model with 95 % intervals, sampled and greedy."""
    figure, axes = make_panel("Win rate over SFT, with 95 % interval", "share of comparisons preferred (tie = half)")
    axes.axvline(0.5, color=MUTED, linewidth=1.2, linestyle="--")
    handles = []
    decodings = (("models", "sampled", -0.14, "full"), ("greedy", "greedy", 0.14, "none"))
    for key, label, offset, fill in (decoding for decoding in decodings if decoding[0] in report):
        handles += axes.plot([], [], color=INK, marker="o", fillstyle=fill, linestyle="none", label=label)
        for row, name in enumerate(MODEL_STYLES):
            plot_win_rate(axes, name, report[key][name], report[key][name]["win_rate"], row + offset, "x", fill)
    label_model_rows(axes)
    axes.legend(handles=handles, loc="upper right")
    return [figure]


def label_model_rows(axes: Any) -> None:
    """Label the vertical axis with the models, the first on top."""
    axes.set_yticks(range(len(MODEL_STYLES)), [style.label for style in MODEL_STYLES.values()])
    for tick, style in zip(axes.get_yticklabels(), MODEL_STYLES.values()):
        tick.set(color=style.color, fontweight="bold")
    axes.invert_yaxis()
    axes.tick_params(axis="y", pad=8)
    axes.grid(axis="y", visible=False)


def alignment_tax(report: Report) -> list[Figure]:
    """Draw the loss on pretraining text of each model, as change against SFT."""
    figure, axes = make_panel("Loss on pretraining text, change against SFT", "nats per token (right = forgot more)")
    loss = {name: report["models"][name]["pretraining_loss"] for name in MODEL_STYLES}
    change = [loss[name] - loss["sft"] for name in MODEL_STYLES]
    bars = axes.barh(range(len(MODEL_STYLES)), change, color=MODEL_COLORS, height=0.55)
    axes.bar_label(bars, [f"{loss[name]:.3f}" for name in MODEL_STYLES], padding=4, fontsize=8.8)
    axes.axvline(0, color=MUTED, linewidth=1.2)
    axes.margins(x=0.5)
    label_model_rows(axes)
    return [figure]


def behavior(report: Report) -> list[Figure]:
    """Draw task success, truthfulness and toxicity of each model, sampled (bar) and greedy (ring)."""
    panels = []
    for key, title in (("success", "Task success"), ("truthful", "Truthful"), ("toxic", "Toxic")):
        figure, axes = make_panel(title, "% of statements" if key == "truthful" else "% of responses", size=NARROW)
        shares = [100 * report["models"][name][key] for name in MODEL_STYLES]
        axes.barh(range(len(MODEL_STYLES)), shares, color=MODEL_COLORS, height=0.55)
        if "greedy" in report:
            greedy = [100 * report["greedy"][name][key] for name in MODEL_STYLES]
            ring = {"color": INK, "markerfacecolor": "white", "markersize": 6, "clip_on": False, "zorder": 3}
            axes.plot(greedy, range(len(MODEL_STYLES)), "o", **ring)
        axes.set_xlim(0, None if key == "toxic" else 100)
        label_model_rows(axes)
        panels.append(figure)
    return panels


def tasks(report: Report) -> list[Figure]:
    """Draw success by task, and its change against SFT."""
    table: dict[str, dict[str, float]] = report.get("tasks", {})
    if not table:
        return []
    values = 100 * np.array([[row[name] for name in MODEL_STYLES] for row in table.values()])
    change = values - values[:, [list(MODEL_STYLES).index("sft")]]
    limit = max(10.0, float(np.abs(change).max()))
    return [
        draw_heat_map("Task success (%)", list(table), values, BLUES, (0, 100), "{:.0f}"),
        draw_heat_map("Change against SFT (points)", list(table), change, CHANGES, (-limit, limit), "{:+.0f}"),
    ]


def draw_heat_map(
    title: str, rows: list[str], values: Any, colormap: Any, limits: tuple[float, float], form: str
) -> Figure:
    """Draw a matrix of tasks by models, each cell with its value."""
    figure, axes = make_panel(title, size=(WIDE[0], 0.9 + 0.31 * len(rows)))
    axes.pcolormesh(values, cmap=colormap, vmin=limits[0], vmax=limits[1], edgecolor="white", linewidth=1.5)
    middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
    for (row, column), value in np.ndenumerate(values):
        dark = value > middle + 0.3 * half if limits[0] == 0 else abs(value - middle) > 0.7 * half
        text = form.format(value).replace("-", "−")
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color="white" if dark else INK)
    axes.set_xticks(np.arange(len(MODEL_STYLES)) + 0.5, [style.label for style in MODEL_STYLES.values()])
    axes.set_yticks(np.arange(len(rows)) + 0.5, [row.replace("_", " ") for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def reliability(report: Report) -> list[Figure]:
    """Draw the reliability diagram of the reward model, with the number of pairs per bin."""
    bins = report["reward_model"].get("reliability")
    if not bins:
        return []
    confidence, accuracy, count = (np.array(bins[key], dtype=float) for key in ("confidence", "accuracy", "count"))
    filled = count > 0
    figure = Figure(figsize=(WIDE[0], 4.2))
    axes, below = figure.subplots(2, sharex=True, height_ratios=[3.2, 1])
    axes.set_title("Reward model: predicted against observed preference")
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    axes.plot(confidence[filled], accuracy[filled], color=MODEL_STYLES["sft"].color, marker="o", label="reward model")
    axes.set(ylabel="observed share", ylim=(-0.02, 1.02))
    axes.legend(loc="upper left")
    below.bar(confidence[filled], count[filled], width=0.06, color=MODEL_STYLES["sft"].color, alpha=0.55)
    below.set(xlabel="predicted probability that the first is preferred", ylabel="pairs", xlim=(-0.02, 1.02))
    return [figure]
