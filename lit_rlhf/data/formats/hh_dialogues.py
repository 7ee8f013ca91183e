r"""Readers of comparisons whose "chosen" and "rejected" are full dialogues: the prompt is the turns that both share.

A dialogue is text with turns "\n\nHuman:" and "\n\nAssistant:", as in Anthropic's HH, or a list of messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_rlhf.data.formats.record_validation import check_pair, check_prompt, is_missing
from lit_rlhf.data.formats.row_readers import get_messages, get_text
from lit_rlhf.data.records import Message, Prompt, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError

_TURN = re.compile(r"(?=\n\n(?:Human|Assistant):)")
_REPLY = "\n\nAssistant:"
_ROLES = {"\n\nHuman:": "user", _REPLY: "assistant"}


class SharedPrefix(NamedTuple):
    """Two dialogues, split after the turns that they share."""

    shared: list[str]  # turns
    chosen: list[str]
    rejected: list[str]

    @property
    def is_comparable(self) -> bool:
        """Whether each dialogue has exactly one more turn, a reply."""
        return all(len(turns) == 1 and turns[0].startswith(_REPLY) for turns in (self.chosen, self.rejected))

    @property
    def incomparable_reason(self) -> str:
        """Why the two dialogues are not comparable."""
        if self.chosen[-1].startswith(_REPLY) and self.rejected[-1].startswith(_REPLY):
            return "chosen and rejected differ before the last reply"
        return "dialogue does not end with a reply"

    @property
    def prompt_turns(self) -> list[str]:
        """The turns of the prompt: the shared ones if replies follow them, else all before chosen's last reply."""
        if self.chosen[0].startswith(_REPLY) and self.rejected[0].startswith(_REPLY):
            return self.shared
        turns = self.shared + self.chosen
        return turns[: max(n for n, turn in enumerate(turns) if turn.startswith(_REPLY))]


def split_turns(dialogue: str) -> list[str]:
    r"""Split a dialogue into turns, each with its "\n\nHuman:" or "\n\nAssistant:"; joined they are the dialogue."""
    return [turn for turn in _TURN.split(dialogue) if turn]


def split_shared_prefix(chosen: list[str], rejected: list[str]) -> SharedPrefix:
    """Split two dialogues after the turns that they share; at least one turn of each is left."""
    shared = _shared_length(chosen, rejected)
    return SharedPrefix(chosen[:shared], chosen[shared:], rejected[shared:])


def _shared_length(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how many turns two dialogues share, not counting the last of the shorter one."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(limit) if chosen[n] != rejected[n]), limit)


def read_pair(row: Row, report: DatasetReport) -> Ranking | None:
    """Read a ranking of two from dialogues as text, unchanged: prompt + completion is the dialogue."""
    split = _split_comparable(row, report)
    if split is None:
        return None
    chosen, rejected = (turns[0].removeprefix(_REPLY) for turns in split[1:])
    return check_pair("".join(split.shared) + _REPLY, chosen, rejected, row, report)


def read_pair_as_messages(row: Row, report: DatasetReport) -> Ranking | None:
    """Read a ranking of two as conversations, for a chat template; each turn is stripped."""
    split = _split_comparable(row, report)
    if split is None:
        return None
    chosen, rejected = (turns[0].removeprefix(_REPLY).strip() for turns in split[1:])
    return check_pair(_to_messages(split.shared), chosen, rejected, row, report)


def read_prompt(row: Row, report: DatasetReport) -> PromptRow | None:
    """Read the prompt of two dialogues, for PPO."""
    return check_prompt("".join(_split_row(row).prompt_turns) + _REPLY, row, report)


def read_prompt_as_messages(row: Row, report: DatasetReport) -> PromptRow | None:
    """Read the prompt of two dialogues as a conversation, for a chat template."""
    return check_prompt(_to_messages(_split_row(row).prompt_turns), row, report)


def _split_comparable(row: Row, report: DatasetReport) -> SharedPrefix | None:
    split = _split_row(row)
    if not split.is_comparable:
        report.skip(split.incomparable_reason, row.origin)
        return None
    return split


def _split_row(row: Row) -> SharedPrefix:
    for name in ("chosen", "rejected"):
        if _REPLY not in get_text(row, name):
            raise UserError(f"{row.origin}: column {name!r} holds no {_REPLY!r} to split at, and the row no 'prompt'")
    return split_shared_prefix(split_turns(row.fields["chosen"]), split_turns(row.fields["rejected"]))


def _to_messages(turns: list[str]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        marker = next((each for each in _ROLES if turn.startswith(each)), "")
        # text before the first marker is a system turn
        messages.append({"role": _ROLES.get(marker, "system"), "content": turn.removeprefix(marker).strip()})
    return [message for message in messages if message["content"]]


def read_message_list_pair(row: Row, report: DatasetReport) -> Ranking | None:
    """Read a ranking of two whose "chosen" and "rejected" are lists of messages, with or without a "prompt" column."""
    shared, chosen, rejected = _split_message_lists(row)
    if any([message["role"] for message in turns] != ["assistant"] for turns in (chosen, rejected)):
        report.skip("chosen and rejected differ before the last reply", row.origin)
        return None
    return check_pair(_build_prompt(row, shared, report), chosen[0]["content"], rejected[0]["content"], row, report)


def read_message_list_prompt(row: Row, report: DatasetReport) -> PromptRow | None:
    """Read the prompt that two lists of messages share, for PPO."""
    return check_prompt(_build_prompt(row, _split_message_lists(row)[0], report), row, report)


def _split_message_lists(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    chosen, rejected = get_messages(row, "chosen"), get_messages(row, "rejected")
    if not (chosen and rejected):
        raise UserError(f"{row.origin}: 'chosen' and 'rejected' must each hold a message")
    shared = _shared_length(chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _build_prompt(row: Row, shared: list[Message], report: DatasetReport) -> Prompt:
    """Concatenate the "prompt" column and the shared turns, of which those that repeat the column's are left out.

    A prompt as text is already one of the shared turns.
    """
    given = row.fields.get("prompt")
    if isinstance(given, list):
        return _join_turns(get_messages(row, "prompt"), shared, row, report)
    if is_missing(given) or shared:
        if not is_missing(given) and get_text(row, "prompt").strip() not in [
            turn["content"].strip() for turn in shared
        ]:
            report.flag("column 'prompt' is not used: it is none of the turns of chosen and rejected", row.origin)
        return shared
    return get_text(row, "prompt")


def _join_turns(given: list[Message], shared: list[Message], row: Row, report: DatasetReport) -> list[Message]:
    """Concatenate two lists of turns; the second may begin with the last turns of the first, as full dialogues do."""
    overlap = max((n for n in range(1, len(shared) + 1) if given[-n:] == shared[:n]), default=0)
    if not overlap and any(turn in shared for turn in given):
        report.flag("turns of column 'prompt' are among those of chosen and rejected: given twice", row.origin)
    return given + shared[overlap:]
