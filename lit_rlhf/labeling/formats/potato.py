"""Potato's rankings: "B,D=A,C", best first, equal signs for ties."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.answers import letter
from lit_rlhf.labeling.database import ImportedAnswer
from lit_rlhf.labeling.formats.imported import (
    PROMPT_NAMES,
    ImportBuilder,
    Imported,
    find_text,
    read_labeler,
    task_of,
)

_ORDER = re.compile(r"[A-Z](\s*[,=>]\s*[A-Z])+")
_ITEMS = ("completions", "items", "options", "responses", "outputs")
_PEOPLE = ("labeler", "user", "user_id", "annotator", "annotator_id", "username")


def find_order(fields: dict[str, Any]) -> str | None:
    """Return the ranking in a row, wherever it is besides the prompt."""
    others = {name: value for name, value in fields.items() if name not in PROMPT_NAMES}
    return next((text.strip() for text in _texts(others) if _ORDER.fullmatch(text.strip())), None)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)


def read_potato(rows: Sequence[Row], origin: str) -> Imported:
    """Read an export of Potato.

    Raises:
        UserError: A row has no prompt, items, labeler or ranking, or its ranking names other items than there are.
    """
    builder = ImportBuilder("rank")
    for row in rows:
        order = find_order(row.fields)
        if order is None:
            raise UserError(f'{row.origin}: no ranking such as "B,D=A,C"')
        items = next((row.fields[name] for name in _ITEMS if isinstance(row.fields.get(name), list)), None)
        if items is None:
            raise UserError(f"{row.origin}: no list of texts under {', '.join(_ITEMS)}")
        texts = [each.get("text") if isinstance(each, dict) else each for each in items]
        person = next((row.fields[name] for name in _PEOPLE if row.fields.get(name)), None)
        labeler = read_labeler(person, f"none of {', '.join(_PEOPLE)}", row.origin)
        task = task_of("rank", find_text(row.fields, PROMPT_NAMES, row), texts, row.fields.get("id"), {}, row.origin)
        content = {"ranks": parse_order(order, len(texts), row.origin)}
        builder.add(task, ImportedAnswer(labeler, "answer", content))
    return builder.build(origin)


def parse_order(order: str, count: int, origin: str) -> list[int]:
    """Return the bins of "B,D=A,C": [2, 1, 3, 2].

    Raises:
        UserError: It does not name each of `count` items once.
    """
    bins = [[name.strip() for name in part.split("=")] for part in re.split("[,>]", order)]
    numbers = {name: number for number, names in enumerate(bins, start=1) for name in names}
    expected = [letter(place) for place in range(count)]
    if sorted(name for names in bins for name in names) != expected:
        raise UserError(f"{origin}: the ranking {order!r} does not name each of {', '.join(expected)} once")
    return [numbers[name] for name in expected]
