"""Step 5: K pairs of one task become K few-shot examples, each with the others as context (App. A.1)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lit_rlhf.data.formats.record_validation import is_blank
from lit_rlhf.data.preprocessing.keys import get_column, hash_content
from lit_rlhf.data.records import Demonstration, Instruction, Message, Prompt, PromptInContext, to_messages
from lit_rlhf.data.report import DatasetReport


def expand_few_shot(
    records: list[Demonstration], task_column: str, max_pairs: int | None, seed: int, report: DatasetReport
) -> list[Demonstration]:
    """Put the other demonstrations of its task before each demonstration; only its own completion is a target.

    Text is joined with blank lines. Instructions and conversations become turns of one conversation, in which an
    instruction that is the same in all of them is given once. A task's only demonstration is kept as it is, and
    counted; so is one without a task (null, NaN or blank).

    Args:
        records: The demonstrations.
        task_column: The column with the task of a demonstration.
        max_pairs: Pairs per example, K; a larger task is split into groups of about equal size. None: no limit.
        seed: Decides, with the content, which pairs are in a group.
        report: Counts the rows.
    """
    tasks: dict[Any, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        task = get_column(record, task_column, "preprocessing.few_shot_by")
        if is_blank(task):
            report.flag(f"few-shot: without a {task_column!r}, and so without context", record.origin)
        else:
            tasks[repr(task)].append(index)
    expanded = list(records)
    for indices in tasks.values():
        indices.sort(key=lambda index: (hash_content(records[index], seed), index))
        num_groups = -(-len(indices) // (max_pairs or len(indices)))
        for group in (indices[start::num_groups] for start in range(num_groups)):
            if len(group) == 1:
                report.flag(
                    f"few-shot: the only pair of its {task_column!r}, without context", records[group[0]].origin
                )
                continue
            for index in group:
                others = [records[other] for other in group if other != index]
                expanded[index] = records[index]._replace(
                    prompt=prepend_examples(others, records[index].prompt), train_on_all_replies=False
                )
    num_pairs = sum(map(len, tasks.values()))
    report.add_line(f"few-shot: {num_pairs:,} pairs of {len(tasks):,} tasks by {task_column!r}")
    return expanded


def prepend_examples(others: list[Demonstration], prompt: Prompt) -> Prompt:
    """Put other demonstrations of its task before a prompt; a context that all of them share is given once."""
    if isinstance(prompt, PromptInContext):
        inner = [
            each._replace(prompt=each.prompt.prompt)
            if isinstance(each.prompt, PromptInContext) and each.prompt.context == prompt.context
            else each
            for each in others
        ]
        expanded = prepend_examples(inner, prompt.prompt)
        assert isinstance(expanded, list)
        return PromptInContext(expanded, prompt.context)
    if isinstance(prompt, str) and all(isinstance(other.prompt, str) for other in others):
        return "\n\n".join([*(f"{other.prompt}{other.completion}" for other in others), prompt])
    instructions = {
        each.instruction for each in (*(other.prompt for other in others), prompt) if isinstance(each, Instruction)
    }
    turns: list[Message] = []
    for other in others:
        turns += _prompt_turns(other.prompt, instructions, first=not turns)
        turns.append({"role": "assistant", "content": other.completion})
    return turns + _prompt_turns(prompt, instructions, first=False)


def _prompt_turns(prompt: Prompt, instructions: set[str], first: bool) -> list[Message]:
    """Return a prompt as turns; after the first, an instruction that all share is left out if there is an input."""
    if isinstance(prompt, Instruction) and prompt.input and len(instructions) == 1 and not first:
        prompt = prompt.input
    return to_messages(prompt)
