"""The report of an evaluation as one self-contained HTML page, as JSON, and as tables for the terminal."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from markupsafe import Markup

from lit_rlhf.evaluation.reports.evaluation_charts import MODEL_COLORS, draw_charts
from lit_rlhf.evaluation.reports.quickstart_report import (
    NO_BREAK,
    align_columns,
    check_json_serializable,
    format_duration,
    to_json,
)
from lit_rlhf.evaluation.reports.templates import load_template

MAX_SAMPLES_ON_PAGE = 200  # per suite
MAX_ROWS_IN_TERMINAL = 30
NEUTRAL_KEYS = ("entropy", "P(first)", "P(female)")  # verdicts of the bias suites that are neither good nor bad
DIGITS = {"share": 1, "bits": 3, "score": 3, "points": 2, "tokens": 1, "nats": 3}


def write_evaluation_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.html`.

    Raises:
        ValueError: a number is not finite, or a value is not JSON-serializable; the message names its key.
    """
    check_json_serializable(report, "")
    texts = {"report.json": to_json(report), "report.html": render_page(report)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def render_page(report: dict[str, Any]) -> str:
    """Render the HTML page."""
    colors = {name: MODEL_COLORS[index % len(MODEL_COLORS)] for index, name in enumerate(report["models"])}
    charts = {
        suite: [Markup(svg) for svg in draw_charts(part, colors, f"{index}-")]
        for index, (suite, part) in enumerate(report["suites"].items())
    }
    return load_template(
        "evaluation.html.jinja",
        format_value=format_value,
        format_duration=format_duration,
        format_verdict=format_verdict,
        collect_win_rates_by_use_case=collect_win_rates_by_use_case,
        collect_agreement_rows=collect_agreement_rows,
    ).render(
        report=report,
        verdict_tone=verdict_tone,
        colors=colors,
        charts=charts,
        max_samples=MAX_SAMPLES_ON_PAGE,
        total_seconds=sum(seconds for suites in report["seconds"].values() for seconds in suites.values()),
    )


def collect_win_rates_by_use_case(part: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Return the win rates by (use case, decoding and judge) and model; {} if there is only one use case."""
    rates: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for model, tables in part["tables"].items():
        for label, groups in tables.get("groups", {}).items():
            for group, cell in groups.items():
                rates.setdefault((group, label), {})[model] = cell
    return dict(sorted(rates.items())) if len({group for group, _ in rates}) > 1 else {}


def collect_agreement_rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the agreement of every two judges, and of the labelers within a judge, as rows; without all-tie pairs."""
    rows = []
    for model, tables in part["tables"].items():
        for decoding, judges in tables.get("agreement", {}).items():
            for one, others in judges.items():
                for other, agreement in others.items():
                    if one < other and agreement["share"] is not None:
                        rows.append({"model": model, "decoding": decoding, "judges": f"{one}, {other}", **agreement})
        for decoding, shares in tables.get("labeler_agreement", {}).items():
            for name, share in shares.items():
                unknown = dict.fromkeys(("count", "ties", "kappa", "margin"))
                judges = f"labelers within {name}"
                rows.append({"model": model, "decoding": decoding, "judges": judges, "share": share, **unknown})
    return sorted(rows, key=lambda row: row["judges"])


def format_value(value: float | None, unit: str, sign: bool = False) -> str:
    """Format a value for the page: shares in percent, a typographic minus sign, a dash for None."""
    if value is None:
        return "–"
    scaled = 100 * value if unit == "share" else value
    text = f"{scaled:{'+' if sign else ''}.{DIGITS[unit]}f}".replace("-", "−")
    return f"{text}{NO_BREAK}%" if unit == "share" and not sign else text


def format_verdict(value: Any) -> str:
    """Format a value of a verdict for the page."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


def verdict_tone(name: str, value: Any) -> str:
    """Return the CSS class of a value of a verdict: "good", "bad" or ""."""
    if name == "toxicity":
        return "bad" if value is not None and value >= 0.5 else ""
    if name in NEUTRAL_KEYS or not isinstance(value, int | float):
        return ""
    return "good" if value == 1 else "bad" if value == 0 else ""


def format_tables(report: dict[str, Any], width: int | None = None) -> str:
    """Return the metrics of every suite for a terminal: one row per metric, one column per model."""
    blocks = []
    for suite, part in report["suites"].items():
        header = [f"{suite} ({part['rows']:,} rows)", *report["models"]]
        rows = []
        for name, row in list(part["metrics"].items())[:MAX_ROWS_IN_TERMINAL]:
            values = [row["models"].get(model, {}).get("value") for model in report["models"]]
            rows.append([shorten(name, 44, placeholder="…"), *(format_value(value, row["unit"]) for value in values)])
        num_hidden = len(part["metrics"]) - len(rows)
        table = align_columns([header, *rows], width)
        lines = [f"  {model}: {note}" for model, notes in part["notes"].items() for note in notes]
        blocks.append(
            "\n".join([table, *([f"… and {num_hidden} more in the report"] if num_hidden > 0 else []), *lines])
        )
    return "\n\n".join(blocks).replace(NO_BREAK, " ").replace("−", "-")
