"""Checks of records, applied to those of every reader and of a user's own function.

Each returns the record; or None, with the reason counted in the report, for a row that is well-formed but of no use in
training; or raises `UserError` with file and line for a row that is malformed.
"""

from __future__ import annotations

import math
from typing import Any

from lit_rlhf.data.records import (
    Demonstration,
    Instruction,
    Prompt,
    PromptInContext,
    PromptRow,
    Ranking,
    Record,
    TextRow,
    to_messages,
)
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row, check_value
from lit_rlhf.errors import UserError


def is_missing(value: Any) -> bool:
    """Return whether a value stands for a missing one: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: Any) -> bool:
    """Return whether a value is missing, or text without content, as CSV stores a missing value."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def is_rank(value: Any) -> bool:
    """Return whether a value is a rank: a finite number."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


def is_empty(prompt: Prompt) -> bool:
    """Return whether a prompt is empty or whitespace; of a conversation, whether its last turn is."""
    if isinstance(prompt, PromptInContext):
        return is_empty(prompt.prompt)
    if isinstance(prompt, str):
        return not prompt.strip()
    if isinstance(prompt, Instruction):
        return not (prompt.instruction.strip() or prompt.input.strip())
    return not prompt or not prompt[-1]["content"].strip()


def _flag_empty_turns(prompt: Prompt, row: Row, report: DatasetReport) -> None:
    if not all(message["content"].strip() for message in to_messages(prompt)):
        report.flag("a turn of the conversation is empty", row.origin)


def check_demonstration(
    prompt: Prompt, completion: str, row: Row, report: DatasetReport, train_on_all_replies: bool = False
) -> Demonstration | None:
    """Build a demonstration; skip an empty prompt or completion."""
    if is_empty(prompt):
        report.skip("empty prompt", row.origin)
    elif not completion.strip():
        report.skip("empty completion", row.origin)
    else:
        _flag_empty_turns(prompt, row, report)
        return Demonstration(prompt, completion, row.fields, row.origin, train_on_all_replies)
    return None


def check_pair(prompt: Prompt, chosen: str, rejected: str, row: Row, report: DatasetReport) -> Ranking | None:
    """Build a ranking of two; skip equal completions."""
    if chosen.strip() == rejected.strip():
        report.skip("chosen equals rejected", row.origin)
        return None
    return check_ranking(prompt, [chosen, rejected], [0, 1], row, report)


def check_ranking(
    prompt: Prompt, texts: list[Any], ranks: list[Any], row: Row, report: DatasetReport, labeler: Any = None
) -> Ranking | None:
    """Build a ranking with dense ranks (0, 1, …; equal ranks stay equal); skip one without a comparison."""
    if not all(isinstance(each, str) for each in texts):
        raise UserError(f"{row.origin}: the completions must be texts, not {[type(each).__name__ for each in texts]}")
    if not all(map(is_rank, ranks)):
        raise UserError(f"{row.origin}: the ranks must be numbers, lowest = best, not {ranks}")
    if len(ranks) != len(texts):
        raise UserError(f"{row.origin}: {len(ranks)} ranks for {len(texts)} completions; each completion needs one")
    reason = _skip_reason(prompt, texts, ranks)
    if reason:
        report.skip(reason, row.origin)
        return None
    _flag_empty_turns(prompt, row, report)
    dense_ranks = {rank: dense for dense, rank in enumerate(sorted(set(ranks)))}
    labeler = row.fields.get("labeler", labeler)
    name = None if is_missing(labeler) else str(labeler)
    return Ranking(prompt, texts, [dense_ranks[rank] for rank in ranks], name, row.fields, row.origin)


def _skip_reason(prompt: Prompt, texts: list[str], ranks: list[Any]) -> str | None:
    if is_empty(prompt):
        return "empty prompt"
    if len(texts) < 2:
        return "a single completion"
    if not all(text.strip() for text in texts):
        return "empty completion"
    if len(set(ranks)) == 1:
        return "all completions tied"
    if len({text.strip() for text in texts}) == 1:
        return "all completions identical"
    return None


def check_prompt(prompt: Prompt, row: Row, report: DatasetReport) -> PromptRow | None:
    """Build a prompt record; skip an empty prompt."""
    if is_empty(prompt):
        report.skip("empty prompt", row.origin)
        return None
    _flag_empty_turns(prompt, row, report)
    return PromptRow(prompt, row.fields, row.origin)


def check_text(text: str, row: Row, report: DatasetReport) -> TextRow | None:
    """Build a text record; skip an empty document."""
    if not text.strip():
        report.skip("empty document", row.origin)
        return None
    return TextRow(text, row.origin)


def check_record(record: Record, row: Row, report: DatasetReport) -> Record | None:
    """Check a record that a user's own function returned.

    Raises:
        UserError: A value has another type than the record's, or `check_value` refuses it.
    """
    check_value(record, row.origin)
    if isinstance(record, TextRow):
        return check_text(_check_type(record.text, str, "text", row), row, report)
    _check_prompt_type(record.prompt, row)
    if isinstance(record, Demonstration):
        completion = _check_type(record.completion, str, "completion", row)
        return check_demonstration(record.prompt, completion, row, report, record.train_on_all_replies)
    if isinstance(record, Ranking):
        for name in ("completions", "ranks"):
            _check_type(getattr(record, name), list, name, row)
        return check_ranking(record.prompt, record.completions, record.ranks, row, report, record.labeler)
    return check_prompt(record.prompt, row, report)


def _check_type(value: Any, kind: type, name: str, row: Row) -> Any:
    if not isinstance(value, kind):
        raise UserError(f"{row.origin}: the record's {name} must be a {kind.__name__}, it is a {type(value).__name__}")
    return value


def _check_prompt_type(prompt: Any, row: Row) -> None:
    if isinstance(prompt, PromptInContext):
        valid = all(map(_is_message, prompt.context)) and not isinstance(prompt.prompt, str)
        _check_prompt_type(prompt.prompt, row)
    elif isinstance(prompt, Instruction):
        valid = all(isinstance(part, str) for part in prompt)
    elif isinstance(prompt, list):
        valid = all(map(_is_message, prompt))
    else:
        valid = isinstance(prompt, str)
    if not valid:
        raise UserError(
            f"{row.origin}: the record's prompt must be a text, an Instruction or a list of role and content"
        )


def _is_message(turn: Any) -> bool:
    return (
        isinstance(turn, dict)
        and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str)
    )
