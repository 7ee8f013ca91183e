"""The readers behind `lit_rlhf.data.formats.registry`: from the columns of one row to a record, or to several.

Each takes a row and the report, and returns what `lit_rlhf.data.formats.record_validation` makes of the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

from lit_rlhf.data.formats.record_validation import (
    check_demonstration,
    check_pair,
    check_prompt,
    check_ranking,
    check_text,
)
from lit_rlhf.data.records import Demonstration, Instruction, Message, Prompt, PromptRow, Ranking, Record, TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError

Reader = Callable[[Row, DatasetReport], Record | list[Any] | None]

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def value_of(row: Row, name: str, kind: type | tuple[type, ...], described: str) -> Any:
    """A column's value, or a `UserError` that names the place, the column and the columns seen."""
    if name not in row.fields:
        seen = ", ".join(repr(each) for each in row.fields)
        raise UserError(f"{row.origin}: no column {name!r}; the row has {seen}")
    value = row.fields[name]
    if not isinstance(value, kind):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{row.origin}: column {name!r} must be {described}, it is {found}")
    return value


def text_of(row: Row, name: str) -> str:
    """A column that holds text."""
    value: str = value_of(row, name, str, "text")
    return value


def messages_of(row: Row, name: str) -> list[Message]:
    """A column that holds a conversation: a list of {role, content}, {role, text} or {from, value}."""
    turns = value_of(row, name, list, "a list of messages")
    return [message_of(turn, f"turn {number} of {name!r}", row) for number, turn in enumerate(turns, start=1)]


def message_of(turn: Any, where: str, row: Row) -> Message:
    """One turn, under whichever names its role and its words stand."""
    turn = turn if isinstance(turn, dict) else {}
    role = turn.get("role", turn.get("from"))
    content = next((turn[name] for name in ("content", "text", "value") if name in turn), None)
    if not isinstance(content, str) or role is None:
        raise UserError(f"{row.origin}: {where} must have a 'role' and a text 'content'")
    if role not in _ROLES:
        raise UserError(f"{row.origin}: {where} has the role {role!r}, not one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": content}


