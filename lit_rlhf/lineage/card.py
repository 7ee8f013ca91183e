"""The model card, `README.md` of an exported folder: made from its lineage and from the report of an evaluation."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.lineage.records import DataInput, LineageRecord, ModelInput
from lit_rlhf.lineage.text import format_seconds
from lit_rlhf.lineage.tree import read_parent
from lit_rlhf.models.fingerprint import loaded_model_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig

CARD = "README.md"
MARK = "<!-- written by lit_rlhf, which replaces it at the next export; remove this line to keep your own text -->"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TITLES = {
    "pretraining": "a language model",
    "sft": "a language model, fine-tuned on demonstrations (SFT)",
    "reward": "a reward model, trained on rankings",
    "ppo": "a language model, trained by PPO against a reward model (RLHF)",
}
USES = {
    "reward": "Scoring responses to prompts like those that it was trained on, as the reward of RLHF or for ranking. A "
    "score has a meaning relative to other scores of the same model alone.",
    "ppo": "Responding to prompts like those that it was trained on. It was trained to please a reward model: a high "
    "score is no evidence that a response is true or harmless.",
}
DEFAULT_USE = "Responding to prompts, or continuing texts, like those that it was trained on."
LIMITS = (
    "The model can write what is false, biased or harmful, and reflects the preferences of those who wrote and ranked "
    "its data; neither was checked for any use but research. Measure it on your own use before you rely on it."
)


def write_card(
    record: LineageRecord, folder: Path, published: Path, report: Path | None = None, name: str | None = None
) -> None:
    """Write README.md; a README.md of the published folder without the mark is the user's, and is kept.

    Args:
        record: of the model, with its locations absolute or relative to `folder`.
        folder: the folder to write to, which holds the model.
        published: the folder that will be replaced by it.
        report: report.json of `lit-rlhf evaluate`.
        name: of the model, by default that of its folder.

    Raises:
        UserError: see `read_report`.
    """
    existing = published / CARD
    if existing.is_file() and MARK not in existing.read_text(encoding="utf-8", errors="replace"):
        return
    results = [] if report is None else read_report(report, folder, published)
    title = name or "-".join(part for part in published.resolve().parts[-2:])
    (folder / CARD).write_text(render_card(record, folder, title, results), encoding="utf-8")


def read_report(report: Path, folder: Path, published: Path) -> list[dict[str, Any]]:
    """Return the metrics of one model in the report of an evaluation: suite, metric, value, low, high, unit, rows.

    The model is found by its content, or else by its folder.

    Raises:
        UserError: no report, or it does not hold the model.
    """
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        suites = content["suites"]
        models = {name: (model["fingerprint"], Path(model["path"])) for name, model in content["models"].items()}
        rows = {name: list(iter_rows(suites, name)) for name in models}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise UserError(f"report: {report} is not a report.json of lit-rlhf evaluate ({problem!r})") from None
    fingerprint = loaded_model_fingerprint(str(folder), ModelLoadingConfig())
    found = [name for name, (own, _) in models.items() if own == fingerprint]
    found = found or [name for name, (_, path) in models.items() if path.resolve() == published.resolve()]
    if not found:
        evaluated = ", ".join(f"{name} ({path})" for name, (_, path) in models.items())
        raise UserError(f"report: {report} is not of this model; it evaluates {evaluated}")
    return rows[found[0]]


def iter_rows(suites: dict[str, Any], model: str) -> Iterator[dict[str, Any]]:
    """Yield the metrics of one model that have a value.

    Args:
        suites: of a report.
        model: its name there.
    """
    for suite, part in suites.items():
        for metric, row in part["metrics"].items():
            cell = row["models"].get(model)
            if cell is not None and cell["value"] is not None:
                kept = {key: cell[key] for key in ("value", "low", "high", "count")}
                yield {"suite": suite, "metric": metric, "unit": row["unit"], **kept}


def render_card(record: LineageRecord, folder: Path, name: str, results: list[dict[str, Any]]) -> str:
    """Return the text of a card.

    Args:
        record: of the model.
        folder: that locations of the record are relative to.
        name: of the model.
        results: see `read_report`.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    ancestors = list(iter_ancestors(record, folder))
    hub_data = [each.path for _, data in ancestors for each in data if not each.location]
    is_reward = record.role == "reward"
    metrics = [
        EvalResult(
            task_type="text-classification" if is_reward else "text-generation",
            dataset_type=row["suite"],
            dataset_name=row["suite"],
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=row["value"],
        )
        for row in results
    ]
    about = ModelCardData(
        base_model=find_base_model(record, folder),
        datasets=sorted({path.split(":")[0].split("@")[0] for path in hub_data}) or None,
        library_name="transformers",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["lit-rlhf", "rlhf", *{"reward": ["reward-model"]}.get(record.role, [record.role])],
        model_name=name if metrics else None,
        eval_results=metrics or None,
    )
    body = [MARK, f"# {name}", f"This is {TITLES.get(record.role, 'a model')}, made with lit_rlhf."]
    body += ["## Training", *describe_training(record, folder)]
    if results:
        body += ["## Evaluation", format_results(results)]
    body += ["## Intended use", USES.get(record.role, DEFAULT_USE), "## Limits", LIMITS]
    recipe = json.dumps(record.recipe, indent=1, ensure_ascii=False, default=str)
    body += ["## Recipe", f"Of the last stage; `lineage.json` has it, too.\n\n```json\n{recipe}\n```"]
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))


