"""Which tokens of a conversation are its earlier replies, to train on every reply in one row.

A prompt has the same ids in generation and in training. So the full conversation is rendered and tokenized at once, and
a reply is located in it by two rendered prefixes: the conversation up to the reply, and up to the end of the reply. A
template that renders a reply differently once another turn follows (without its reasoning, for example) has no such
prefixes: that reply is not trained on, and the row is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration, Message, Prompt, PromptInContext
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError


class _Reply(NamedTuple):
    """The boundaries of one reply, as rendered texts that begin where the conversation begins."""

    record: int  # index of the demonstration
    prompt: str  # through the end of the prompt of this reply
    before: str  # through the whitespace that a template puts before the reply
    through: str  # through the end of the reply's turn


def mask_earlier_replies(
    records: list[Demonstration], prompts: list[list[int]], template: PromptTemplate, report: DatasetReport
) -> list[list[bool]]:
    """Build the loss mask of each prompt: True at replies; all False if a record trains on its completion alone.

    Args:
        records: The demonstrations.
        prompts: The ids of their prompts.
        template: The template that rendered the prompts.
        report: Counts the rows with a reply that cannot be trained on.
    """
    masks = [[False] * len(ids) for ids in prompts]
    replies = [reply for number, each in enumerate(records) for reply in _find_replies(number, each, template, report)]
    encoded = iter(template.encode([text for reply in replies for text in reply[1:]]))
    for reply, (prompt, before, through) in zip(replies, zip(encoded, encoded, encoded)):
        ids = prompts[reply.record]
        if ids[: len(prompt)] != prompt:  # tokens merge across the end of the prompt once the conversation goes on
            report.flag("an earlier reply is not trained on: its prompt has other ids", records[reply.record].origin)
            continue
        start, stop = max(len(prompt), _common_prefix_length(ids, before)), _common_prefix_length(ids, through)
        masks[reply.record][start:stop] = [True] * (stop - start)
    return masks


def _find_replies(number: int, record: Demonstration, template: PromptTemplate, report: DatasetReport) -> list[_Reply]:
    """Locate the replies within a prompt; one that cannot be located is left out and counted."""
    prompt, context = record.prompt if isinstance(record.prompt, PromptInContext) else (record.prompt, [])
    if not record.train_on_all_replies or not isinstance(prompt, list):
        return []

    def in_context(turns: list[Message]) -> Prompt:
        return PromptInContext(turns, context) if context else turns

    conversation = template.render(in_context(prompt), record.fields, record.origin)
    replies = []
    for index, turn in enumerate(prompt):
        content = turn["content"].strip()
        if turn["role"] != "assistant" or not index or not content:
            continue
        try:
            reply_prompt = template.render(in_context(prompt[:index]), record.fields, record.origin)
        except UserError:
            reply_prompt = ""
        rest = conversation.removeprefix(reply_prompt)
        start = len(conversation) - len(rest.lstrip())
        end = start + len(content)
        if not reply_prompt or rest == conversation or conversation[start:end] != content:
            report.flag("an earlier reply is not trained on: the template changes its text", record.origin)
            continue
        following = conversation[end:].lstrip()
        if template.is_chat(prompt) and following.startswith(template.end_of_turn):
            end = len(conversation) - len(following) + len(template.end_of_turn) if template.end_of_turn else end
        replies.append(_Reply(number, reply_prompt, conversation[:start], conversation[:end]))
    return replies


def _common_prefix_length(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
