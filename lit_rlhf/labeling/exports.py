"""From the database to training data: the rows that the data modules and `HumanLabels` read, pairs, other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lit_rlhf.data.records import to_plain_text
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import Answer, Database, Kind
from lit_rlhf.labeling.formats.label_studio import to_label_studio
from lit_rlhf.labeling.overview import ranks_of
from lit_rlhf.labeling.tasks import dense_bins
from lit_rlhf.paths import written_whole

# the first is the default
FORMS: dict[Kind, tuple[str, ...]] = {
    "rank": ("rankings", "pairs", "label-studio", "datasets"),
    "compare": ("comparisons", "rankings", "pairs", "label-studio", "datasets"),
    "rate": ("ratings", "label-studio", "datasets"),
    "demonstrate": ("demonstrations", "label-studio", "datasets"),
}
_EXTRAS = ("none_acceptable", "both_bad", "prompt_flags", "note")


def export_answers(
    database: Database,
    path: Path,
    form: str | None = None,
    kind: Kind | None = None,
    labelers: Sequence[str] | None = None,
    with_gold: bool = False,
) -> list[str]:
    """Write the answers of one kind of tasks.

    Args:
        database: Holds the answers.
        path: The file, or the folder of a `datasets` table; must not exist.
        form: One of `FORMS`; by default the rows of that kind.
        kind: Of the tasks; may be left out where the database has one.
        labelers: Only theirs.
        with_gold: Whether to write answers to tasks with known answers too.

    Returns:
        What was written, and what was not, as lines.

    Raises:
        UserError: Nothing to write, a form that this kind does not have, or a path that exists or cannot be written.
    """
    kind = choose_kind(database, kind)
    form = form or FORMS[kind][0]
    if form not in FORMS[kind]:
        raise UserError(f"--as {form}: answers to {kind} are exported as {', '.join(FORMS[kind])}")
    if path.exists():
        raise UserError(f"--to: {path} exists already; remove it or name another")
    everything = database.list_answers(kind, actions=("answer", "skip", "surplus"))
    known = {each.labeler for each in everything}
    for name in labelers or ():
        if name not in known:
            raise UserError(
                f"--labelers: nobody named {name!r} answered; there are {', '.join(sorted(known)) or 'none'}"
            )
    own = [each for each in everything if labelers is None or each.labeler in labelers]
    answers = [each for each in own if each.action == "answer" and (with_gold or each.gold is None)]
    notes = [
        _count(own, "skipped", lambda each: each.action == "skip"),
        _count(own, "surplus: given after the task had all its labels", lambda each: each.action == "surplus"),
        _count(own, "to tasks with known answers (--with-gold)", lambda each: each.gold is not None and not with_gold),
    ]
    if not answers:
        raise UserError(f"{database.path} holds no answer to export" + "".join(f"; {note}" for note in notes if note))
    if form == "label-studio":
        rows = to_label_studio(
            kind, [each for each in own if each.action != "surplus" and (with_gold or not each.gold)]
        )
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        rows = build_rows(answers, FORMS[kind][0] if form == "datasets" else form)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if form == "datasets":
        _save_dataset(rows, path)
    else:
        _write(text, path)
    written = f"{path}: {len(rows):,} {form if form not in ('datasets', 'label-studio') else 'rows'}"
    return [f"{written} of {len(answers):,} answers", *filter(None, notes)]


def choose_kind(database: Database, kind: Kind | None) -> Kind:
    """Return the kind of tasks that a database has.

    Raises:
        UserError: It has none, several, or not this one.
    """
    kinds = database.kinds()
    if kind is None and len(kinds) > 1:
        raise UserError(f"{database.path} holds tasks to {', '.join(kinds)}: choose by --kind")
    if not kinds or (kind is not None and kind not in kinds):
        raise UserError(f"{database.path} holds no tasks" + (f" to {kind}" if kind else ""))
    return kind or kinds[0]


def _count(answers: Sequence[Answer], what: str, is_counted: Callable[[Answer], bool]) -> str | None:
    count = sum(map(is_counted, answers))
    return f"{count:,} not written: {what}" if count else None


def build_rows(answers: Sequence[Answer], form: str) -> list[dict[str, Any]]:
    """Return the rows of rankings, comparisons, ratings, demonstrations or pairs."""
    return [row for answer in answers for row in _ROWS[form](answer)]


def _common(answer: Answer) -> dict[str, Any]:
    """Return the columns that every row has besides the prompt and the answer."""
    extras = {name: answer.content[name] for name in _EXTRAS if name in answer.content}
    models = {"models": answer.task_content["models"]} if "models" in answer.task_content else {}
    shown = {"shown": answer.shown} if len(answer.shown) > 1 else {}
    return {**models, **extras, "labeler": answer.labeler, "seconds": answer.seconds, **shown}


def _prompt_columns(answer: Answer) -> dict[str, Any]:
    return {"id": answer.key, **answer.task_content["fields"]}


def _plain_prompt(answer: Answer) -> dict[str, Any]:
    """Return the columns with the prompt as text, as judges see it."""
    columns = {
        name: value for name, value in _prompt_columns(answer).items() if name not in ("instruction", "question")
    }
    return columns | {"prompt": to_plain_text(answer.task_content["prompt"])}


def _rankings(answer: Answer) -> list[dict[str, Any]]:
    ranks = [number - 1 for number in dense_bins(ranks_of(answer.content))]
    both_bad = {"both_bad": True} if answer.content.get("preference") == "both_bad" else {}
    completions = {"completions": answer.task_content["completions"], "ranks": ranks}
    return [_prompt_columns(answer) | completions | both_bad | _common(answer)]


def _comparisons(answer: Answer) -> list[dict[str, Any]]:
    first, second = answer.task_content["completions"]
    preference = answer.content["preference"]
    both_bad = {"both_bad": True} if preference == "both_bad" else {}
    pair = {"first": first, "second": second, "preference": "tie" if both_bad else preference}
    return [_plain_prompt(answer) | pair | both_bad | _common(answer)]


def _ratings(answer: Answer) -> list[dict[str, Any]]:
    (text,) = answer.task_content["completions"]
    rating = {"answer": text, "overall": answer.content["overall"], **answer.content["flags"]}
    return [_plain_prompt(answer) | rating | _common(answer)]


def _demonstrations(answer: Answer) -> list[dict[str, Any]]:
    columns = _prompt_columns(answer)
    # the column that the formats of the project read beside the prompt's
    name = next(
        target
        for source, target in (("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
        if source in columns
    )
    return [columns | {name: answer.content["completion"]} | _common(answer)]


def _pairs(answer: Answer) -> list[dict[str, Any]]:
    texts, ranks = answer.task_content["completions"], ranks_of(answer.content)
    rows = []
    for one, other in combinations(range(len(texts)), 2):
        if ranks[one] != ranks[other]:
            better, worse = (one, other) if ranks[one] < ranks[other] else (other, one)
            pair = {"chosen": texts[better], "rejected": texts[worse]}
            rows.append(_prompt_columns(answer) | pair | {"labeler": answer.labeler})
    return rows


_ROWS: dict[str, Callable[[Answer], list[dict[str, Any]]]] = {
    "rankings": _rankings,
    "comparisons": _comparisons,
    "ratings": _ratings,
    "demonstrations": _demonstrations,
    "pairs": _pairs,
}


def _write(text: str, path: Path) -> None:
    """Write a file completely or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as problem:
        raise UserError(f"--to: cannot write {path} ({problem.strerror})") from None


def _save_dataset(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import datasets

    names = {name: None for row in rows for name in row}
    table = {name: [row.get(name) for row in rows] for name in names}
    try:
        datasets.Dataset.from_dict(table).save_to_disk(str(path))
    except OSError as problem:
        raise UserError(f"--to: cannot write {path} ({problem.strerror})") from None
