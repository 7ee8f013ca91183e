"""Readers of OpenAssistant's conversation trees: a prompt, the replies to it, what was said to each reply, and so on.

One tree becomes many records, each with the turns from the root on as its prompt: a demonstration for each reply, a
ranking for each user's turn with ranked replies, a prompt for each user's turn. The fields of a record are those of
the tree (`message_tree_id` among them, to split by) and of its message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lit_rlhf.data.formats.record_validation import check_demonstration, check_prompt, check_ranking
from lit_rlhf.data.formats.row_readers import message_of, value_of
from lit_rlhf.data.records import Demonstration, Message, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row


class _Node(NamedTuple):
    turns: list[Message]  # from the root to this message, itself included
    fields: dict[str, Any]
    replies: list[dict[str, Any]]  # what was said to it, less what was deleted

    def row(self, tree: Row) -> Row:
        """The columns of the tree and of this message."""
        shared = {name: value for name, value in tree.fields.items() if name != "prompt"}
        own = {name: value for name, value in self.fields.items() if name != "replies"}
        return Row({**shared, **own}, tree.origin)


def demonstrations(row: Row, report: DatasetReport) -> list[Demonstration]:
    """Every reply with all turns before it as its prompt; each reply is learnt once."""
    made = [
        check_demonstration(node.turns[:-1], node.turns[-1]["content"], node.row(row), report)
        for node in _nodes(row, report)
        if node.turns[-1]["role"] == "assistant"
    ]
    return [record for record in made if record is not None]


def rankings(row: Row, report: DatasetReport) -> list[Ranking]:
    """Every user's turn with two ranked replies or more, 0 = best; replies without a rank are left out."""
    made = []
    for node in _nodes(row, report):
        ranked = [reply for reply in node.replies if reply.get("rank") is not None]
        if node.turns[-1]["role"] == "user" and len(ranked) > 1:
            texts = [message_of(reply, "a reply", row)["content"] for reply in ranked]
            made.append(check_ranking(node.turns, texts, [reply["rank"] for reply in ranked], node.row(row), report))
    return [record for record in made if record is not None]


def prompts(row: Row, report: DatasetReport) -> list[PromptRow]:
    """Every user's turn with all turns before it."""
    made = [
        check_prompt(node.turns, node.row(row), report)
        for node in _nodes(row, report)
        if node.turns[-1]["role"] == "user"
    ]
    return [record for record in made if record is not None]


def _nodes(row: Row, report: DatasetReport) -> Iterator[_Node]:
    """Every message of a tree that was not deleted, nor said in answer to one that was; the root first."""
    waiting: list[tuple[list[Message], dict[str, Any]]] = [([], value_of(row, "prompt", dict, "a message"))]
    while waiting:
        before, message = waiting.pop(0)
        if message.get("deleted"):
            report.skip("deleted message, with all that was said to it", row.origin)
            continue
        turns = [*before, message_of(message, "a message", row)]
        replies = message.get("replies") or []
        yield _Node(turns, message, [reply for reply in replies if not reply.get("deleted")])
        waiting += [(turns, reply) for reply in replies]
