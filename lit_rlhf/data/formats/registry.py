"""Row formats: which columns mean what. A row becomes a record: a demonstration, a ranking, a prompt or a text.

Some rows become several records: a tree of conversations, an instruction with its instances, a list that a user's
function returns.

A format is detected by the columns of the first row, chosen by name (`format: alpaca`), or is the user's own function,
given by its dotted path (`format: my_file.my_function`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

from lit_rlhf.data.formats import hh_dialogues, oasst_trees, row_readers
from lit_rlhf.data.formats.record_validation import check_record
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking, Record, TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Fields, Row, Rows, check_value
from lit_rlhf.errors import UserError
from lit_rlhf.importing import Function, function_name, import_function
from lit_rlhf.suggestions import did_you_mean

Kind = Literal["demonstration", "ranking", "prompt", "text"]
T = TypeVar("T", bound=Record)

_RECORD_TYPES: dict[Kind, type[Record]] = {
    "demonstration": Demonstration,
    "ranking": Ranking,
    "prompt": PromptRow,
    "text": TextRow,
}


class Format(NamedTuple):
    """A set of columns, and how to read a record from them."""

    name: str
    columns: tuple[str, ...]  # a row that has all of these columns is detected as this format
    read: row_readers.Reader  # returns None for a row that it skips and counts in the report
    matches: Callable[[Fields], bool] = lambda fields: True  # a further condition for detection


def _columns_hold(kind: type, *names: str) -> Callable[[Fields], bool]:
    """Return a condition: these columns hold values of that type."""
    return lambda fields: all(isinstance(fields[name], kind) for name in names)


def _never_detected(fields: Fields) -> bool:
    """Return False: the format is used only when chosen by name."""
    return False


def _is_prompt(name: str) -> Callable[[Fields], bool]:
    """Return a condition: no other column is the prompt, or demonstrations are read from this one, and no rankings.

    So prompts are those that a model was fine-tuned on, also of rows that repeat theirs as text.
    """

    def matches(fields: Fields) -> bool:
        if not any(column in fields for column in ("prompt", "instruction", "question")):
            return True
        demonstration, ranking = matching_format(fields, "demonstration"), matching_format(fields, "ranking")
        trains_on_it = ranking is None and demonstration is not None and demonstration.name == name
        return trains_on_it and isinstance(fields[name], list)

    return matches


_TREE = ("message_tree_id", "prompt")
_PAIR = ("chosen", "rejected")

# In order of detection: the first format whose columns are all present and match.
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "demonstration": (
        Format("prompt_completion", ("prompt", "completion"), row_readers.make_demonstration_reader("completion")),
        Format("prompt_response", ("prompt", "response"), row_readers.make_demonstration_reader("response")),
        Format("alpaca", ("instruction", "output"), row_readers.make_demonstration_reader("output")),
        Format("instruction_response", ("instruction", "response"), row_readers.make_demonstration_reader("response")),
        Format(
            "instruction_instances",
            ("instruction", "instances"),
            row_readers.make_instances_reader(row_readers.make_demonstration_reader("output")),
        ),
        Format("question_answer", ("question", "answer"), row_readers.make_demonstration_reader("answer")),
        Format("messages", ("messages",), row_readers.make_conversation_reader("messages")),
        Format("conversations", ("conversations",), row_readers.make_conversation_reader("conversations")),
        Format("conversation_tree", _TREE, oasst_trees.read_demonstrations, _columns_hold(dict, "prompt")),
    ),
    "ranking": (
        Format(
            "prompt_completions_ranks",
            ("prompt", "completions", "ranks"),
            row_readers.make_ranking_reader("completions"),
        ),
        Format(
            "instruction_completions_ranks",
            ("instruction", "completions", "ranks"),
            row_readers.make_ranking_reader("completions"),
        ),
        Format(
            "question_completions_ranks",
            ("question", "completions", "ranks"),
            row_readers.make_ranking_reader("completions"),
        ),
        Format(
            "context_responses_ranks", ("context", "responses", "ranks"), row_readers.make_ranking_reader("responses")
        ),
        Format("finegrained_qa", ("question", "preference", "prediction 1"), row_readers.read_pair_labels),
        Format("chosen_rejected_messages", _PAIR, hh_dialogues.read_message_list_pair, _columns_hold(list, *_PAIR)),
        Format("prompt_chosen_rejected", ("prompt", *_PAIR), row_readers.read_pair),
        Format("instruction_chosen_rejected", ("instruction", *_PAIR), row_readers.read_pair),
        Format("question_chosen_rejected", ("question", *_PAIR), row_readers.read_pair),
        Format("chosen_rejected", _PAIR, hh_dialogues.read_pair),
        Format("chosen_rejected_chat", _PAIR, hh_dialogues.read_pair_as_messages, _never_detected),
        Format("conversation_tree", _TREE, oasst_trees.read_rankings, _columns_hold(dict, "prompt")),
    ),
    "prompt": (
        Format("conversation_tree", _TREE, oasst_trees.read_prompts, _columns_hold(dict, "prompt")),
        Format("chosen_rejected_messages", _PAIR, hh_dialogues.read_message_list_prompt, _columns_hold(list, *_PAIR)),
        Format(
            "messages", ("messages",), row_readers.make_conversation_prompt_reader("messages"), _is_prompt("messages")
        ),
        Format(
            "conversations",
            ("conversations",),
            row_readers.make_conversation_prompt_reader("conversations"),
            _is_prompt("conversations"),
        ),
        Format("prompt", ("prompt",), row_readers.read_prompt),
        Format(
            "instruction_instances",
            ("instruction", "instances"),
            row_readers.make_instances_reader(row_readers.read_prompt),
        ),
        Format("instruction", ("instruction",), row_readers.read_prompt),
        Format("question", ("question",), row_readers.read_prompt),
        Format("context", ("context",), row_readers.read_prompt),
        Format("chosen_rejected", _PAIR, hh_dialogues.read_prompt),
        Format("chosen_rejected_chat", _PAIR, hh_dialogues.read_prompt_as_messages, _never_detected),
        Format("text", ("text",), row_readers.read_prompt),
    ),
    "text": (Format("text", ("text",), row_readers.read_text),),
}


def read_records(
    rows: Rows, kind: Kind, record_type: type[T], format: str | Function, report: DatasetReport
) -> list[T]:
    """Convert rows to records; skipped rows are counted in `report`, with the reason.

    Args:
        rows: The dataset.
        kind: The kind of record to read.
        record_type: The record class of that kind.
        format: "auto" (by the first row's columns), a format's name, or a function or its dotted path: it takes a
            row's columns as a dict and returns a record of `lit_rlhf.data.records`, a dict with the columns of a known
            format, a list of either, or None to skip the row.
        report: Counts the rows.

    Raises:
        UserError: No format matches; a row lacks a column or holds the wrong type of value (the message names file
            and line); no record is left.
    """
    return list(stream_records(rows, kind, record_type, format, report))


def stream_records(
    rows: Iterable[Row], kind: Kind, record_type: type[T], format: str | Function, report: DatasetReport
) -> Iterator[T]:
    """Yield the records of `read_records` one at a time; `report` is complete after the last one."""
    assert _RECORD_TYPES[kind] is record_type, (kind, record_type)
    row_format = None
    for row in rows:
        row_format = row_format or find_format(format, kind, row)
        num_skipped = sum(report.skipped.values())
        records = _read_row(row_format, row, report)
        report.num_read += 1
        # a row without a record was skipped, once
        report.num_added += len(records) + sum(report.skipped.values()) - num_skipped - 1
        for record in records:
            assert isinstance(record, record_type)
            yield record
    report.raise_if_empty(kind)


def _read_row(row_format: Format, row: Row, report: DatasetReport) -> list[Any]:
    """Read the records of a row, each with what other columns say about its prompt."""
    records = _as_list(row_format.read(row, report))
    if not row_format.columns:  # a user's own function decides by itself
        return records
    return [
        record
        if isinstance(record, TextRow)
        else record._replace(prompt=row_readers.add_context(record.prompt, Row(record.fields, record.origin), report))
        for record in records
    ]


def find_format(format: str | Function, kind: Kind, first: Row) -> Format:
    """Return the format that the setting `format` names, or detect it by the first row's columns."""
    if format == "auto":
        return detect_format(first, kind)
    if not isinstance(format, str) or "." in format:
        return load_custom_format(format, kind)
    by_name = {each.name: each for each in FORMATS[kind]}
    if format not in by_name:
        hint = did_you_mean(format, by_name) or f"; known are {', '.join(by_name)}"
        raise UserError(
            f"format: no {kind} format is named {format!r}{hint}, or name a function of yours: my_file.my_function"
        )
    return by_name[format]


def matching_format(fields: Fields, kind: Kind) -> Format | None:
    """Return the first format of this kind whose columns are all in a row; None if there is none."""
    for each in FORMATS[kind]:
        if all(name in fields for name in each.columns) and each.matches(fields):
            return each
    return None


def detect_format(row: Row, kind: Kind) -> Format:
    """Return the first format of this kind whose columns are all in the row.

    Raises:
        UserError: There is none; names what the nearest lacks.
    """
    found = matching_format(row.fields, kind)
    if found is not None:
        return found
    nearest = max(FORMATS[kind], key=lambda each: sum(name in row.fields for name in each.columns) / len(each.columns))
    missing = [name for name in nearest.columns if name not in row.fields]
    if len(missing) < len(nearest.columns):
        raise UserError(
            f"{row.origin}: no column {_quoted(missing)} (format {nearest.name}); the row has {_quoted(row.fields)}"
        )
    known = "; ".join(" + ".join(each.columns) for each in FORMATS[kind])
    raise UserError(
        f"{row.origin}: the columns {_quoted(row.fields)} are of no known {kind} format ({known}); "
        f"rename them, or set format to your own function, my_file.my_function"
    )


def load_custom_format(given: str | Function, kind: Kind) -> Format:
    """Build a format from a user's function or its dotted path."""
    function, path = import_function(given, "format"), function_name(given)

    def read(row: Row, report: DatasetReport) -> list[Any]:
        try:
            value = function(dict(row.fields))
        except Exception as error:
            raise UserError(f"{row.origin}: {path} failed with {type(error).__name__}: {error}") from error
        values = value if isinstance(value, list) else [value]
        if value is None or not values:
            report.skip(f"by {path}", row.origin)
            return []
        return [record for each in values for record in _convert_custom(each, path, kind, row, report)]

    return Format(path, (), read)


def _convert_custom(value: Any, path: str, kind: Kind, row: Row, report: DatasetReport) -> list[Any]:
    if isinstance(value, _RECORD_TYPES[kind]):
        return _as_list(check_record(value, row, report))
    if isinstance(value, dict):
        check_value(value, row.origin)
        converted = Row(value, row.origin)
        records = _read_row(detect_format(converted, kind), converted, report)
        if kind == "text":  # a document has no columns
            return records
        return [record._replace(fields={**row.fields, **value}) for record in records]
    raise UserError(
        f"{row.origin}: {path} returned a {type(value).__name__}; it must return a "
        f"{_RECORD_TYPES[kind].__name__}, a dict with the columns of a known format, a list of these, or None"
    )


def _as_list(value: Record | list[Any] | None) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
