"""The quality of a reward model as `reward_quality.json` and one self-contained page beside it."""

from pathlib import Path

from markupsafe import Markup

from lit_rlhf.evaluation.degenerate_answers import DEGENERATE_KINDS
from lit_rlhf.evaluation.reports.quickstart_report import format_percent, check_json_serializable, to_json, format_html_number
from lit_rlhf.evaluation.reports.reward_model_plots import Report, draw_panels
from lit_rlhf.evaluation.reports.templates import load_template

REPORT_NAME = "reward_quality"


def write_reward_model_report(report: Report, folder: Path) -> Path:
    """Write both files; the page needs no network, and every text on it is escaped.

    Args:
        report: what `figures_of` returned, with "step", and where there are any "degenerate" (of `degenerate_shares`),
            "examples" (prompt and answers, each with kind, text and score) and "history" (of `summary_of`, with step).
        folder: made where it is missing.

    Returns:
        The page's path.
    """
    check_json_serializable(report, "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{REPORT_NAME}.json").write_text(to_json(report), encoding="utf-8")
    page = folder / f"{REPORT_NAME}.html"
    page.write_text(render_html(report), encoding="utf-8")
    return page


def render_html(report: Report) -> str:
    """Render the page."""
    panels = {name: [Markup(panel) for panel in drawn] for name, drawn in draw_panels(report).items()}
    return load_template(f"{REPORT_NAME}.html.jinja", percent=format_percent, number=format_html_number).render(
        report=report, panels=panels, kinds=DEGENERATE_KINDS
    )
