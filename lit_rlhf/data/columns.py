"""The readers behind `lit_rlhf.data.formats`: from the columns of one row to a record.

Each takes a row and the report. It returns the record; or None, with the reason counted in the report, for a row that
is well-formed but teaches nothing; or raises `UserError` with file and line for a row that is malformed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

from lit_rlhf.data.records import Demonstration, Instruction, Message, Prompt, PromptRow, Ranking, Record, TextRow
from lit_rlhf.data.report import PreparationReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_ASSISTANT_TURN = "\n\nAssistant:"


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
    """A column that holds a conversation: a list of {role, content}, or {role, text} as OpenAssistant has it."""
    messages: list[Message] = []
    for number, turn in enumerate(value_of(row, name, list, "a list of messages"), start=1):
        content = turn.get("content", turn.get("text")) if isinstance(turn, dict) else None
        if not isinstance(content, str) or "role" not in turn:
            raise UserError(f"{row.origin}: turn {number} of {name!r} must have a 'role' and a text 'content'")
        if turn["role"] not in _ROLES:
            raise UserError(
                f"{row.origin}: turn {number} of {name!r} has the role {turn['role']!r}, not one of {', '.join(_ROLES)}"
            )
        messages.append({"role": _ROLES[turn["role"]], "content": content})
    return messages


def prompt_of(row: Row) -> Prompt:
    """The prompt of a row, by the same precedence of columns in every kind of data.

    "prompt" is text taken as it is (or a conversation, where it is a list); "instruction" (with "input", or Dolly's
    "context") and "question" (with "passages") are instructions; "messages" is a conversation, less its closing reply;
    "context" is a conversation that stops before the reply; "text" is taken as it is.
    """
    if "prompt" in row.fields:
        return messages_of(row, "prompt") if isinstance(row.fields["prompt"], list) else text_of(row, "prompt")
    if "instruction" in row.fields:
        material = next((name for name in ("input", "context") if row.fields.get(name)), None)
        return Instruction(text_of(row, "instruction"), text_of(row, material) if material else "")
    if "question" in row.fields:
        return Instruction(text_of(row, "question"), _passages(row))
    if "messages" in row.fields:
        messages = messages_of(row, "messages")
        return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
    if "context" in row.fields:
        return messages_of(row, "context")
    return text_of(row, "text")


def _passages(row: Row) -> str:
    """Passages as FineGrainedRLHF has them: lists of sentences, the first the title."""
    return "\n\n".join("\n".join(passage) for passage in row.fields.get("passages") or [])


def is_empty(prompt: Prompt) -> bool:
    """Whether a prompt says nothing."""
    if isinstance(prompt, str):
        return not prompt.strip()
    if isinstance(prompt, Instruction):
        return not (prompt.instruction.strip() or prompt.input.strip())
    return not prompt


def demonstration(completion: str) -> Callable[[Row, PreparationReport], Demonstration | None]:
    """A reader of demonstrations whose completion is in the column of that name."""

    def read(row: Row, report: PreparationReport) -> Demonstration | None:
        return _demonstration(prompt_of(row), text_of(row, completion), row, report)

    return read


def conversation(row: Row, report: PreparationReport) -> Demonstration | None:
    """A demonstration from "messages": the last reply is the completion, all before it the prompt."""
    messages = messages_of(row, "messages")
    if not messages or messages[-1]["role"] != "assistant":
        report.skip("conversation does not end with a reply", row.origin)
        return None
    return _demonstration(messages[:-1], messages[-1]["content"], row, report)


def _demonstration(prompt: Prompt, completion: str, row: Row, report: PreparationReport) -> Demonstration | None:
    if is_empty(prompt):
        report.skip("empty prompt", row.origin)
    elif not completion.strip():
        report.skip("empty completion", row.origin)
    else:
        return Demonstration(prompt, completion, row.fields, row.origin)
    return None


def ranking(completions: str) -> Callable[[Row, PreparationReport], Ranking | None]:
    """A reader of rankings: K completions in the column of that name, their "ranks" (lowest = best), a "labeler"."""

    def read(row: Row, report: PreparationReport) -> Ranking | None:
        texts = value_of(row, completions, list, "a list of texts")
        ranks = value_of(row, "ranks", list, "a list of numbers, lowest = best")
        return _ranking(prompt_of(row), texts, ranks, row, report)

    return read


def pair(row: Row, report: PreparationReport) -> Ranking | None:
    """A ranking of two, from a prompt, "chosen" and "rejected"."""
    return _pair(prompt_of(row), text_of(row, "chosen"), text_of(row, "rejected"), row, report)


def dialogue_pair(row: Row, report: PreparationReport) -> Ranking | None:
    """A ranking of two from full dialogues as Anthropic's HH has them: all but the last reply is shared."""
    chosen, rejected = _dialogue(row, "chosen"), _dialogue(row, "rejected")
    if chosen[0] != rejected[0]:
        report.skip("chosen and rejected differ before the last reply", row.origin)
        return None
    return _pair(chosen[0], chosen[1], rejected[1], row, report)


