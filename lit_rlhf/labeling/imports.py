"""Answers given elsewhere: exports of this library, Label Studio, Argilla and Potato."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_rlhf.data.formats.record_validation import is_missing
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.sources import Row, read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.human_labels import PREFERENCES, read_rating
from lit_rlhf.labeling.database import ImportedAnswer, Kind
from lit_rlhf.labeling.formats.argilla import is_argilla, read_argilla
from lit_rlhf.labeling.formats.imported import ImportBuilder, Imported, read_extras, read_labeler, read_seconds
from lit_rlhf.labeling.formats.label_studio import read_label_studio
from lit_rlhf.labeling.formats.potato import find_order, read_potato
from lit_rlhf.labeling.tasks import (
    PromptWithCompletions,
    StrictReport,
    find_completions,
    hash_content,
    make_tasks,
    read_ranks,
)


def read_import(path: str, form: str | None = None) -> Imported:
    """Read a file of answers; nothing is written.

    Args:
        path: A data file.
        form: One of `READERS`; by default what the first row suggests.

    Raises:
        UserError: A row that cannot be read; names file and row.
    """
    rows = read_rows(path)
    return READERS[form or guess_form(rows[0])](rows, path)


def guess_form(row: Row) -> str:
    """Return the tool that wrote a row.

    Raises:
        UserError: It is none of them.
    """
    fields = row.fields
    if isinstance(fields.get("data"), dict) and "annotations" in fields:
        return "label-studio"
    if "labeler" in fields and _guess_kind(fields) is not None:
        return "rows"
    if is_argilla(row):
        return "argilla"
    if find_order(fields) is not None:
        return "potato"
    raise UserError(
        f"{row.origin}: not an export of {', '.join(READERS)}; the row has {', '.join(map(repr, fields))}; name the "
        "tool by --from"
    )


def read_own_rows(rows: Sequence[Row], origin: str) -> Imported:
    """Read rankings, comparisons, ratings or demonstrations with the column "labeler", as the export writes them.

    Raises:
        UserError: A row without a labeler or an answer.
    """
    kind = _guess_kind(rows[0].fields)
    if kind is None:
        raise UserError(f"{rows[0].origin}: no answer: ranks, preference, overall, or a completion with a labeler")
    builder = ImportBuilder(kind)
    records = read_records(rows, "prompt", PromptRow, "auto", StrictReport(origin))
    for record in records:
        fields = record.fields
        labeler = read_labeler(fields.get("labeler"), "no labeler", record.origin)
        completions = None if kind == "demonstrate" else find_completions(fields, kind)
        row = PromptWithCompletions(record.prompt, completions, fields, record.origin)
        task, *others = make_tasks(kind, row, "id" in fields, gold=False)
        if others:
            raise UserError(f"{record.origin}: a rating is of one completion, and this row has {len(others) + 1}")
        if task.key == hash_content(task.content):  # type: ignore[arg-type]
            task.content["fields"].pop("id", None)  # the export wrote it
        seconds = read_seconds(fields.get("seconds"), "seconds", record.origin)
        content = _read_answer(kind, row) | read_extras(fields, record.origin)
        builder.add(task, ImportedAnswer(labeler, "answer", content, seconds, fields.get("shown")))
    return builder.build(origin)


def _guess_kind(fields: dict[str, Any]) -> Kind | None:
    if "ranks" in fields:
        return "rank"
    if "preference" in fields and "first" in fields:
        return "compare"
    if "overall" in fields and "answer" in fields:
        return "rate"
    return "demonstrate" if any(name in fields for name in ("completion", "output", "answer")) else None


def _read_answer(kind: Kind, row: PromptWithCompletions) -> dict[str, Any]:
    fields = row.fields
    if kind == "rank":
        return {"ranks": read_ranks(fields.get("ranks"), len(row.completions or ()), row.origin)}
    if kind == "compare":
        if fields.get("preference") not in list(PREFERENCES):
            raise UserError(f"{row.origin}: preference is {fields.get('preference')!r}; it is first, second or tie")
        both_bad = fields.get("both_bad")
        if not is_missing(both_bad) and not isinstance(both_bad, bool):
            raise UserError(f"{row.origin}: 'both_bad' must be true or false, it is {both_bad!r}")
        return {"preference": "both_bad" if both_bad is True else fields["preference"]}
    if kind == "rate":
        rating = read_rating(Row(fields, row.origin), str(fields["labeler"]))
        if rating.overall is None:
            raise UserError(f"{row.origin}: no overall quality")
        return {"overall": rating.overall, "flags": rating.flags}
    text = next((fields[name] for name in ("completion", "output", "answer") if isinstance(fields.get(name), str)), "")
    if not text.strip():
        raise UserError(f"{row.origin}: the demonstration is empty")
    return {"completion": text}


READERS: dict[str, Callable[[Sequence[Row], str], Imported]] = {
    "rows": read_own_rows,
    "label-studio": read_label_studio,
    "argilla": read_argilla,
    "potato": read_potato,
}
