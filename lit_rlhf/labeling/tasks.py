"""Tasks from data files: the rows of any format that the project reads, with their completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

from lit_rlhf.data.formats.record_validation import is_missing, is_rank
from lit_rlhf.data.formats.registry import matching_format, read_records
from lit_rlhf.data.records import CONTEXT_COLUMNS, Instruction, Message, Prompt, PromptRow, Ranking, to_messages
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Fields, Row, Rows, read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.human_labels import PREFERENCES, read_rating
from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS
from lit_rlhf.labeling.database import Kind, NewTask

MAX_COMPLETIONS = 9  # K of the paper is 4 to 9, and a digit is one key
# least and most completions of a row
COMPLETIONS: dict[Kind, tuple[int, int]] = {
    "rank": (2, MAX_COMPLETIONS),
    "compare": (2, 2),
    "rate": (1, MAX_COMPLETIONS),
    "demonstrate": (0, 0),
}

_LISTS = ("completions", "responses")
_PAIRS = (("first", "second"), ("chosen", "rejected"))
_SINGLE = ("answer", "completion", "response", "output")
_ANSWERS = (
    *("ranks", "preference", "both_bad", "none_acceptable", "overall", *METADATA_FIELDS),
    *("prompt_flags", "note", "labeler", "seconds", "shown"),
)
_PROMPTS = ("prompt", "instruction", "question")
_OTHER_PROMPTS = ("messages", "conversations", "context", "text", "message_tree_id")


class Content(TypedDict):
    """What a task is about."""

    fields: dict[str, Any]  # the row's columns apart from completions and answers, for the export
    prompt: list[Message]
    completions: list[str]  # K of a ranking, two of a comparison, one to rate, none for a demonstration
    models: NotRequired[list[str]]  # which model wrote each completion; never shown
    sensitive: NotRequired[str]  # the warning to show first


class TaskFile(NamedTuple):
    """The tasks of a file."""

    kind: Kind
    tasks: list[NewTask]
    notes: list[str]  # what of the file is not used


class StrictReport(DatasetReport):
    """A report that skips no row: people answered all of them."""

    def skip(self, reason: str, origin: str) -> None:
        """Refuse the row."""
        raise UserError(f"{origin}: {reason}: it makes no task; fix or remove the row")


def read_tasks(path: str, kind: Kind | None = None, format: str = "auto", gold: bool = False) -> TaskFile:
    """Read the tasks of a file. Rows with an empty prompt or completion are left out and counted, as in training.

    Args:
        path: Any data file or hub dataset of the project: prompts, completions, rankings, the comparisons that the
            preference suite writes.
        kind: What to ask; by default what the first row's columns suggest.
        format: Of the rows.
        gold: Whether the rows hold the known answers.

    Raises:
        UserError: A row has no prompt, or no or too many completions, or the id of another row; names file and row. Or
            no row is left.
    """
    rows = read_rows(path)
    kind = kind or guess_kind(rows[0])
    report = DatasetReport(path)
    if gold and kind == "demonstrate":
        raise UserError("--gold: a demonstration has no known answer; use --gold with rank, rate or compare")
    records = _read_prompts(rows, kind, format, report)
    tasks: list[NewTask] = []
    has_ids = "id" in rows[0].fields
    for record in records:
        if kind != "demonstrate" and has_empty_completion(record.completions):
            report.skip("empty completion", record.origin)
        else:
            tasks += make_tasks(kind, record, has_ids, gold)
    report.raise_if_empty("task")
    tasks, notes = drop_repeated_tasks(tasks, has_ids)
    if not gold:
        ignored = [name for name in _ANSWERS if any(row.fields.get(name) is not None for row in rows)]
        notes += [f"the column {name!r} is not shown and not exported" for name in ignored]
    return TaskFile(kind, tasks, notes + row_notes(report))


def row_notes(report: DatasetReport) -> list[str]:
    """Return a line for each reason for which rows were left out, or counted as doubtful."""
    left_out = [(count, f" left out: {report.annotate(reason)}") for reason, count in report.skipped.items()]
    flagged = [(count, f": {reason}") for reason, count in report.flagged.items()]
    return [f"{count:,} of {report.num_read:,} rows{what}" for count, what in left_out + flagged]


class PromptWithCompletions(NamedTuple):
    """One row: its prompt, and what is to be rated or ranked."""

    prompt: Prompt
    completions: list[Any] | None
    fields: Fields
    origin: str


def _read_prompts(rows: Rows, kind: Kind, format: str, report: DatasetReport) -> list[PromptWithCompletions]:
    if kind == "demonstrate" or find_completions(rows[0].fields, kind) is not None:
        prompts = read_records(rows, "prompt", PromptRow, format, report)
        return [
            PromptWithCompletions(each.prompt, find_completions(each.fields, kind), each.fields, each.origin)
            for each in prompts
        ]
    # completions that only a format of rankings finds: in a tree, or at the end of a conversation
    if format == "auto" and matching_format(rows[0].fields, "ranking") is None:
        raise no_completions(kind, rows[0].origin)
    rankings = read_records(rows, "ranking", Ranking, format, report)
    return [PromptWithCompletions(each.prompt, each.completions, each.fields, each.origin) for each in rankings]


def guess_kind(row: Row) -> Kind:
    """Return what to ask about rows like this one.

    Raises:
        UserError: The completions are no list.
    """
    fields = row.fields
    for name in _LISTS:
        if not isinstance(fields.get(name), list) and not is_missing(fields.get(name)):
            found = type(fields[name]).__name__
            raise UserError(f"{row.origin}: column {name!r} must be a list of texts, it is a {found}")
    completions = next((fields[name] for name in _LISTS if isinstance(fields.get(name), list)), None)
    if completions is not None:
        return "compare" if len(completions) == 2 else "rank"
    if any(all(name in fields for name in pair) for pair in _PAIRS):
        return "compare"
    if "message_tree_id" in fields:
        return "rank"
    return "rate" if "answer" in fields else "demonstrate"


def find_completions(fields: Fields, kind: Kind) -> list[Any] | None:
    """Return the completions in a row's columns; None if it has no such column."""
    for name in _LISTS:
        if isinstance(fields.get(name), list):
            return list(fields[name])
    for pair in _PAIRS:
        # dialogues, with the prompt in both of them: a format of rankings splits them
        is_split = "chosen" not in pair or any(name in fields for name in _PROMPTS)
        if is_split and all(isinstance(fields.get(name), str) for name in pair):
            return [fields[name] for name in pair]
    for name in _SINGLE if kind == "rate" else ():
        if name in fields:
            return [fields[name]]
    return None


