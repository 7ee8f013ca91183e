r"""Readers of comparisons whose "chosen" and "rejected" are whole dialogues: the prompt is what the two share.

A dialogue is text with turns "\n\nHuman:" and "\n\nAssistant:", as Anthropic's HH has it, or a list of messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_rlhf.data.formats.record_validation import check_pair, check_prompt
from lit_rlhf.data.formats.row_readers import messages_of, text_of
from lit_rlhf.data.records import Message, Prompt, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError

_TURN = re.compile(r"(?=\n\n(?:Human|Assistant):)")
_REPLY = "\n\nAssistant:"
_ROLES = {"\n\nHuman:": "user", _REPLY: "assistant"}


class SharedPrefix(NamedTuple):
    """Two dialogues at the turn where they part: what they share, and how each of them goes on."""

    shared: list[str]  # turns
    chosen: list[str]
    rejected: list[str]

    @property
    def comparable(self) -> bool:
        """Whether each of them goes on with one reply and ends there."""
        return all(len(turns) == 1 and turns[0].startswith(_REPLY) for turns in (self.chosen, self.rejected))

    @property
    def reason(self) -> str:
        """Why they are not comparable."""
        if self.chosen[-1].startswith(_REPLY) and self.rejected[-1].startswith(_REPLY):
            return "chosen and rejected differ before the last reply"
        return "dialogue does not end with a reply"

    @property
    def asked(self) -> list[str]:
        """The turns that a reply is to follow: the shared ones, or where replies do not, all before chosen's last."""
        if self.chosen[0].startswith(_REPLY) and self.rejected[0].startswith(_REPLY):
            return self.shared
        turns = self.shared + self.chosen
        return turns[: max(n for n, turn in enumerate(turns) if turn.startswith(_REPLY))]


def turns_of(dialogue: str) -> list[str]:
    r"""The turns of a dialogue, each with its "\n\nHuman:" or "\n\nAssistant:"; joined they are the dialogue."""
    return [turn for turn in _TURN.split(dialogue) if turn]


def split_shared_prefix(chosen: list[str], rejected: list[str]) -> SharedPrefix:
    """Two dialogues, turn by turn, up to where they part; each keeps one turn at least to go on with."""
    shared = _shared(chosen, rejected)
    return SharedPrefix(chosen[:shared], chosen[shared:], rejected[shared:])


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many turns two dialogues share, less the last of the shorter one."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)


def pair(row: Row, report: DatasetReport) -> Ranking | None:
    """A ranking of two, from two dialogues as text, which stays as it is: prompt + completion is the dialogue."""
    parted = _parted(row)
    if not parted.comparable:
        report.skip(parted.reason, row.origin)
        return None
    chosen, rejected = (turns[0].removeprefix(_REPLY) for turns in parted[1:])
    return check_pair("".join(parted.shared) + _REPLY, chosen, rejected, row, report)


def pair_of_messages(row: Row, report: DatasetReport) -> Ranking | None:
    """The same as conversations, for a chat template: the words of each turn without the space around them."""
    parted = _parted(row)
    if not parted.comparable:
        report.skip(parted.reason, row.origin)
        return None
    chosen, rejected = (turns[0].removeprefix(_REPLY).strip() for turns in parted[1:])
    return check_pair(_messages(parted.shared), chosen, rejected, row, report)


def prompt(row: Row, report: DatasetReport) -> PromptRow | None:
    """What two dialogues share, for PPO."""
    return check_prompt("".join(_parted(row).asked) + _REPLY, row, report)


def prompt_of_messages(row: Row, report: DatasetReport) -> PromptRow | None:
    """The same as a conversation."""
    return check_prompt(_messages(_parted(row).asked), row, report)


def _parted(row: Row) -> SharedPrefix:
    for name in ("chosen", "rejected"):
        if _REPLY not in text_of(row, name):
            raise UserError(f"{row.origin}: column {name!r} holds no {_REPLY!r} to split at, and the row no 'prompt'")
    return split_shared_prefix(turns_of(row.fields["chosen"]), turns_of(row.fields["rejected"]))


def _messages(turns: list[str]) -> list[Message]:
    messages: list[Message] = []
    for turn in turns:
        marker = next((each for each in _ROLES if turn.startswith(each)), "")
        # what stands before the first turn is the system's
        messages.append({"role": _ROLES.get(marker, "system"), "content": turn.removeprefix(marker).strip()})
    return [message for message in messages if message["content"]]


def pair_of_lists(row: Row, report: DatasetReport) -> Ranking | None:
    """A ranking of two whose "chosen" and "rejected" are lists of messages, with or without a "prompt" beside them."""
    shared, chosen, rejected = _parted_lists(row)
    if any([message["role"] for message in turns] != ["assistant"] for turns in (chosen, rejected)):
        report.skip("chosen and rejected differ before the last reply", row.origin)
        return None
    return check_pair(_prompt_before(row, shared), chosen[0]["content"], rejected[0]["content"], row, report)


def prompt_of_lists(row: Row, report: DatasetReport) -> PromptRow | None:
    """What two lists of messages share, for PPO."""
    return check_prompt(_prompt_before(row, _parted_lists(row)[0]), row, report)


def _parted_lists(row: Row) -> tuple[list[Message], list[Message], list[Message]]:
    chosen, rejected = messages_of(row, "chosen"), messages_of(row, "rejected")
    if not (chosen and rejected):
        raise UserError(f"{row.origin}: 'chosen' and 'rejected' must each hold a message")
    shared = _shared(chosen, rejected)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _prompt_before(row: Row, shared: list[Message]) -> Prompt:
    """The "prompt" column and the shared turns; a prompt as text is the first of the shared turns, where there are."""
    given = row.fields.get("prompt")
    if isinstance(given, list):
        return messages_of(row, "prompt") + shared
    return shared if shared or given is None else text_of(row, "prompt")