def reply_of(row: Row, name: str) -> str:
    """A column that holds a reply: text, or a conversation of that one turn."""
    if not isinstance(row.fields.get(name), list):
        return text_of(row, name)
    messages = messages_of(row, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise UserError(f"{row.origin}: column {name!r} must hold one reply, it has {len(messages)} turns")
    return messages[0]["content"]


def prompt_of(row: Row) -> Prompt:
    """The prompt of a row, by the same precedence of columns in every kind of data.

    "prompt" is text taken as it is (or a conversation, where it is a list); "instruction" (with "input", or Dolly's
    "context") and "question" (with "passages") are instructions; "messages" and "conversations" are conversations,
    less a closing reply; "context" is a conversation that stops before the reply; "text" is taken as it is.
    """
    if "prompt" in row.fields:
        return messages_of(row, "prompt") if isinstance(row.fields["prompt"], list) else text_of(row, "prompt")
    if "instruction" in row.fields:
        material = next((name for name in ("input", "context") if row.fields.get(name)), None)
        return Instruction(text_of(row, "instruction"), text_of(row, material) if material else "")
    if "question" in row.fields:
        return Instruction(text_of(row, "question"), _passages(row))
    for name in ("messages", "conversations"):
        if name in row.fields:
            messages = messages_of(row, name)
            return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if "context" in row.fields:
        return messages_of(row, "context")
    return text_of(row, "text")


def _passages(row: Row) -> str:
    """Passages as FineGrainedRLHF has them: lists of sentences, the first the title."""
    return "\n\n".join("\n".join(passage) for passage in row.fields.get("passages") or [])


def last_reply(messages: list[Message]) -> int | None:
    """The place of the last reply, or None."""
    return next((n for n in reversed(range(len(messages))) if messages[n]["role"] == "assistant"), None)


def demonstration(completion: str) -> Reader:
    """A reader of demonstrations whose completion is in the column of that name."""

    def read(row: Row, report: DatasetReport) -> Demonstration | None:
        return check_demonstration(prompt_of(row), reply_of(row, completion), row, report)

    return read


def conversation(name: str) -> Reader:
    """A reader of demonstrations from conversations, each of whose replies is to be learnt."""

    def read(row: Row, report: DatasetReport) -> Demonstration | None:
        messages = messages_of(row, name)
        place = last_reply(messages)
        if place is None:
            report.skip("conversation does not end with a reply", row.origin)
            return None
        if place < len(messages) - 1:
            report.note("turns behind the last reply left out", row.origin)
        return check_demonstration(messages[:place], messages[place]["content"], row, report, all_replies=True)

    return read


def instances(read: Reader) -> Reader:
    """A reader of rows that hold one instruction and several "instances" of it, each {input, output}."""

    def read_all(row: Row, report: DatasetReport) -> list[Any]:
        shared = {name: value for name, value in row.fields.items() if name != "instances"}
        records = []
        for number, each in enumerate(value_of(row, "instances", list, "a list of instances"), start=1):
            if not isinstance(each, dict):
                raise UserError(f"{row.origin}: instance {number} must have 'input' and 'output'")
            records.append(read(Row({**shared, **each}, row.origin), report))
        return [record for record in records if record is not None]

    return read_all


def ranking(completions: str) -> Reader:
    """A reader of rankings: K completions in the column of that name, their "ranks" (lowest = best), a "labeler"."""

    def read(row: Row, report: DatasetReport) -> Ranking | None:
        texts = value_of(row, completions, list, "a list of texts")
        ranks = value_of(row, "ranks", list, "a list of numbers, lowest = best")
        return check_ranking(prompt_of(row), texts, ranks, row, report)

    return read


def pair(row: Row, report: DatasetReport) -> Ranking | None:
    """A ranking of two, from a prompt, "chosen" and "rejected"."""
    return check_pair(prompt_of(row), text_of(row, "chosen"), text_of(row, "rejected"), row, report)


def pair_labels(row: Row, report: DatasetReport) -> Ranking | None:
    """A ranking from labels of all pairs, as FineGrainedRLHF's "preference" has them.

    Pairs go (1,2)(1,3)…(K-1,K); 0 is a tie, 1 and 2 say which is better. The rank is by wins minus losses; a row whose
    labels that order contradicts (they are not transitive, or tie unevenly) is kept and counted.
    """
    texts: list[str] = []
    while f"prediction {len(texts) + 1}" in row.fields:
        texts.append(text_of(row, f"prediction {len(texts) + 1}"))
    labels = value_of(row, "preference", list, "a list of pair labels")
    pairs = list(combinations(range(len(texts)), 2))
    if len(labels) != len(pairs) or not set(labels) <= {0, 1, 2}:
        raise UserError(
            f"{row.origin}: 'preference' must hold {len(pairs)} labels 0, 1 or 2 for {len(texts)} predictions"
        )
    # +1: the first of the pair is better, -1: the second
    signs = [{0: 0, 1: 1, 2: -1}[label] for label in labels]
    net = [0] * len(texts)
    for (first, second), sign in zip(pairs, signs):
        net[first] += sign
        net[second] -= sign
    if any(signs) and not any(net):
        report.skip("pair labels cancel each other out", row.origin)
        return None
    record = check_ranking(prompt_of(row), texts, [-each for each in net], row, report)
    derived = [(net[first] > net[second]) - (net[first] < net[second]) for first, second in pairs]
    if record is not None and derived != signs:
        report.note("ranks by wins contradict a pair label", row.origin)
    return record


def prompt(row: Row, report: DatasetReport) -> PromptRow | None:
    """A prompt, from whichever column holds it (see `prompt_of`)."""
    return check_prompt(prompt_of(row), row, report)


def text(row: Row, report: DatasetReport) -> TextRow | None:
    """A document."""
    return check_text(text_of(row, "text"), row, report)
