"""What an import is: tasks, and the answers to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lit_rlhf.data.records import Message, to_messages
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import ImportedAnswer, Kind, NewTask
from lit_rlhf.labeling.tasks import Content, check_completions, hash_content


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
            UserError: The task differs from an earlier one of its key, or its labeler answered it before.
        """
        known = self._tasks.setdefault(task.key, task)
        if known.content != task.content:
            raise UserError(f"{task.origin}: the task {task.key!r} differs from that at {known.origin}; change one id")
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
    texts = [] if kind == "demonstrate" else check_completions(completions, kind, origin)
    turns: list[Message] = to_messages(prompt)
    content: Content = {"fields": {**fields, "prompt": prompt}, "prompt": turns, "completions": texts}
    return NewTask(hash_content(content) if key in (None, "") else str(key), dict(content), None, origin)


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
