"""What an import is: tasks, and the answers to each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_rlhf.data.formats.record_validation import is_missing
from lit_rlhf.data.records import to_messages
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.answers import PROMPT_FLAGS
from lit_rlhf.labeling.database import ImportedAnswer, Kind, NewTask
from lit_rlhf.labeling.tasks import build_content, hash_content, is_name


class Imported(NamedTuple):
    """Answers that were given elsewhere."""

    kind: Kind
    tasks: list[NewTask]
    answers: list[list[ImportedAnswer]]  # of each task
    notes: list[str]


class ImportBuilder:
    """Collects tasks and answers, one task per key."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.notes: list[str] = []
        self._tasks: dict[str, NewTask] = {}
        self._answers: dict[str, dict[str, ImportedAnswer]] = {}

    def add(self, task: NewTask, answer: ImportedAnswer | None) -> None:
        """Add an answer, and its task where it is new.

        Raises:
            UserError: The task differs from an earlier one of its key, its labeler answered it before, or the
                completions were not shown in that order.
        """
        known = self._tasks.setdefault(task.key, task)
        if known.content != task.content:
            raise UserError(f"{task.origin}: the task {task.key!r} differs from that at {known.origin}; change one id")
        shown = None if answer is None else answer.shown
        count = len(task.content["completions"])
        if shown is not None and not _is_order(shown, count):
            raise UserError(
                f"{task.origin}: 'shown' must be the order of the completions, each of 0 to {count - 1} once; it is "
                f"{shown!r}"
            )
        answers = self._answers.setdefault(task.key, {})
        if answer is not None and answer.labeler in answers:
            raise UserError(f"{task.origin}: {answer.labeler!r} answered the task {task.key!r} before; keep one answer")
        if answer is not None:
            answers[answer.labeler] = answer

    def build(self, origin: str) -> Imported:
        """Return the import.

        Raises:
            UserError: It holds no answer.
        """
        answers = [list(self._answers[key].values()) for key in self._tasks]
        if not any(answers):
            raise UserError(f"{origin} holds no answer to import")
        return Imported(self.kind, list(self._tasks.values()), answers, self.notes)


def _is_order(shown: Any, count: int) -> bool:
    is_list = isinstance(shown, list) and all(type(each) is int for each in shown)
    return is_list and sorted(shown) == list(range(count))


def task_of(kind: Kind, prompt: str, completions: list[Any], key: Any, fields: dict[str, Any], origin: str) -> NewTask:
    """Return the task of another tool's row.

    Args:
        kind: Of the task.
        prompt: As text.
        completions: As texts.
        key: The row's id; None: a hash of the content.
        fields: Columns to keep for the export.
        origin: File and row.

    Raises:
        UserError: No prompt, or no, too few or too many completions.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{origin}: no prompt")
    content = build_content(kind, to_messages(prompt), completions, {**fields, "prompt": prompt}, Row({}, origin))
    if is_missing(key) or key == "":
        return NewTask(hash_content(content), dict(content), None, origin)
    if not is_name(key):
        raise UserError(f"{origin}: the id must be a text or a number, it is {key!r}")
    return NewTask(str(key), dict(content), None, origin)


def read_labeler(value: Any, what: str, origin: str) -> str:
    """Return the name of a labeler.

    Raises:
        UserError: There is none; `what` says where it was looked for.
    """
    if not is_name(value):
        raise UserError(f"{origin}: {what}: whose answer is it? a text or a number is needed, got {value!r}")
    return str(value)


def read_seconds(value: Any, name: str, origin: str) -> float | None:
    """Return the seconds spent on an answer; None where they are not known.

    Raises:
        UserError: They are no number from 0.
    """
    if is_missing(value):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise UserError(f"{origin}: {name!r} must be seconds, a number from 0, it is {value!r}")
    return float(value)


def read_extras(fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return what every kind of answer may hold besides: a note, the prompt's flags, whether none is acceptable.

    Raises:
        UserError: One holds something else.
    """
    flags, note, none_acceptable = (fields.get(name) for name in ("prompt_flags", "note", "none_acceptable"))
    if not is_missing(flags) and not (isinstance(flags, list) and all(each in list(PROMPT_FLAGS) for each in flags)):
        raise UserError(f"{origin}: 'prompt_flags' must be a list of {', '.join(PROMPT_FLAGS)}; it is {flags!r}")
    if not is_missing(note) and not isinstance(note, str):
        raise UserError(f"{origin}: 'note' must be a text, it is {note!r}")
    if not is_missing(none_acceptable) and not isinstance(none_acceptable, bool):
        raise UserError(f"{origin}: 'none_acceptable' must be true or false, it is {none_acceptable!r}")
    extras = {"prompt_flags": flags, "note": note, "none_acceptable": none_acceptable}
    return {name: value for name, value in extras.items() if value and not is_missing(value)}


def find_text(fields: Mapping[str, Any], names: tuple[str, ...], row: Row) -> str:
    """Return the first of several columns that holds text.

    Raises:
        UserError: None does; names those that are there.
    """
    for name in names:
        if isinstance(fields.get(name), str) and fields[name].strip():
            return str(fields[name])
    found = ", ".join(map(repr, fields)) or "none"
    raise UserError(f"{row.origin}: no prompt: none of the columns {', '.join(names)} holds text; there are {found}")


PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "text")
