"""The report on a reward model as `reward_quality.json` and one self-contained HTML page."""

from pathlib import Path

from markupsafe import Markup

from lit_rlhf.evaluation.degenerate_answers import DEGENERATE_KINDS
from lit_rlhf.evaluation.reports.quickstart_report import (
    check_json_serializable,
    format_html_number,
    format_percent,
    to_json,
)
from lit_rlhf.evaluation.reports.reward_model_plots import Report, draw_panels
from lit_rlhf.evaluation.reports.templates import load_template

REPORT_NAME = "reward_quality"


def write_reward_model_report(report: Report, folder: Path) -> Path:
    """Write the JSON file and the page.

    Args:
        report: the metrics of `compute_reward_model_metrics` and "step"; optionally "degenerate" (the rows of
            `degenerate_win_rates`), "examples" (prompt and answers, each with kind, text and score) and "history" (rows
            of `summarize_metrics` with step).
        folder: created if it is missing.

    Returns:
        The path of the page.
    """
    check_json_serializable(report, "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{REPORT_NAME}.json").write_text(to_json(report), encoding="utf-8")
    page = folder / f"{REPORT_NAME}.html"
    page.write_text(render_html(report), encoding="utf-8")
    return page


def render_html(report: Report) -> str:
    """Render the HTML page."""
    panels = {name: [Markup(svg) for svg in svgs] for name, svgs in draw_panels(report).items()}
    return load_template(
        f"{REPORT_NAME}.html.jinja", format_percent=format_percent, format_number=format_html_number
    ).render(report=report, panels=panels, kinds=DEGENERATE_KINDS)
