"""What makes a record fit to learn from. Every reader, and a user's own function, goes through these.

Each returns the record; or None, with the reason counted in the report, for a row that is well-formed but teaches
nothing; or raises `UserError` with file and line for a row that is malformed.
"""

from __future__ import annotations

import math
from typing import Any

from lit_rlhf.data.records import Demonstration, Instruction, Prompt, PromptRow, Ranking, Record, TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError


def is_empty(prompt: Prompt) -> bool:
    """Whether a prompt says nothing."""
    if isinstance(prompt, str):
        return not prompt.strip()
    if isinstance(prompt, Instruction):
        return not (prompt.instruction.strip() or prompt.input.strip())
    return not prompt


def check_demonstration(
    prompt: Prompt, completion: str, row: Row, report: DatasetReport, all_replies: bool = False
) -> Demonstration | None:
    """A demonstration whose prompt and completion say something."""
    if is_empty(prompt):
        report.skip("empty prompt", row.origin)
    elif not completion.strip():
        report.skip("empty completion", row.origin)
    else:
        return Demonstration(prompt, completion, row.fields, row.origin, all_replies)
    return None


def check_pair(prompt: Prompt, chosen: str, rejected: str, row: Row, report: DatasetReport) -> Ranking | None:
    """A ranking of two that differ."""
    if chosen.strip() == rejected.strip():
        report.skip("chosen equals rejected", row.origin)
        return None
    return check_ranking(prompt, [chosen, rejected], [0, 1], row, report)


def check_ranking(
    prompt: Prompt, texts: list[Any], ranks: list[Any], row: Row, report: DatasetReport, labeler: Any = None
) -> Ranking | None:
    """A ranking that says something, with its ranks made dense: 0, 1, … with equal ranks equal."""
    if not all(isinstance(each, str) for each in texts):
        raise UserError(f"{row.origin}: the completions must be texts, not {[type(each).__name__ for each in texts]}")
    if any(isinstance(each, bool) or not isinstance(each, int | float) or math.isnan(each) for each in ranks):
        raise UserError(f"{row.origin}: the ranks must be numbers, lowest = best, not {ranks}")
    if len(ranks) != len(texts):
        raise UserError(f"{row.origin}: {len(ranks)} ranks for {len(texts)} completions; each completion needs one")
    reason = _reason_to_skip(prompt, texts, ranks)
    if reason:
        report.skip(reason, row.origin)
        return None
    places = {rank: place for place, rank in enumerate(sorted(set(ranks)))}
    labeler = row.fields.get("labeler", labeler)
    name = None if labeler is None else str(labeler)
    return Ranking(prompt, texts, [places[rank] for rank in ranks], name, row.fields, row.origin)


def _reason_to_skip(prompt: Prompt, texts: list[str], ranks: list[Any]) -> str | None:
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
    """A prompt that says something."""
    if is_empty(prompt):
        report.skip("empty prompt", row.origin)
        return None
    return PromptRow(prompt, row.fields, row.origin)


def check_text(text: str, row: Row, report: DatasetReport) -> TextRow | None:
    """A document that says something."""
    if not text.strip():
        report.skip("empty document", row.origin)
        return None
    return TextRow(text, row.origin)


def check_record(record: Record, row: Row, report: DatasetReport) -> Record | None:
    """A record that a user's own function made, held to the same rules as any other."""
    if isinstance(record, Demonstration):
        return check_demonstration(record.prompt, record.completion, row, report, record.all_replies)
    if isinstance(record, Ranking):
        return check_ranking(record.prompt, record.completions, record.ranks, row, report, record.labeler)
    if isinstance(record, PromptRow):
        return check_prompt(record.prompt, row, report)
    return check_text(record.text, row, report)
