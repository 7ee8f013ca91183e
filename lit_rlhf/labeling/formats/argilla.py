"""Argilla's exports: ranking and text questions, as records with responses or as the columns of a hub dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import ImportedAnswer, Kind
from lit_rlhf.labeling.formats.imported import (
    PROMPT_NAMES,
    ImportBuilder,
    Imported,
    find_text,
    read_labeler,
    task_of,
)
from lit_rlhf.labeling.tasks import dense_bins

_SUBMITTED = ("submitted", None)


class _Response(NamedTuple):
    question: str
    value: Any
    user: Any
    status: Any


def is_argilla(row: Row) -> bool:
    """Return whether a row is one of Argilla's."""
    return any(True for _ in _responses(row))


def read_argilla(rows: Sequence[Row], origin: str) -> Imported:
    """Read an export of Argilla. Of its questions the first ranking counts, or else the first text.

    Raises:
        UserError: No question of these types, a ranking of fields that the record does not have, or no response; or a
            response without a user, or of another type than the others.
    """
    kind, question = _find_question(rows, origin)
    builder = ImportBuilder(kind)
    drafts = 0
    for row in rows:
        texts = row.fields["fields"] if isinstance(row.fields.get("fields"), dict) else row.fields
        prompt = find_text(texts, PROMPT_NAMES, row)
        given = [each for each in _responses(row) if each.question == question]
        drafts += sum(each.status not in _SUBMITTED for each in given)
        given = [each for each in given if each.status in _SUBMITTED]
        names: list[str] = []
        if kind == "rank":
            if not given:
                continue  # nothing says which fields are ranked
            names = [name for name, _ in _ranked(given[0].value, row)]
            order = list(map(_plain, texts))
            names.sort(key=lambda name: order.index(_plain(name)) if _plain(name) in order else len(order))
        by_plain = {_plain(name): value for name, value in texts.items()}
        for name in names:
            if not isinstance(by_plain.get(_plain(name)), str):
                raise UserError(f"{row.origin}: {name!r} is ranked, and the record has no such field with text")
        key = row.fields.get("id", row.fields.get("external_id"))
        task = task_of(kind, prompt, [by_plain[_plain(name)] for name in names], key, {}, row.origin)
        for response in given:
            labeler, value = read_labeler(response.user, "a response without a user", row.origin), response.value
            content = _read_text(value, row) if kind == "demonstrate" else _read_bins(value, names, row)
            builder.add(task, ImportedAnswer(labeler, "answer", content))
    if drafts:
        builder.notes.append(f"{drafts:,} responses are drafts, pending or discarded, and are left out")
    return builder.build(origin)


def _find_question(rows: Sequence[Row], origin: str) -> tuple[Kind, str]:
    texts = None
    for row in rows:
        for response in _responses(row):
            if isinstance(response.value, str):
                texts = texts or response.question
            elif _is_ranking(response.value):
                return "rank", response.question
    if texts is None:
        raise UserError(f"{origin}: no response to a ranking or text question")
    return "demonstrate", texts


def _responses(row: Row) -> Iterator[_Response]:
    """Yield the responses of a row in any of Argilla's three forms."""
    fields = row.fields
    responses = fields.get("responses")
    if isinstance(responses, dict):  # Argilla 2: question -> [{value, user_id, status}]
        for question, given in responses.items():
            yield from _list_of_dicts(question, given)
    elif isinstance(responses, list):  # Argilla 1: [{user_id, status, values: {question: {value}}}]
        for each in responses:
            values = each.get("values") if isinstance(each, dict) else None
            for question, value in values.items() if isinstance(values, dict) else ():
                value = value.get("value") if isinstance(value, dict) else value
                yield _Response(question, value, each.get("user_id"), each.get("status"))
    for name, value in fields.items():
        if name.endswith(".responses") and isinstance(value, list):  # a hub dataset of Argilla 2
            question = name.removesuffix(".responses")
            users, statuses = (_aligned(row, f"{name}.{part}", len(value)) for part in ("users", "status"))
            for own, user, status in zip(value, users, statuses, strict=True):
                yield _Response(question, own, user, status)
        elif name not in ("responses", "fields") and isinstance(value, list):  # a hub dataset of Argilla 1
            yield from _list_of_dicts(name, value)


def _list_of_dicts(question: str, given: Any) -> Iterator[_Response]:
    for each in given if isinstance(given, list) else ():
        if isinstance(each, dict) and "value" in each and "user_id" in each:
            yield _Response(question, each["value"], each["user_id"], each.get("status"))


def _aligned(row: Row, name: str, count: int) -> list[Any]:
    """Return a column that says something of each response of another; None of each where it is missing."""
    value = row.fields.get(name)
    if value is None:
        return [None] * count
    if not isinstance(value, list) or len(value) != count:
        raise UserError(f"{row.origin}: column {name!r} must be a list of {count}, one for each response")
    return value


def _is_ranking(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("rank"), list) and isinstance(value.get("value"), list)
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict | str) for each in value)


def _ranked(value: Any, row: Row) -> list[tuple[str, int]]:
    """Return names and their ranks; a list of names alone is in order, best first."""
    ranked: list[tuple[Any, Any]] = []
    if isinstance(value, dict) and _is_ranking(value) and len(value["value"]) == len(value["rank"]):
        ranked = list(zip(value["value"], value["rank"], strict=True))
    elif isinstance(value, list) and all(isinstance(each, str) for each in value):
        ranked = [(each, number) for number, each in enumerate(value, start=1)]
    elif isinstance(value, list) and all(isinstance(each, dict) and {"value", "rank"} <= each.keys() for each in value):
        ranked = [(each["value"], each["rank"]) for each in value]
    names = [name for name, _ in ranked if isinstance(name, str)]
    if not ranked or len(set(names)) < len(ranked) or not all(type(rank) is int for _, rank in ranked):
        raise UserError(f"{row.origin}: no ranking of different fields by whole numbers: {value!r}")
    return ranked


def _read_bins(value: Any, names: list[str], row: Row) -> dict[str, Any]:
    ranks = dict(_ranked(value, row))
    if sorted(ranks) != sorted(names):
        raise UserError(f"{row.origin}: a response ranks {', '.join(ranks)}, another {', '.join(names)}")
    return {"ranks": dense_bins([ranks[name] for name in names])}


def _read_text(value: Any, row: Row) -> dict[str, Any]:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row.origin}: a response must be a text that is not empty, it is {value!r}")
    return {"completion": value}


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
