"""Which tokens of a conversation are its earlier replies, so that every one of them can be learnt in one row.

A prompt has the same ids whether it is answered or trained on. So the conversation is put into words and tokenised as a
whole, and a reply is found in it by the prompts that end at its two edges: what is in words before the reply, and what
is in words through its end. A template that puts a reply otherwise into words once more has been said (leaves out what
was thought, say) has no such prompts: its reply is not learnt, and the row is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError


class _Reply(NamedTuple):
    """The edges of one reply, as texts that begin where the conversation begins."""

    record: int
    asked: str  # through the end of the prompt that it answers
    begun: str  # through the white space that a template puts before it
    ended: str  # through the end of its turn


def earlier_replies(
    records: list[Demonstration], prompts: list[list[int]], template: PromptTemplate, report: DatasetReport
) -> list[list[bool]]:
    """Which tokens of each prompt are replies to be learnt; none where a record learns its completion alone.

    Args:
        records: The demonstrations.
        prompts: Their prompts' ids.
        template: What made the prompts.
        report: Where rows are counted of which a reply is not learnt.
    """
    learnt = [[False] * len(ids) for ids in prompts]
    replies = [reply for number, each in enumerate(records) for reply in _replies(number, each, template, report)]
    edges = iter(template.encode([edge for reply in replies for edge in reply[1:]]))
    for reply, (asked, begun, ended) in zip(replies, zip(edges, edges, edges)):
        ids = prompts[reply.record]
        if ids[: len(asked)] != asked:  # its prompt is tokenised otherwise where the conversation goes on
            report.note("an earlier reply is not learnt: its prompt has other ids", records[reply.record].origin)
            continue
        start, stop = max(len(asked), _agreeing(ids, begun)), _agreeing(ids, ended)
        learnt[reply.record][start:stop] = [True] * (stop - start)
    return learnt


def _replies(number: int, record: Demonstration, template: PromptTemplate, report: DatasetReport) -> list[_Reply]:
    """The replies within a prompt; one that cannot be found is left out and counted."""
    prompt = record.prompt
    if not record.all_replies or not isinstance(prompt, list):
        return []
    whole = template.render(prompt, record.fields, record.origin)
    found = []
    for place, turn in enumerate(prompt):
        if turn["role"] != "assistant" or not place or not turn["content"].strip():
            continue
        try:
            asked = template.render(prompt[:place], record.fields, record.origin)
        except UserError:
            asked = ""
        behind = whole.removeprefix(asked)
        begin = len(whole) - len(behind.lstrip())
        end = begin + len(turn["content"].strip())
        if not asked or behind == whole or whole[begin:end] != turn["content"].strip():
            report.note("an earlier reply is not learnt: the template changes what was said", record.origin)
            continue
        rest = whole[end:].lstrip()
        if template.is_chat(prompt) and rest.startswith(template.end_of_turn):
            end = len(whole) - len(rest) + len(template.end_of_turn) if template.end_of_turn else end
        found.append(_Reply(number, asked, whole[:begin], whole[:end]))
    return found


def _agreeing(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids two sequences share at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
