"""The quality of a reward model as `reward_quality.json` and one self-contained page beside it."""

from pathlib import Path

from markupsafe import Markup

from lit_rlhf.evaluation.degenerate_answers import KINDS
from lit_rlhf.evaluation.reports.quickstart_report import percent, refuse_unspeakable, to_json, typeset
from lit_rlhf.evaluation.reports.reward_model_plots import Report, draw
from lit_rlhf.evaluation.reports.templates import page_template

NAME = "reward_quality"


def write_quality(report: Report, folder: Path) -> Path:
    """Write both files; the page needs no network, and every text on it is escaped.

    Args:
        report: what `figures_of` returned, with "step", and where there are any "degenerate" (of `degenerate_shares`),
            "examples" (prompt and answers, each with kind, text and score) and "history" (of `summary_of`, with step).
        folder: made where it is missing.

    Returns:
        The page's path.
    """
    refuse_unspeakable(report, "")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{NAME}.json").write_text(to_json(report), encoding="utf-8")
    page = folder / f"{NAME}.html"
    page.write_text(to_html(report), encoding="utf-8")
    return page


def to_html(report: Report) -> str:
    """Render the page."""
    panels = {name: [Markup(panel) for panel in drawn] for name, drawn in draw(report).items()}
    return page_template(f"{NAME}.html.jinja", percent=percent, number=typeset).render(
        report=report, panels=panels, kinds=KINDS
    )
