"""The report of `lit-rlhf paper`: one page with a section per figure of the paper, and the same as JSON."""

from collections import Counter
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context

from lit_rlhf.evaluation.reports.plotting import MUTED, STYLE, figure_to_svg, make_panel
from lit_rlhf.evaluation.reports.quickstart_plots import MODEL_STYLES, PlotStyle
from lit_rlhf.evaluation.reports.quickstart_report import check_json_serializable, format_html_number, to_json
from lit_rlhf.evaluation.reports.templates import load_template

STYLES = {
    **MODEL_STYLES,
    "flan": PlotStyle("FLAN-like", "#b58a1b", "P"),
    "t0": PlotStyle("T0-like", "#8c564b", "X"),
}
# labelers and their groups: colors and markers of models that are in no panel with them
SAME_STYLES = {
    "training_labelers": "sft",
    "heldout_labelers": "ppo",
    "best_of_n": "base",
    "helpful": "sft",
    "truthful": "ppo",
    "harmless": "ppo_ptx",
    "brief": "few_shot",
    "balanced": "flan",
    "named": "base",
}
STYLES |= {kind: STYLES[model] for kind, model in SAME_STYLES.items()}
OUTCOMES = {"agrees": "agrees", "disagrees": "does not agree", "undecided": "undecided"}
UNITS = {
    "share": "",
    "bits": "bits",
    "points": "Likert, 1 to 7",
    "score": "score",
    "days": "petaflop/s-days",
    "percent": "%",
}


def write_paper_report(report: dict[str, Any], path_json: Path, path_html: Path) -> None:
    """Write the report as JSON and as one self-contained HTML page.

    Args:
        report: of `lit_rlhf.synthetic.paper.results.build_report`.
        path_json: path of the JSON file.
        path_html: path of the page.

    Raises:
        ValueError: a number is not finite.
    """
    check_json_serializable(report, "")
    for path, text in ((path_json, to_json(report)), (path_html, render_paper_page(report))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def render_paper_page(report: dict[str, Any]) -> str:
    """Render the page; the same report gives the same bytes."""
    with rc_context(STYLE):
        charts = {
            section["key"]: [
                Markup(draw_chart(panel, f"{section['key']}{index}")) for index, panel in enumerate(section["panels"])
            ]
            for section in report["sections"]
        }
    counts = Counter(claim["outcome"] for section in report["sections"] for claim in section["claims"])
    return load_template("paper.html.jinja", format_value=format_value).render(
        report=report, charts=charts, styles=STYLES, outcomes=OUTCOMES, units=UNITS, counts=counts
    )


def draw_chart(panel: dict[str, Any], name: str) -> str:
    """Draw a panel: lines over the axis with 95 % intervals, the paper's dashed; bars where the axis has one label."""
    figure, axes = make_panel(panel["title"], y=UNITS[panel["unit"]], size=(4.6, 3.1))
    (draw_bars if len(panel["x"]) == 1 else draw_lines)(axes, panel)
    if panel["unit"] == "share":
        axes.set_ylim(bottom=0) if len(panel["x"]) > 1 else axes.set_xlim(left=0)
    return figure_to_svg(figure, name)


def draw_lines(axes: Any, panel: dict[str, Any]) -> None:
    """Draw one line per series."""
    labels = range(len(panel["x"]))
    for series in panel["series"]:
        style, values, positions = STYLES[series["kind"]], series["values"], series["positions"] or labels
        spread = [[value - low for value, low, _ in values], [high - value for value, _, high in values]]
        middle = [value for value, *_ in values]
        axes.errorbar(
            positions, middle, spread, color=style.color, marker=style.marker, label=series["label"], capsize=3
        )
        if series["paper"]:
            axes.plot(positions, series["paper"], color=style.color, linestyle=":", linewidth=1.2, alpha=0.7)
    if panel["axis"]:
        axes.set_xlabel(panel["axis"])
    else:
        axes.set_xticks(labels, [label if len(label) < 12 else label.split()[0] for label in panel["x"]])
    axes.margins(x=0.08)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2 if panel["axis"] else -0.1))


def draw_bars(axes: Any, panel: dict[str, Any]) -> None:
    """Draw one bar per series, and the paper's value as a line across it."""
    rows = list(reversed(panel["series"]))
    for row, series in enumerate(rows):
        value, low, high = series["values"][0]
        axes.barh(row, value, xerr=[[value - low], [high - value]], color=STYLES[series["kind"]].color, height=0.6)
        if series["paper"]:
            axes.plot([series["paper"][0]] * 2, [row - 0.4, row + 0.4], color=MUTED, linestyle=":")
    axes.set_yticks(range(len(rows)), [series["label"] for series in rows])
    axes.set(ylabel="", xlabel=UNITS[panel["unit"]])


def format_value(value: float, unit: str) -> str:
    """Return a number of a table: two digits after the point, or three significant ones of very small numbers."""
    return f"{value:.2g}" if unit == "days" else format_html_number(value, 2)
