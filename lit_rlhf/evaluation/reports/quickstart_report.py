"""The result of a run as `report.json`, as one self-contained HTML page, and as a table for the terminal."""

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

STAGE_TITLES = {"pretraining": "Pretraining", "sft": "SFT", "reward": "Reward model", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
REQUIRED_METRICS = ("win_rate", "win_rate_low", "win_rate_high", "truthful", "toxic", "success", "pretraining_loss", "kl_to_sft")
SAMPLES_ON_PAGE = 150
TERMINAL_WIDTH = 100  # columns of the terminal
NO_BREAK = "\N{NO-BREAK SPACE}"


def write_report(report: Report, path_json: Path, path_html: Path) -> None:
    """Write the report as JSON (sorted keys: the same figures give the same bytes) and as one HTML page.

    The page needs no network: plots are inline SVG, style and script stand in it, every text is escaped. Of the
    samples it shows the first 150 and says how many there are; the JSON holds all. Optional parts of the report that
    are absent (curves, tasks, samples, greedy, ...) are left out of the page.

    Args:
        report: what `check_report` accepts.
        path_json: where `report.json` goes; its folder is made.
        path_html: where the page goes; its folder is made.

    Raises:
        AssertionError: a key of the contract is missing.
        ValueError: a number is not finite, or a value is none that JSON knows; the message names its key.
    """
    check_report(report)
    texts = {path_json: to_json(report), path_html: render_html(report)}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def check_report(report: Report) -> None:
    """Refuse a report that lacks a key of the contract or holds what JSON cannot say.

    The contract: `stages.{pretraining,sft,reward,ppo,ppo_ptx}.seconds`;
    `reward_model.{train_labelers_accuracy,heldout_labelers_accuracy}`; `models.{base,few_shot,sft,ppo,ppo_ptx}` (and
    `greedy.…`, where it is there) with a number for each of `FIGURES`; each of `tasks`, where it is there, with a
    number for every model; `seed`; `versions`.

    Raises:
        AssertionError: a key is missing, or a model is unknown.
        ValueError: a value is not finite or no JSON value.
    """
    for part in ("stages", "reward_model", "models", "seed", "versions"):
        assert part in report, f"the report lacks {part}"
    check_json_serializable(report, "")
    decodings = [key for key in ("models", "greedy") if key in report]
    needed: list[tuple[str, ...]] = [("stages", stage, "seconds") for stage in (*STAGE_TITLES, *report["stages"])]
    needed += [("reward_model", f"{group}_labelers_accuracy") for group in ("train", "heldout")]
    needed += [(decoding, model, figure) for decoding in decodings for model in MODEL_STYLES for figure in REQUIRED_METRICS]
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
    """Raise a ValueError that names the first key whose value is no finite number, text, list or dict of such."""
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
    """Indented JSON with sorted keys; the points of the curves stay on one line each."""
    text = json.dumps(report, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    number = r"(-?[\d.e+-]+)"
    return re.sub(rf"\[\n\s+{number},\n\s+{number}\n\s+\]", r"[\1, \2]", text) + "\n"


def render_html(report: Report) -> str:
    """Render the page."""
    panels = {name: [Markup(panel) for panel in drawn] for name, drawn in draw_panels(report).items()}
    samples = report.get("samples", [])
    return load_template("report.html.jinja", percent=format_percent, number=format_html_number, duration=format_duration).render(
        report=report,
        panels=panels,
        looks=MODEL_STYLES,
        stages=STAGE_TITLES,
        samples=samples[:SAMPLES_ON_PAGE],
        sample_count=len(samples),
        sample_models=[name for name in MODEL_STYLES if any(name in sample["responses"] for sample in samples)],
        sample_tasks=sorted({sample["task"] for sample in samples}),
        total=report.get("seconds_total", sum(stage["seconds"] for stage in report["stages"].values())),
    )


def format_percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3 %"; a dash for what is not known."""
    return "–" if value is None else f"{100 * value:.{digits}f}{NO_BREAK}%"


def format_number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """1.234 -> "1.23"; a dash for what is not known."""
    return "–" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def format_html_number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """As `number`, with a true minus sign."""
    return format_number(value, digits, sign).replace("-", "−")


def format_duration(seconds: float) -> str:
    """75 -> "1 min 15 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def format_table(report: Report) -> str:
    """Format the results for a terminal of 100 columns: each model sampled and greedy, the reward model, the time."""
    check_report(report)
    blocks = []
    for key, title in (("models", "Sampled at temperature 1"), ("greedy", "Greedy")):
        if key in report:
            blocks.append(f"{title}\n{align_columns(build_model_rows(report[key]))}")
    scores = report["reward_model"]
    line = "Reward model's accuracy on unseen rankings: "
    line += "; ".join(
        f"{format_percent(scores[f'{group}_labelers_accuracy'])} of {words} labelers{format_agreement(scores, key)}"
        for group, words, key in (
            ("train", "training", "agreement_train"),
            ("heldout", "held-out", "agreement_heldout"),
        )
    )
    times = ", ".join(f"{name} {stage['seconds']:.0f}" for name, stage in report["stages"].items())
    if "seconds_total" in report:
        times += f"; {report['seconds_total']:.0f} in all"
    if report.get("peak_memory_gib") is not None:
        times += f". Peak memory {report['peak_memory_gib']:.2f} GiB"
    blocks.append("\n".join([*wrap(line, TERMINAL_WIDTH), *wrap(f"Seconds: {times}. Seed {report['seed']}.", TERMINAL_WIDTH)]))
    return "\n\n".join(blocks).replace(NO_BREAK, " ")


def format_agreement(scores: dict[str, Any], key: str) -> str:
    """Say how often those labelers agree, where it is known."""
    return f" (they agree on {format_percent(scores[key])})" if scores.get(key) is not None else ""


def build_model_rows(models: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return header and one row a model."""
    rows = [["", "win rate over SFT", "success", "truthful", "toxic", "pretrain loss", "KL", "score", "length"]]
    for name, look in MODEL_STYLES.items():
        model = models[name]
        interval = f"{model['win_rate']:.3f} [{model['win_rate_low']:.3f}, {model['win_rate_high']:.3f}]"
        shares = [format_percent(model[key]) for key in ("success", "truthful", "toxic")]
        rest = [format_number(model["pretraining_loss"], 3), format_number(model["kl_to_sft"])]
        optional = [format_number(model.get("score")), format_number(model.get("response_length"), 1)]
        rows.append([look.label, interval, *shares, *rest, *optional])
    return rows


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns, the first flush left, the others flush right, with a rule under the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])
