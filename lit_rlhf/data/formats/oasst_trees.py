"""Readers of OpenAssistant's conversation trees: a prompt, the replies to it, the messages after each reply, and so on.

One tree becomes many records, whose prompts are the turns from the root: a demonstration for each reply, a ranking for
each user turn with ranked replies, a prompt for each user turn. The fields of a record are the columns of the tree
(including `message_tree_id`, to split by) and of its message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lit_rlhf.data.formats.record_validation import check_demonstration, check_prompt, check_ranking, is_missing
from lit_rlhf.data.formats.row_readers import get_value, parse_message
from lit_rlhf.data.records import Demonstration, Message, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError


class _Node(NamedTuple):
    turns: list[Message]  # from the root to this message, inclusive
    fields: dict[str, Any]
    replies: list[dict[str, Any]]  # the messages after it, without deleted ones

    def row(self, tree: Row) -> Row:
        """Build a row with the columns of the tree and of this message."""
        shared = {name: value for name, value in tree.fields.items() if name != "prompt"}
        own = {name: value for name, value in self.fields.items() if name != "replies"}
        return Row({**shared, **own}, tree.origin)


def read_demonstrations(row: Row, report: DatasetReport) -> list[Demonstration]:
    """Read every reply, with all turns before it as its prompt; each reply is trained on once."""
    records = [
        check_demonstration(node.turns[:-1], node.turns[-1]["content"], node.row(row), report)
        for node in _iter_messages(row, report)
        if node.turns[-1]["role"] == "assistant"
    ]
    return [record for record in records if record is not None]


def read_rankings(row: Row, report: DatasetReport) -> list[Ranking]:
    """Read every user turn with two or more ranked replies, 0 = best; replies without a rank are left out."""
    records = []
    for node in _iter_messages(row, report):
        ranked = [reply for reply in node.replies if not is_missing(reply.get("rank"))]
        if node.turns[-1]["role"] == "user" and len(ranked) > 1:
            texts = [parse_message(reply, "a reply", row)["content"] for reply in ranked]
            records.append(check_ranking(node.turns, texts, [reply["rank"] for reply in ranked], node.row(row), report))
    return [record for record in records if record is not None]


def read_prompts(row: Row, report: DatasetReport) -> list[PromptRow]:
    """Read every user turn, with all turns before it."""
    records = [
        check_prompt(node.turns, node.row(row), report)
        for node in _iter_messages(row, report)
        if node.turns[-1]["role"] == "user"
    ]
    return [record for record in records if record is not None]


def _iter_messages(row: Row, report: DatasetReport) -> Iterator[_Node]:
    """Yield every message of a tree, root first, without deleted ones and the messages after them."""
    queue: list[tuple[list[Message], dict[str, Any]]] = [([], get_value(row, "prompt", dict, "a message"))]
    while queue:
        before, message = queue.pop(0)
        if message.get("deleted"):
            report.skip("deleted message, with all replies to it", row.origin)
            continue
        turns = [*before, parse_message(message, "a message", row)]
        replies = [] if is_missing(message.get("replies")) else message["replies"]
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise UserError(f"{row.origin}: the 'replies' of a message must be a list of messages")
        yield _Node(turns, message, [reply for reply in replies if not reply.get("deleted")])
        queue += [(turns, reply) for reply in replies]