def iter_ancestors(
    record: LineageRecord, folder: Path, seen: set[str] | None = None
) -> Iterator[tuple[LineageRecord, tuple[DataInput, ...]]]:
    """Yield the record of a model and of every model that it was made from, each once, with its data."""
    seen = set() if seen is None else seen
    yield record, record.data
    for each in record.inputs:
        parent = read_parent(each, folder)
        if parent is not None and each.lineage not in seen:
            seen.add(each.lineage)
            source, own = parent
            yield from iter_ancestors(own, source if source.is_dir() else source.parent, seen)


def find_base_model(record: LineageRecord, folder: Path) -> str | None:
    """Return the hub name that a chain of starting models leads to; None if it begins with a folder."""
    start: ModelInput | None = next((each for each in record.models if each.role.startswith("starting")), None)
    if start is None:
        return None
    if not start.location:
        return start.path if HUB_NAME.fullmatch(start.path) else None
    parent = read_parent(start, folder)
    return None if parent is None else find_base_model(parent[1], parent[0])


def describe_training(record: LineageRecord, folder: Path) -> list[str]:
    """Return the stages that led to a model, the last one first, as text of a card."""
    parts = []
    for own, data in iter_ancestors(record, folder):
        compute, environment = own.compute, own.environment
        lines = [f"### {own.role}" + (f": {' + '.join(own.configs)}" if own.configs else ""), ""]
        lines += [f"- {each.role}: `{each.path}` ({each.fingerprint[:23]})" for each in own.models]
        for each in data:
            rows = "" if each.rows_kept is None else f", {each.rows_kept:,} rows"
            version = f" ({each.fingerprint[:23]}{rows})" if each.fingerprint else rows
            lines.append(f"- {each.role}: `{each.path}`{version}")
        days = compute.petaflop_days
        cost = "" if days is None else f", {days:.3g} petaflop/s-days"
        if compute.wall_seconds is not None:
            lines.append(f"- {format_seconds(compute.wall_seconds)} on {environment.devices}{cost}")
        lines.append(f"- seed {own.seed}, {', '.join(f'{k} {v}' for k, v in environment.packages.items())}")
        if environment.commit:
            lines.append(f"- commit {environment.commit}{' with changes' if environment.dirty else ''}")
        if own.wandb is not None and own.wandb.url:
            lines.append(f"- [run in Weights & Biases]({own.wandb.url})")
        parts.append("\n".join(lines))
    return parts


def format_results(results: list[dict[str, Any]]) -> str:
    """Return the metrics as a table with 95 % intervals."""
    lines = ["| suite | metric | value | 95 % interval | rows |", "|---|---|---:|---|---:|"]
    for row in results:
        interval = "" if row["low"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
        value = f"{row['value']:.4g} {row['unit']}"
        lines.append(f"| {row['suite']} | {row['metric']} | {value} | {interval} | {row['count']:,} |")
    return "\n".join(lines)
