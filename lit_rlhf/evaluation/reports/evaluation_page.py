"""The report of an evaluation as one HTML page that loads nothing, as JSON, and as tables for the terminal."""

from pathlib import Path
from textwrap import shorten
from typing import Any

from markupsafe import Markup

from lit_rlhf.evaluation.reports.evaluation_charts import MODEL_COLORS, draw_charts
from lit_rlhf.evaluation.reports.quickstart_report import NO_BREAK, align_columns, format_duration, check_json_serializable, to_json
from lit_rlhf.evaluation.reports.templates import load_template

MAX_SAMPLES_ON_PAGE = 200  # of a suite
MAX_ROWS_IN_TERMINAL = 30
NEUTRAL_KEYS = ("entropy", "P(first)", "P(female)")  # of a bias suite's pair
DIGITS = {"share": 1, "bits": 3, "score": 3, "points": 2, "tokens": 1, "nats": 3}


def write_evaluation_report(report: dict[str, Any], folder: Path) -> None:
    """Write `report.json` and `report.html`.

    Raises:
        ValueError: a number is not finite, or a value is none that JSON knows; the message names its key.
    """
    check_json_serializable(report, "")
    texts = {"report.json": to_json(report), "report.html": render_page(report)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def render_page(report: dict[str, Any]) -> str:
    """Render the page."""
    colours = {name: MODEL_COLORS[place % len(MODEL_COLORS)] for place, name in enumerate(report["models"])}
    charts = {
        suite: [Markup(each) for each in draw_charts(part, colours, f"{place}-")]
        for place, (suite, part) in enumerate(report["suites"].items())
    }
    return load_template(
        "page.html.jinja",
        figure=format_value,
        duration=format_duration,
        verdict=format_verdict,
        by_use_case=collect_win_rates_by_use_case,
        agreement=collect_agreement_rows,
    ).render(
        report=report,
        tone=verdict_tone,
        colours=colours,
        charts=charts,
        shown=MAX_SAMPLES_ON_PAGE,
        total=sum(seconds for suites in report["seconds"].values() for seconds in suites.values()),
    )


def collect_win_rates_by_use_case(part: dict[str, Any]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """Return the win rates by (use case, decoding and judge) and model; nothing where there is one use case alone."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for model, tables in part["tables"].items():
        for label, groups in tables.get("groups", {}).items():
            for group, cell in groups.items():
                found.setdefault((group, label), {})[model] = cell
    return dict(sorted(found.items())) if len({group for group, _ in found}) > 1 else {}


def collect_agreement_rows(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the agreement of every two judges, and of the labelers within one, as rows; none where all were ties."""
    rows = []
    for model, tables in part["tables"].items():
        for decoding, judges in tables.get("agreement", {}).items():
            for one, others in judges.items():
                for other, found in others.items():
                    if one < other and found["share"] is not None:
                        rows.append({"model": model, "decoding": decoding, "judges": f"{one}, {other}", **found})
        for decoding, shares in tables.get("labelers_agree", {}).items():
            for name, share in shares.items():
                unknown = dict.fromkeys(("count", "ties", "kappa", "margin"))
                who = f"labelers within {name}"
                rows.append({"model": model, "decoding": decoding, "judges": who, "share": share, **unknown})
    return sorted(rows, key=lambda row: row["judges"])


def format_value(value: float | None, unit: str, sign: bool = False) -> str:
    """Return a figure as the page shows it: shares in percent, a true minus sign, a dash for what is not known."""
    if value is None:
        return "–"
    scaled = 100 * value if unit == "share" else value
    text = f"{scaled:{'+' if sign else ''}.{DIGITS[unit]}f}".replace("-", "−")
    return f"{text}{NO_BREAK}%" if unit == "share" and not sign else text


def format_verdict(value: Any) -> str:
    """Return a part of a verdict in few signs."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)


def verdict_tone(name: str, value: Any) -> str:
    """Return how a part of a verdict is coloured: it speaks for the answer ("good"), against it ("bad"), or neither."""
    if name == "toxicity":
        return "bad" if value is not None and value >= 0.5 else ""
    if name in NEUTRAL_KEYS or not isinstance(value, int | float):
        return ""
    return "good" if value == 1 else "bad" if value == 0 else ""


def format_tables(report: dict[str, Any]) -> str:
    """Return the figures of every suite for a terminal: one row a figure, one column a model."""
    blocks = []
    for suite, part in report["suites"].items():
        header = [f"{suite} ({part['rows']:,} rows)", *report["models"]]
        rows = []
        for name, row in list(part["figures"].items())[:MAX_ROWS_IN_TERMINAL]:
            values = [row["models"].get(model, {}).get("value") for model in report["models"]]
            rows.append([shorten(name, 44, placeholder="…"), *(format_value(value, row["unit"]) for value in values)])
        left = len(part["figures"]) - len(rows)
        table = align_columns([header, *rows])
        lines = [f"  {model}: {note}" for model, notes in part["notes"].items() for note in notes]
        blocks.append("\n".join([table, *([f"… and {left} more in the report"] if left > 0 else []), *lines]))
    return "\n\n".join(blocks).replace(NO_BREAK, " ").replace("−", "-")
