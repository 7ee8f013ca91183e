"""Results of the quickstart as `report.json`, as one self-contained HTML page, and as a table for the terminal."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from markupsafe import Markup

from lit_rlhf.evaluation.reports.quickstart_plots import MODEL_STYLES, Report, draw_panels
from lit_rlhf.evaluation.reports.templates import load_template

STAGE_TITLES = {
    "pretraining": "Pretraining",
    "sft": "SFT",
    "reward": "Reward model",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
}
REQUIRED_METRICS = (
    "win_rate",
    "win_rate_low",
    "win_rate_high",
    "truthful",
    "toxic",
    "success",
    "pretraining_loss",
    "kl_to_sft",
)
MAX_SAMPLES_ON_PAGE = 150
TERMINAL_WIDTH = 100  # columns where none are known
NO_BREAK = "\N{NO-BREAK SPACE}"


def write_report(report: Report, path_json: Path, path_html: Path) -> None:
    """Write the report as JSON (with sorted keys: the same values give the same bytes) and as one HTML page.

    The page is self-contained: inline SVG, style and script; text is escaped. It shows the first 150 samples and their
    number; the JSON has all. Parts without data (curves, tasks, samples, greedy, ...) are omitted.

    Args:
        report: a report that passes `check_report`.
        path_json: path of `report.json`; its folder is created.
        path_html: path of the page; its folder is created.

    Raises:
        AssertionError: a required key is missing.
        ValueError: a number is not finite, or a value is not JSON-serializable; the message names its key.
    """
    check_report(report)
    texts = {path_json: to_json(report), path_html: render_html(report)}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def check_report(report: Report) -> None:
    """Check that a report has the required keys and is JSON-serializable.

    Required: `stages.{pretraining,sft,reward,ppo,ppo_ptx}.seconds`;
    `reward_model.{train_labelers_accuracy,heldout_labelers_accuracy}`; `models.{base,few_shot,sft,ppo,ppo_ptx}` (and
    `greedy.…`, if present) with a number for each of `REQUIRED_METRICS`; each of `tasks`, if present, with a number per
    model; `seed`; `versions`.

    Raises:
        AssertionError: a key is missing, or a model is unknown.
        ValueError: a value is not finite or not JSON-serializable.
    """
    for part in ("stages", "reward_model", "models", "seed", "versions"):
        assert part in report, f"the report lacks {part}"
    check_json_serializable(report, "")
    decodings = [key for key in ("models", "greedy") if key in report]
    needed: list[tuple[str, ...]] = [("stages", stage, "seconds") for stage in (*STAGE_TITLES, *report["stages"])]
    needed += [("reward_model", f"{group}_labelers_accuracy") for group in ("train", "heldout")]
    needed += [
        (decoding, model, metric) for decoding in decodings for model in MODEL_STYLES for metric in REQUIRED_METRICS
    ]
    needed += [("tasks", task, model) for task in report.get("tasks", {}) for model in MODEL_STYLES]
    for path in needed:
        value: Any = report
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        assert isinstance(value, int | float), f"the report needs a number at {'.'.join(path)}, got {value!r}"
    for row in (*(report[decoding] for decoding in decodings), *report.get("tasks", {}).values()):
        unknown = sorted(set(row) - set(MODEL_STYLES))
        assert not unknown, f"the report has unknown models {unknown}"


def check_json_serializable(value: Any, path: str) -> None:
    """Raise a ValueError that names the first key whose value is not a finite number, text, list or dict of these."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path or 'the report'} has the key {key!r}: keys must be text")
            check_json_serializable(entry, f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            check_json_serializable(entry, f"{path}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}: a report holds finite numbers only")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{path} is a {type(value).__name__}: a report holds text, numbers, lists and dicts only")


def to_json(report: Report) -> str:
    """Return indented JSON with sorted keys and each point of a curve on one line."""
    text = json.dumps(report, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    number_pattern = r"(-?[\d.e+-]+)"
    return re.sub(rf"\[\n\s+{number_pattern},\n\s+{number_pattern}\n\s+\]", r"[\1, \2]", text) + "\n"


def render_html(report: Report) -> str:
    """Render the HTML page."""
    panels = {name: [Markup(svg) for svg in svgs] for name, svgs in draw_panels(report).items()}
    samples = report.get("samples", [])
    return load_template(
        "quickstart.html.jinja",
        format_percent=format_percent,
        format_number=format_html_number,
        format_duration=format_duration,
    ).render(
        report=report,
        panels=panels,
        styles=MODEL_STYLES,
        stage_titles=STAGE_TITLES,
        samples=samples[:MAX_SAMPLES_ON_PAGE],
        sample_count=len(samples),
        sample_models=[name for name in MODEL_STYLES if any(name in sample["responses"] for sample in samples)],
        sample_tasks=sorted({sample["task"] for sample in samples}),
        total_seconds=report.get("seconds_total", sum(stage["seconds"] for stage in report["stages"].values())),
    )


def format_percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3 %"; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}{NO_BREAK}%"


def format_number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """1.234 -> "1.23"; a dash for None."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def format_html_number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Like `format_number`, with a typographic minus sign."""
    return format_number(value, digits, sign).replace("-", "−")


def format_duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def format_table(report: Report, width: int = TERMINAL_WIDTH) -> str:
    """Format the results for a terminal: all models, sampled and greedy; the reward model; the time.

    Args:
        report: see `check_report`.
        width: of the terminal; the last columns are left out where they do not fit.
    """
    check_report(report)
    blocks = []
    for key, title in (("models", "Sampled at temperature 1"), ("greedy", "Greedy")):
        if key in report:
            table = align_columns(build_model_rows(report[key]), width).split("\n\n")[0]  # the report has all columns
            blocks.append(f"{title}\n{table}")
    scores = report["reward_model"]
    accuracies = []
    for group, group_name in (("train", "training"), ("heldout", "held-out")):
        accuracy = format_percent(scores[f"{group}_labelers_accuracy"])
        accuracies.append(f"{accuracy} of {group_name} labelers{format_agreement(scores, f'agreement_{group}')}")
    line = f"Reward model's accuracy on unseen rankings: {'; '.join(accuracies)}"
    times = ", ".join(f"{name} {stage['seconds']:.0f}" for name, stage in report["stages"].items())
    if "seconds_total" in report:
        times += f"; {report['seconds_total']:.0f} in all"
    if report.get("peak_memory_gib") is not None:
        times += f". Peak memory {report['peak_memory_gib']:.2f} GiB"
    blocks.append("\n".join([*wrap(line, width), *wrap(f"Seconds: {times}. Seed {report['seed']}.", width)]))
    return "\n\n".join(blocks).replace(NO_BREAK, " ")


def format_agreement(scores: dict[str, Any], key: str) -> str:
    """Return the agreement of a group of labelers as text; "" if it is unknown."""
    return f" (they agree on {format_percent(scores[key])})" if scores.get(key) is not None else ""


def build_model_rows(models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the header and one row per model."""
    rows = [["", "win rate over SFT", "success", "truthful", "toxic", "pretrain loss", "KL", "score", "length"]]
    for name, style in MODEL_STYLES.items():
        model = models[name]
        interval = f"{model['win_rate']:.3f} [{model['win_rate_low']:.3f}, {model['win_rate_high']:.3f}]"
        shares = [format_percent(model[key]) for key in ("success", "truthful", "toxic")]
        losses = [format_number(model["pretraining_loss"], 3), format_number(model["kl_to_sft"])]
        optional = [format_number(model.get("score")), format_number(model.get("response_length"), 1)]
        rows.append([style.label, interval, *shares, *losses, *optional])
    return rows


def align_columns(rows: Sequence[Sequence[str]], max_width: int | None = None) -> str:
    """Return rows as text columns, the first left-aligned, the others right-aligned, with a line under the header.

    Args:
        rows: the header, then one row per line.
        max_width: columns that do not fit it follow in tables below, each with the first column; None for any width.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    tables: list[list[int]] = [[0]]
    for index in range(1, len(widths)):
        taken = sum(widths[i] + 2 for i in tables[-1]) + widths[index]
        if max_width is not None and taken > max_width and len(tables[-1]) > 1:
            tables.append([0])
        tables[-1].append(index)
    texts = []
    for columns in tables:
        lines = ["  ".join(row[i].rjust(widths[i]) if i else row[i].ljust(widths[i]) for i in columns) for row in rows]
        texts.append("\n".join([lines[0], "─" * len(lines[0]), *lines[1:]]))
    return "\n\n".join(texts)
