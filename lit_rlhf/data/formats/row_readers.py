"""The readers of `lit_rlhf.data.formats.registry`: from the columns of one row to a record, or to several.

Each takes a row and the report, and returns what `lit_rlhf.data.formats.record_validation` accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import Any

from lit_rlhf.data.formats.record_validation import (
    check_demonstration,
    check_pair,
    check_prompt,
    check_ranking,
    check_text,
    is_blank,
    is_missing,
)
from lit_rlhf.data.records import (
    CONTEXT_COLUMNS,
    Demonstration,
    Instruction,
    Message,
    Prompt,
    PromptInContext,
    PromptRow,
    Ranking,
    Record,
    TextRow,
    to_plain_text,
)
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


def get_value(row: Row, name: str, kind: type | tuple[type, ...], description: str) -> Any:
    """Return a column's value.

    Raises:
        UserError: The row has no such column, or its value has another type; `description` names the right one.
    """
    if name not in row.fields:
        columns = ", ".join(repr(each) for each in row.fields)
        raise UserError(f"{row.origin}: no column {name!r}; the row has {columns}")
    value = row.fields[name]
    if not isinstance(value, kind):
        found = ("null" if value is None else "NaN") if is_missing(value) else f"a {type(value).__name__}"
        raise UserError(f"{row.origin}: column {name!r} must be {description}, it is {found}")
    return value


def get_text(row: Row, name: str) -> str:
    """Return a column that holds text."""
    value: str = get_value(row, name, str, "text")
    return value


def get_messages(row: Row, name: str) -> list[Message]:
    """Return a column that holds a conversation: a list of {role, content}, {role, text} or {from, value}."""
    turns = get_value(row, name, list, "a list of messages")
    return [parse_message(turn, f"turn {number} of {name!r}", row) for number, turn in enumerate(turns, start=1)]


def parse_message(turn: Any, where: str, row: Row) -> Message:
    """Convert one turn with any known names of role and content; `where` names it in error messages."""
    turn = turn if isinstance(turn, dict) else {}
    role, content = (_one_of(turn, names, where, row) for names in (("role", "from"), ("content", "text", "value")))
    if not isinstance(content, str) or not isinstance(role, str):
        raise UserError(f"{row.origin}: {where} must have a 'role' and a text 'content'")
    if role not in _ROLES:
        raise UserError(f"{row.origin}: {where} has the role {role!r}, not one of {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": content}


def _one_of(turn: dict[str, Any], names: tuple[str, ...], where: str, row: Row) -> Any:
    """Return what a turn holds under one of several names; a table of mixed styles has null under the others."""
    given = [turn[name] for name in names if not is_missing(turn.get(name))]
    if any(each != given[0] for each in given[1:]):
        raise UserError(f"{row.origin}: {where} has different values under {' and '.join(names)}; keep one of them")
    return given[0] if given else None


def get_reply(row: Row, name: str) -> str:
    """Return a column that holds a reply: text, or a conversation of that one turn."""
    if not isinstance(row.fields.get(name), list):
        return get_text(row, name)
    messages = get_messages(row, name)
    if [message["role"] for message in messages] != ["assistant"]:
        raise UserError(f"{row.origin}: column {name!r} must hold one reply, it has {len(messages)} turns")
    return messages[0]["content"]


def get_prompt(row: Row) -> Prompt:
    """Return the prompt of a row, by the same precedence of columns in every kind of data.

    "prompt" is text used as it is (or a conversation, if it is a list); "instruction" (with "input", or Dolly's
    "context") and "question" (with "passages") are instructions; "messages" and "conversations" are conversations,
    without a final reply; "context" is a conversation that ends before the reply; "text" is used as it is.

    Raises:
        UserError: There is none, it has another form, or the row is a message of OpenAssistant, which is no prompt
            without the messages before it.
    """
    if "prompt" in row.fields:
        return get_messages(row, "prompt") if isinstance(row.fields["prompt"], list) else get_text(row, "prompt")
    if "instruction" in row.fields:
        given = (name for name in ("input", "context") if row.fields.get(name) and not is_missing(row.fields[name]))
        input_column = next(given, None)
        return Instruction(get_text(row, "instruction"), get_text(row, input_column) if input_column else "")
    if "question" in row.fields:
        return Instruction(get_text(row, "question"), _join_passages(row))
    for name in ("messages", "conversations"):
        if name in row.fields:
            return get_messages_before_reply(row, name)
    if "context" in row.fields:
        return get_messages(row, "context")
    if {"text", "role", "parent_id"} <= row.fields.keys():
        raise UserError(
            f"{row.origin}: each row is one message of a conversation ('role', 'parent_id'): use the file with trees, "
            "which for OpenAssistant ends in .trees.jsonl.gz, or set format to your own function"
        )
    return get_text(row, "text" if "text" in row.fields else "prompt")


def get_messages_before_reply(row: Row, name: str) -> list[Message]:
    """Return a column that holds a conversation, without its final reply."""
    messages = get_messages(row, name)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _join_passages(row: Row) -> str:
    """Join passages in the form of FineGrainedRLHF: lists of sentences, the first is the title."""
    passages = row.fields.get("passages")
    if is_missing(passages):
        return ""
    if not isinstance(passages, list) or not all(_is_list_of_texts(each) for each in passages):
        raise UserError(f"{row.origin}: column 'passages' must be a list of lists of sentences")
    return "\n\n".join("\n".join(passage) for passage in passages)


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


# The names of columns, and of keys of a turn, that a format may not read and that mean something to people, as
# lower-case letters alone. A record whose row has one, other than in its default, is counted.
_MEANINGFUL = frozenset(
    (
        *("system", "systemprompt", "systemmessage", "history", "persona", "character", "chattemplatekwargs"),
        *("input", "context", "background", "passage", "passages"),
        *("weight", "weights", "sampleweight", "margin", "train", "trainonturn"),
        *("label", "labels", "mask", "lossmask"),
        *("tool", "tools", "toolcall", "toolcalls", "toolcallid", "tooluse", "observation"),
        *("functions", "functioncall", "functioncalls"),
        *("reasoning", "reasoningcontent", "thinking", "thought"),
        *("image", "images", "audio", "audios", "video", "videos", "document", "documents", "citations"),
    )
)
_CONVERSATIONS = ("prompt", "messages", "conversations", "chosen", "rejected", "context")


def add_context(prompt: Prompt, row: Row, report: DatasetReport) -> Prompt:
    """Put the turns of the columns `system` (or `system_prompt`) and `history` before a prompt that is not text.

    What means something to people in a row, and is not used, is counted in the report.

    Args:
        prompt: The prompt that the row's format reads.
        row: The row.
        report: Counts the rows.
    """
    context: list[Message] = []
    used: set[str] = set()
    if isinstance(prompt, Instruction) or (isinstance(prompt, list) and prompt[0]["role"] != "system"):
        systems = [name for name in CONTEXT_COLUMNS[:-1] if _is_text(row.fields.get(name))]
        if len({row.fields[name] for name in systems}) == 1:
            context.append({"role": "system", "content": row.fields[systems[0]]})
            used.update(systems)
        turns = _history_turns(row.fields.get("history"))
        context += turns
        used.update(["history"] if turns else [])
    for name in sorted(used):
        report.flag(f"column {name!r} is put before the prompt as turns", row.origin)
    prompt_text = to_plain_text(prompt)
    for name, value in sorted(row.fields.items()):
        texts = list(_iter_texts(value))
        is_read = name in used or (name in _CONVERSATIONS and isinstance(value, list))
        is_read = is_read or (bool(texts) and all(text.strip() in prompt_text for text in texts))
        is_dialogue = name in ("messages", "conversations") and isinstance(value, list) and bool(value)
        is_left_out = is_dialogue and isinstance(prompt, str | Instruction)
        if is_left_out or (not is_read and _is_meaningful(name, value)):
            report.flag(f"column {name!r} is not read by the format", row.origin)
    turns_of_row = [row.fields[name] for name in _CONVERSATIONS if isinstance(row.fields.get(name), list)]
    keys = {
        name
        for turn in chain.from_iterable(turns_of_row)
        if isinstance(turn, dict)
        for name, value in turn.items()
        if _is_meaningful(name, value)
    }
    for name in sorted(keys):
        report.flag(f"{name!r} of a turn is not read by the format", row.origin)
    return PromptInContext(prompt, context) if context and not isinstance(prompt, str | PromptInContext) else prompt


def _iter_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _iter_texts(each)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_meaningful(name: str, value: Any) -> bool:
    plain = "".join(each for each in name.lower() if each.isalpha())
    is_default = value is True or value == 1 if plain in ("weight", "train", "trainonturn") else False
    is_empty = is_blank(value) or (isinstance(value, list | dict) and not value)
    return plain in _MEANINGFUL and not (is_default or is_empty)


def _history_turns(value: Any) -> list[Message]:
    """Return the turns of a `history`: [[user, reply], …]; none if it has another form."""
    if not isinstance(value, list) or not all(_is_list_of_texts(pair) and len(pair) == 2 for pair in value):
        return []
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in value for role, text in zip(roles, pair)]


def find_last_reply(messages: list[Message]) -> int | None:
    """Return the index of the last reply, or None."""
    return next((n for n in reversed(range(len(messages))) if messages[n]["role"] == "assistant"), None)


def make_demonstration_reader(completion: str) -> Reader:
    """Build a reader of demonstrations whose completion is in the column of that name."""

    def read(row: Row, report: DatasetReport) -> Demonstration | None:
        return check_demonstration(get_prompt(row), get_reply(row, completion), row, report)

    return read


def make_conversation_reader(name: str) -> Reader:
    """Build a reader of demonstrations from conversations, which train on all replies."""

    def read(row: Row, report: DatasetReport) -> Demonstration | None:
        messages = get_messages(row, name)
        last = find_last_reply(messages)
        if last is None:
            report.skip("conversation does not end with a reply", row.origin)
            return None
        if last < len(messages) - 1:
            report.flag("turns after the last reply left out", row.origin)
        return check_demonstration(messages[:last], messages[last]["content"], row, report, train_on_all_replies=True)

    return read


def make_instances_reader(read: Reader) -> Reader:
    """Build a reader of rows that hold one instruction and several "instances" of it, each {input, output}."""

    def read_all(row: Row, report: DatasetReport) -> list[Any]:
        shared = {name: value for name, value in row.fields.items() if name != "instances"}
        records = []
        for number, each in enumerate(get_value(row, "instances", list, "a list of instances"), start=1):
            if not isinstance(each, dict):
                raise UserError(f"{row.origin}: instance {number} must have 'input' and 'output'")
            records.append(read(Row({**shared, **each}, row.origin), report))
        return [record for record in records if record is not None]

    return read_all


def make_ranking_reader(completions: str) -> Reader:
    """Build a reader of rankings: K completions in that column, their "ranks" (lowest = best), a "labeler"."""

    def read(row: Row, report: DatasetReport) -> Ranking | None:
        texts = get_value(row, completions, list, "a list of texts")
        ranks = get_value(row, "ranks", list, "a list of numbers, lowest = best")
        return check_ranking(get_prompt(row), texts, ranks, row, report)

    return read


def read_pair(row: Row, report: DatasetReport) -> Ranking | None:
    """Read a ranking of two, from a prompt, "chosen" and "rejected"."""
    return check_pair(get_prompt(row), get_text(row, "chosen"), get_text(row, "rejected"), row, report)


def read_pair_labels(row: Row, report: DatasetReport) -> Ranking | None:
    """Read a ranking from labels of all pairs, in the form of FineGrainedRLHF's "preference".

    The pairs are (1,2)(1,3)…(K-1,K); 0 is a tie, 1 and 2 say which is better. The rank is by wins minus losses; a row
    with a label that contradicts this order (labels are not transitive, or tie unevenly) is kept and counted.
    """
    texts: list[str] = []
    while f"prediction {len(texts) + 1}" in row.fields:
        texts.append(get_text(row, f"prediction {len(texts) + 1}"))
    labels = get_value(row, "preference", list, "a list of pair labels")
    pairs = list(combinations(range(len(texts)), 2))
    if len(labels) != len(pairs) or not all(type(label) is int and 0 <= label <= 2 for label in labels):
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
    record = check_ranking(get_prompt(row), texts, [-each for each in net], row, report)
    derived = [(net[first] > net[second]) - (net[first] < net[second]) for first, second in pairs]
    if record is not None and derived != signs:
        report.flag("ranks by wins contradict a pair label", row.origin)
    return record


def read_prompt(row: Row, report: DatasetReport) -> PromptRow | None:
    """Read a prompt, from the column that holds it (see `get_prompt`)."""
    return check_prompt(get_prompt(row), row, report)


def make_conversation_prompt_reader(name: str) -> Reader:
    """Build a reader of prompts from conversations, whatever other columns the row has."""

    def read(row: Row, report: DatasetReport) -> PromptRow | None:
        return check_prompt(get_messages_before_reply(row, name), row, report)

    return read


def read_text(row: Row, report: DatasetReport) -> TextRow | None:
    """Read a document."""
    return check_text(get_text(row, "text"), row, report)