def has_empty_completion(completions: list[Any] | None) -> bool:
    """Return whether one of the completions is empty or whitespace."""
    return any(isinstance(each, str) and not each.strip() for each in completions or ())


def no_completions(kind: Kind, origin: str) -> UserError:
    """Build the error for a row without completions."""
    pairs = [f"{first!r} and {second!r}" for first, second in _PAIRS] if kind == "compare" else []
    others = "".join(f", or {each}" for each in [*pairs, *(map(repr, _SINGLE) if kind == "rate" else ())])
    return UserError(
        f"{origin}: no completions to {kind}: a row needs the column 'completions', a list of texts{others}"
    )


def make_tasks(kind: Kind, record: PromptWithCompletions, has_ids: bool, gold: bool) -> list[NewTask]:
    """Return the task of a row; to rate K completions is K tasks."""
    origin, fields = record.origin, record.fields
    kept = keep_columns(fields, record.prompt)
    content = build_content(kind, to_messages(record.prompt), record.completions, kept, Row(fields, origin))
    key = make_key(fields, content, has_ids, origin)
    if kind != "rate":
        return [NewTask(key, dict(content), read_gold(kind, record) if gold else None, origin)]
    tasks = []
    for number, completion in enumerate(content["completions"]):
        own: Content = {**content, "completions": [completion]}
        if "models" in content:
            own["models"] = [content["models"][number]]
        own_key = key if len(content["completions"]) == 1 else f"{key}#{number + 1}"
        tasks.append(NewTask(own_key, dict(own), read_gold(kind, record) if gold else None, origin))
    return tasks


def build_content(kind: Kind, prompt: list[Message], completions: Any, kept: dict[str, Any], row: Row) -> Content:
    """Return what a task is about.

    Args:
        kind: Of the task.
        prompt: As turns.
        completions: The texts; not used for a demonstration.
        kept: Columns for the export.
        row: Has the optional columns "models" and "sensitive".

    Raises:
        UserError: The completions are not those of such a task, or an optional column holds something else.
    """
    texts = [] if kind == "demonstrate" else check_completions(completions, kind, row.origin)
    content: Content = {"fields": kept, "prompt": prompt, "completions": texts}
    models: Any = row.fields.get("models")
    if texts and not is_missing(models):
        is_list = isinstance(models, list) and all(isinstance(each, str) for each in models)
        if not is_list or len(models) != len(texts):
            raise UserError(
                f"{row.origin}: column 'models' must name the model of each completion, in a list of {len(texts)} texts"
            )
        content["models"] = models
    warning = _read_warning(row)
    return {**content, "sensitive": warning} if warning else content


def _read_warning(row: Row) -> str | None:
    value = row.fields.get("sensitive")
    if is_missing(value) or value is False:
        return None
    if not isinstance(value, str) and value is not True:
        raise UserError(f"{row.origin}: column 'sensitive' must be true, false or a warning as text, it is {value!r}")
    text = "true" if value is True else value.strip()
    if text.lower() in ("", "false", "no", "0"):  # as CSV writes them
        return None
    return "sensitive content" if text.lower() in ("true", "yes", "1") else text