def _dialogue(row: Row, name: str) -> tuple[str, str]:
    """A dialogue as (everything through the last "Assistant:", the last reply)."""
    head, turn, reply = text_of(row, name).rpartition(_ASSISTANT_TURN)
    if not turn:
        raise UserError(
            f"{row.origin}: column {name!r} holds no {_ASSISTANT_TURN!r} to split at, and the row no 'prompt'"
        )
    return head + turn, reply


def _pair(prompt: Prompt, chosen: str, rejected: str, row: Row, report: PreparationReport) -> Ranking | None:
    if chosen.strip() == rejected.strip():
        report.skip("chosen equals rejected", row.origin)
        return None
    return _ranking(prompt, [chosen, rejected], [0, 1], row, report)


def pair_labels(row: Row, report: PreparationReport) -> Ranking | None:
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
    record = _ranking(prompt_of(row), texts, [-each for each in net], row, report)
    derived = [(net[first] > net[second]) - (net[first] < net[second]) for first, second in pairs]
    if record is not None and derived != signs:
        report.note("ranks by wins contradict a pair label", row.origin)
    return record


def _ranking(
    prompt: Prompt, texts: list[Any], ranks: list[Any], row: Row, report: PreparationReport, labeler: Any = None
) -> Ranking | None:
    """A checked ranking with its ranks made dense: 0, 1, … with equal ranks equal."""
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


def prompt(row: Row, report: PreparationReport) -> PromptRow | None:
    """A prompt, from whichever column holds it (see `prompt_of`)."""
    return _prompt(prompt_of(row), row, report)


def dialogue_prompt(row: Row, report: PreparationReport) -> PromptRow | None:
    """The shared prompt of two full dialogues."""
    return _prompt(_dialogue(row, "chosen")[0], row, report)


def _prompt(value: Prompt, row: Row, report: PreparationReport) -> PromptRow | None:
    if is_empty(value):
        report.skip("empty prompt", row.origin)
        return None
    return PromptRow(value, row.fields, row.origin)


def text(row: Row, report: PreparationReport) -> TextRow | None:
    """A document."""
    return _text(text_of(row, "text"), row, report)


def _text(value: str, row: Row, report: PreparationReport) -> TextRow | None:
    if not value.strip():
        report.skip("empty document", row.origin)
        return None
    return TextRow(value, row.origin)


def checked(record: Record, row: Row, report: PreparationReport) -> Record | None:
    """A record that a user's own function made, held to the same rules as any other."""
    if isinstance(record, Demonstration):
        return _demonstration(record.prompt, record.completion, row, report)
    if isinstance(record, Ranking):
        return _ranking(record.prompt, record.completions, record.ranks, row, report, record.labeler)
    if isinstance(record, PromptRow):
        return _prompt(record.prompt, row, report)
    return _text(record.text, row, report)
