"""Results of `lit-rlhf real` as `report.json`, as one self-contained HTML page, and as a table for the terminal."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from lit_rlhf.evaluation.reports.plotting import (
    MUTED,
    NARROW,
    WIDE,
    Points,
    draw_plots,
    make_panel,
    plot_curve,
)
from lit_rlhf.evaluation.reports.quickstart_plots import MODEL_STYLES, Report
from lit_rlhf.evaluation.reports.quickstart_report import (
    NO_BREAK,
    TERMINAL_WIDTH,
    align_columns,
    check_json_serializable,
    format_duration,
    format_html_number,
    format_number,
    format_percent,
    to_json,
)
from lit_rlhf.evaluation.reports.templates import load_template

STAGE_TITLES = {
    "sft": "SFT",
    "reward": "proxy reward model",
    "gold": "gold reward model",
    "politeness": "politeness reward model",
    "ppo": "PPO",
    "ppo-ptx": "PPO-ptx",
}
COLORS = {"proxy": MODEL_STYLES["ppo"].color, "gold": MODEL_STYLES["ppo_ptx"].color}
STYLES = {"PPO": MODEL_STYLES["ppo"], "PPO-ptx": MODEL_STYLES["ppo_ptx"]}


class Column(NamedTuple):
    """A column of the table: one metric of one suite."""

    title: str
    suite: str
    metric: str
    digits: int
    is_share: bool = False


COLUMNS = (
    Column("preferred to SFT", "preference", "T = 1: win rate", 3),
    Column("proxy", "scores", "proxy score", 2),
    Column("gold", "scores", "gold score", 2),
    Column("KL", "scores", "KL", 2),
    Column("tokens", "scores", "length", 1),
    Column("toxicity", "toxicity", "basic", 3),
    Column("asked to be respectful", "toxicity", "respectful", 3),
    Column("TruthfulQA MC1", "truthfulness", "qa: MC1", 1, True),
    Column("MC2", "truthfulness", "qa: MC2", 1, True),
    Column("HellaSwag", "benchmarks", "hellaswag: accuracy", 1, True),
    Column("loss, encyclopedia", "text", "encyclopedia", 3),
    Column("loss, novels", "text", "novels", 3),
)


def get_cell(report: Report, column: Column, model: str) -> dict[str, Any] | None:
    """Return value and interval of a metric of a model; None where it was not measured."""
    suite = report["evaluation"]["suites"].get(column.suite, {"metrics": {}})
    cell: dict[str, Any] | None = suite["metrics"].get(column.metric, {"models": {}})["models"].get(model)
    return None if cell is None or cell["value"] is None else cell


def format_cell(cell: dict[str, Any] | None, column: Column, with_interval: bool = True) -> str:
    """Return a cell as text, with its 95 % interval."""
    if cell is None:
        return "–"

    def text(value: float) -> str:
        return format_percent(value, column.digits) if column.is_share else format_number(value, column.digits)

    interval = f" [{text(cell['low'])}, {text(cell['high'])}]" if with_interval and cell["low"] is not None else ""
    return text(cell["value"]) + interval


def build_rows(report: Report, with_interval: bool = True) -> list[list[str]]:
    """Return the header, and a row of text per model."""
    rows = [["", *(column.title for column in COLUMNS)]]
    for model in report["evaluation"]["models"]:
        rows.append([model, *(format_cell(get_cell(report, c, model), c, with_interval) for c in COLUMNS)])
    return rows


def write_real_report(report: Report, path_json: Path, path_html: Path) -> None:
    """Write the report as JSON with sorted keys, and as one self-contained HTML page.

    Args:
        report: as `lit-rlhf real` collects it.
        path_json: path of `report.json`.
        path_html: path of the page.

    Raises:
        ValueError: a number is not finite, or a value is not JSON-serializable; the message names its key.
    """
    check_json_serializable(report, "")
    texts = {path_json: to_json(report), path_html: render_real_html(report)}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def render_real_html(report: Report) -> str:
    """Render the HTML page."""
    panels = {name: [Markup(svg) for svg in svgs] for name, svgs in draw_panels(report).items()}
    suites = report["evaluation"]["suites"]
    samples = [*suites["samples"]["samples"], *suites["preference"]["samples"]]
    return load_template(
        "real.html.jinja",
        format_percent=format_percent,
        format_number=format_html_number,
        format_duration=format_duration,
    ).render(
        report=report,
        rows=build_rows(report),
        panels=panels,
        samples=samples,
        models=list(report["evaluation"]["models"]),
        stage_titles=STAGE_TITLES,
        changes=compute_changes(report),
    )


def compute_changes(report: Report) -> dict[str, dict[str, float]]:
    """Return by stage how far the scores moved from the first iteration to the best one by gold.

    The keys: iteration, KL, and the changes of the proxy's and the gold model's score, the former also in standard
    deviations of the first iteration's scores.
    """
    changes = {}
    for stage in ("ppo", "ppo-ptx"):
        curves = {name: dict(points) for name, points in report["curves"][stage].items()}
        gold, proxy = curves.get("reward/gold", {}), curves.get("reward/proxy", {})
        if not gold:
            continue
        best, first = max(gold, key=gold.__getitem__), min(gold)
        spread = curves.get("reward/score_std", {}).get(first, 0.0)
        changes[stage] = {
            "iteration": best,
            "kl": curves["reward/kl"][best],
            "gold": gold[best] - gold[first],
            "proxy": proxy[best] - proxy[first],
            "deviations": (proxy[best] - proxy[first]) / spread if spread else 0.0,
        }
    return changes


def draw_panels(report: Report) -> dict[str, list[str]]:
    """Draw the panels of every plot that the report has data for; the same report gives the same bytes."""
    drawers = (optimization, learning, reliability)
    return draw_plots(drawers, report)


def optimization(report: Report) -> list[Figure]:
    """Draw proxy and gold score against the square root of the KL, for PPO and PPO-ptx, as Gao et al. do."""
    panels = []
    for stage in ("ppo", "ppo-ptx"):
        curves = {name: dict(points) for name, points in report["curves"][stage].items()}
        kl = curves.get("reward/kl", {})
        figure, axes = make_panel(
            f"{STAGE_TITLES[stage]}: change of the score since the first iteration", "√KL (nats per response)", "score"
        )
        for name, color in COLORS.items():
            scores = curves.get(f"reward/{name}", {})
            steps = sorted(kl.keys() & scores.keys())
            if steps:
                x = np.sqrt([max(kl[step], 0.0) for step in steps])
                axes.scatter(x, [scores[step] - scores[steps[0]] for step in steps], color=color, s=16, label=name)
        if axes.collections:
            axes.axhline(0, color=MUTED, linewidth=1.2, linestyle="--")
            axes.legend()
            panels.append(figure)
    return panels


def learning(report: Report) -> list[Figure]:
    """Draw the losses of the supervised stages, and KL, length and text loss of PPO."""
    panels = []
    for stage, metric, title in (
        ("sft", "train/loss", "SFT: loss on demonstrations (nats per token)"),
        ("reward", "train/loss", "Proxy reward model: ranking loss"),
        ("gold", "train/loss", "Gold reward model: ranking loss"),
    ):
        points: Points = report["curves"][stage].get(metric, [])
        if points:
            figure, axes = make_panel(title, "optimizer step", size=NARROW)
            plot_curve(axes, points, "training", MODEL_STYLES["sft"].color, smooth=True)
            panels.append(figure)
    for metric, title, y in (
        ("reward/kl", "KL from SFT", "nats per response"),
        ("response/length", "Response length", "tokens"),
        ("pretraining/loss", "Loss on pretraining text", "nats per token"),
    ):
        curves = {stage: report["curves"][stage].get(metric, []) for stage in ("ppo", "ppo-ptx")}
        if any(curves.values()):
            figure, axes = make_panel(title, "iteration", y, NARROW)
            for stage, points in curves.items():
                if points:
                    style = STYLES[STAGE_TITLES[stage]]
                    plot_curve(axes, points, style.label, style.color)
            axes.legend()
            panels.append(figure)
    return panels


def reliability(report: Report) -> list[Figure]:
    """Draw the calibration of the reward models on held-out rankings of each source."""
    figure, axes = make_panel(
        "Predicted against observed preference, held out", "predicted probability", "observed share", WIDE
    )
    axes.plot([0.5, 1], [0.5, 1], color=MUTED, linestyle="--", linewidth=1.2)
    colors = {"reward": COLORS["proxy"], "gold": COLORS["gold"], "politeness": MODEL_STYLES["sft"].color}
    for stage, sources in report["reward_models"].items():
        for (source, metrics), marker in zip(sources.items(), "o^s"):
            if "reliability" in metrics:
                curve, label = metrics["reliability"], f"{STAGE_TITLES[stage].partition(' ')[0]}, {source}"
                points = curve["confidence"], curve["accuracy"]
                axes.plot(*points, color=colors[stage], marker=marker, alpha=0.7, label=label)
    axes.legend(fontsize=8)
    return [figure]


def format_real_table(report: Report, width: int = TERMINAL_WIDTH) -> str:
    """Format the results for a terminal: the models, the reward models, the time."""
    models = align_columns(build_rows(report), width)
    rows = [["held-out rankings", "accuracy", "calibration error", "pairs"]]
    for stage, sources in report["reward_models"].items():
        for source, metrics in sources.items():
            if "accuracy" in metrics:
                interval = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**metrics["accuracy"])
                error = format_number(metrics["calibration_error"], 3)
                rows.append([f"{STAGE_TITLES[stage]}, {source}", interval, error, str(metrics["pairs"])])
    times = ", ".join(f"{name} {seconds:.0f}" for name, seconds in report["stages"].items())
    seconds = (
        f"Seconds: {times}; {report['seconds_total']:.0f} in all. Peak memory {report['peak_memory_gib']:.2f} GiB."
    )
    return "\n\n".join((models, align_columns(rows, width), seconds)).replace(NO_BREAK, " ")