def check_completions(completions: Any, kind: Kind, origin: str) -> list[str]:
    """Return the completions of a task of that kind.

    Raises:
        UserError: There are too few or too many, one is no text, or one is empty.
    """
    if not isinstance(completions, list) or not completions:
        raise no_completions(kind, origin)
    if not all(isinstance(each, str) for each in completions):
        raise UserError(f"{origin}: the completions must be texts, not {[type(each).__name__ for each in completions]}")
    least, most = COMPLETIONS[kind]
    if not least <= len(completions) <= most:
        expected = str(least) if least == most else f"{least} to {most}"
        raise UserError(f"{origin}: {len(completions)} completions; to {kind} takes {expected}")
    empty = next((number for number, text in enumerate(completions, 1) if not text.strip()), None)
    if empty is not None:
        raise UserError(f"{origin}: completion {empty} is empty; remove it")
    return completions


def keep_columns(fields: Fields, prompt: Prompt) -> dict[str, Any]:
    """Return a row's columns for the export: the prompt in columns that the formats of the project read, and the rest.

    Completions, answers and models are left out: the export writes its own.
    """
    left_out = {*_LISTS, *(name for pair in _PAIRS for name in pair), *_SINGLE, *_ANSWERS, "models"}
    kept = {name: None if is_missing(value) else value for name, value in fields.items() if name not in left_out}
    if not any(name in fields for name in _PROMPTS) or isinstance(fields.get("prompt"), dict):
        of_prompt = (*_OTHER_PROMPTS, *CONTEXT_COLUMNS, "prompt")
        kept = {name: value for name, value in kept.items() if name not in of_prompt}
        kept |= prompt_columns(prompt)
    kept_json: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return kept_json


def prompt_columns(prompt: Prompt) -> dict[str, Any]:
    """Return the columns that hold a prompt."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Instruction):
        return {"instruction": prompt.instruction} | ({"input": prompt.input} if prompt.input else {})
    return {"prompt": to_messages(prompt)}


def make_key(fields: Fields, content: Content, has_ids: bool, origin: str) -> str:
    """Return a task's key: the row's "id", or a hash of its content where the rows have none.

    Raises:
        UserError: The rows have ids, and this one has not.
    """
    if not has_ids:
        return hash_content(content)
    value = fields.get("id")
    if not is_name(value):
        raise UserError(f"{origin}: the id is {value!r}; the first row has one, so each row needs a text or a number")
    return str(value)


def is_name(value: Any) -> bool:
    """Return whether a value names something: a text that is not empty, or a whole number."""
    return isinstance(value, str | int) and not isinstance(value, bool) and bool(str(value).strip())


def hash_content(content: Content) -> str:
    """Return the key of a task whose row has no id."""
    text = json.dumps([content["prompt"], content["completions"]], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def drop_repeated_tasks(tasks: Sequence[NewTask], has_ids: bool) -> tuple[list[NewTask], list[str]]:
    """Return the tasks once each, and notes on those left out.

    Raises:
        UserError: Two rows have one id.
    """
    by_key: dict[str, NewTask] = {}
    num_repeated = num_identical = 0
    for task in tasks:
        completions = task.content["completions"]
        if len(completions) > 1 and len({text.strip() for text in completions}) == 1:
            num_identical += 1
        elif task.key not in by_key:
            by_key[task.key] = task
        elif has_ids:
            raise UserError(
                f"{task.origin}: the id {task.key!r} is that of {by_key[task.key].origin}; change one of them"
            )
        else:
            num_repeated += 1
    notes = [f"{num_repeated:,} rows repeat an earlier one and are left out"] if num_repeated else []
    if num_identical:
        notes.append(f"{num_identical:,} rows have identical completions and are left out")
    if not by_key:
        raise UserError(f"no task is left: {'; '.join(notes)}")
    return list(by_key.values()), notes


def read_gold(kind: Kind, record: PromptWithCompletions) -> dict[str, Any]:
    """Return the known answer of a row.

    Raises:
        UserError: The row has none.
    """
    fields, origin = record.fields, record.origin
    if kind == "rank":
        return {"ranks": read_ranks(fields.get("ranks"), len(record.completions or ()), origin)}
    if kind == "compare":
        preference = fields.get("preference")
        if "chosen" in fields and preference is None:
            preference = "first"
        if preference not in list(PREFERENCES):
            raise UserError(f"{origin}: preference is {preference!r}; a known answer is first, second or tie")
        return {"preference": preference}
    rating = read_rating(Row(fields, origin), "gold")
    if rating.overall is None:
        raise UserError(f"{origin}: a known answer needs the column 'overall', a whole number from 1 to 7")
    return {"overall": rating.overall, "flags": rating.flags}


def read_ranks(ranks: Any, count: int, origin: str) -> list[int]:
    """Return the ranks of `count` completions as bins.

    Raises:
        UserError: They are not that many numbers.
    """
    if not isinstance(ranks, list) or len(ranks) != count or not all(map(is_rank, ranks)):
        raise UserError(f"{origin}: the ranks must be {count} numbers, lowest = best; they are {ranks!r}")
    return dense_bins(ranks)


def dense_bins(ranks: Sequence[float]) -> list[int]:
    """Return ranks as bins 1, 2, …; equal ranks share a bin."""
    bins = {rank: number for number, rank in enumerate(sorted(set(ranks)), start=1)}
    return [bins[rank] for rank in ranks]
