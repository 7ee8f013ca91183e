"""Step 5: K pairs of one task become K examples, each with the others as its context (App. A.1)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lit_rlhf.data.preprocessing.keys import column, content_hash
from lit_rlhf.data.records import Demonstration, Instruction, Message, Prompt, as_messages
from lit_rlhf.data.report import DatasetReport


def expand_few_shot(
    records: list[Demonstration], task_column: str, most: int | None, seed: int, report: DatasetReport
) -> list[Demonstration]:
    """Every demonstration with the other ones of its task before it; only its own completion is learnt.

    Text is joined with blank lines. Instructions and conversations become turns of one conversation, in which an
    instruction that the whole task shares is said once. A task's only demonstration stays as it is, and is counted.

    Args:
        records: The demonstrations.
        task_column: The column that says which task a demonstration is of.
        most: Pairs of one example, K; a task with more is dealt to several groups of like size. None: no limit.
        seed: Decides, with the content, which pairs are together.
        report: Where the counts go.
    """
    tasks: dict[Any, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        tasks[repr(column(record, task_column, "preprocessing.few_shot_by"))].append(place)
    expanded = list(records)
    for places in tasks.values():
        places.sort(key=lambda place: (content_hash(records[place], seed), place))
        groups = -(-len(places) // (most or len(places)))
        for group in (places[start::groups] for start in range(groups)):
            if len(group) == 1:
                report.note(
                    f"few-shot: the only pair of its {task_column!r}, without context", records[group[0]].origin
                )
                continue
            for place in group:
                others = [records[other] for other in group if other != place]
                expanded[place] = records[place]._replace(
                    prompt=in_context(others, records[place].prompt), all_replies=False
                )
    report.remark(f"few-shot: {len(records):,} pairs of {len(tasks):,} tasks by {task_column!r}")
    return expanded


def in_context(others: list[Demonstration], prompt: Prompt) -> Prompt:
    """A prompt behind other demonstrations of its task."""
    if isinstance(prompt, str) and all(isinstance(other.prompt, str) for other in others):
        return "\n\n".join([*(f"{other.prompt}{other.completion}" for other in others), prompt])
    said = {each.instruction for each in (*(other.prompt for other in others), prompt) if isinstance(each, Instruction)}
    turns: list[Message] = []
    for other in others:
        turns += _asked(other.prompt, said, first=not turns)
        turns.append({"role": "assistant", "content": other.completion})
    return turns + _asked(prompt, said, first=False)


def _asked(prompt: Prompt, instructions: set[str], first: bool) -> list[Message]:
    """The turns that ask; behind the first, an instruction that all share is left away where there is an input."""
    if isinstance(prompt, Instruction) and prompt.input and len(instructions) == 1 and not first:
        prompt = prompt.input
    return as_messages(prompt)
