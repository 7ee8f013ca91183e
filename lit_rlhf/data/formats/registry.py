"""Row formats: which columns mean what. A row becomes a record: a demonstration, a ranking, a prompt or a text.

Some rows become several: a tree of conversations, an instruction with its instances, whatever a user's function makes.

A format is recognised by the columns of the first row, named by its setting (`format: alpaca`), or is the user's own
function, named by its dotted path (`format: my_file.my_function`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from lit_rlhf.data.formats import hh_dialogues, oasst_trees, row_readers
from lit_rlhf.data.formats.record_validation import check_record
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking, Record, TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Fields, Row, Rows
from lit_rlhf.errors import UserError

Kind = Literal["demonstration", "ranking", "prompt", "text"]
T = TypeVar("T", bound=Record)

_RECORDS: dict[Kind, type[Record]] = {
    "demonstration": Demonstration,
    "ranking": Ranking,
    "prompt": PromptRow,
    "text": TextRow,
}


class Format(NamedTuple):
    """One way to lay a record out in columns."""

    name: str
    fields: tuple[str, ...]  # a row with all of these columns is taken to be of this format
    read: row_readers.Reader  # None: skipped, and counted in the report
    fits: Callable[[Fields], bool] = lambda fields: True  # what must hold of the columns besides


def _holds(kind: type, *names: str) -> Callable[[Fields], bool]:
    """Whether these columns hold a value of that kind."""
    return lambda fields: all(isinstance(fields[name], kind) for name in names)


def _named_only(fields: Fields) -> bool:
    """Never: a format that another one is preferred to, unless it is asked for."""
    return False


_TREE = ("message_tree_id", "prompt")
_PAIR = ("chosen", "rejected")

# The order is the order of recognition: the first format whose columns are all there and fit.
FORMATS: dict[Kind, tuple[Format, ...]] = {
    "demonstration": (
        Format("prompt_completion", ("prompt", "completion"), row_readers.demonstration("completion")),
        Format("prompt_response", ("prompt", "response"), row_readers.demonstration("response")),
        Format("alpaca", ("instruction", "output"), row_readers.demonstration("output")),
        Format("instruction_response", ("instruction", "response"), row_readers.demonstration("response")),
        Format(
            "instruction_instances",
            ("instruction", "instances"),
            row_readers.instances(row_readers.demonstration("output")),
        ),
        Format("question_answer", ("question", "answer"), row_readers.demonstration("answer")),
        Format("messages", ("messages",), row_readers.conversation("messages")),
        Format("conversations", ("conversations",), row_readers.conversation("conversations")),
        Format("conversation_tree", _TREE, oasst_trees.demonstrations, _holds(dict, "prompt")),
    ),
    "ranking": (
        Format("prompt_completions_ranks", ("prompt", "completions", "ranks"), row_readers.ranking("completions")),
        Format("context_responses_ranks", ("context", "responses", "ranks"), row_readers.ranking("responses")),
        Format("finegrained_qa", ("question", "preference", "prediction 1"), row_readers.pair_labels),
        Format("chosen_rejected_messages", _PAIR, hh_dialogues.pair_of_lists, _holds(list, *_PAIR)),
        Format("prompt_chosen_rejected", ("prompt", *_PAIR), row_readers.pair),
        Format("instruction_chosen_rejected", ("instruction", *_PAIR), row_readers.pair),
        Format("question_chosen_rejected", ("question", *_PAIR), row_readers.pair),
        Format("chosen_rejected", _PAIR, hh_dialogues.pair),
        Format("chosen_rejected_chat", _PAIR, hh_dialogues.pair_of_messages, _named_only),
        Format("conversation_tree", _TREE, oasst_trees.rankings, _holds(dict, "prompt")),
    ),
    "prompt": (
        Format("conversation_tree", _TREE, oasst_trees.prompts, _holds(dict, "prompt")),
        Format("chosen_rejected_messages", _PAIR, hh_dialogues.prompt_of_lists, _holds(list, *_PAIR)),
        Format("prompt", ("prompt",), row_readers.prompt),
        Format("instruction_instances", ("instruction", "instances"), row_readers.instances(row_readers.prompt)),
        Format("instruction", ("instruction",), row_readers.prompt),
        Format("question", ("question",), row_readers.prompt),
        Format("messages", ("messages",), row_readers.prompt),
        Format("conversations", ("conversations",), row_readers.prompt),
        Format("context", ("context",), row_readers.prompt),
        Format("chosen_rejected", _PAIR, hh_dialogues.prompt),
        Format("chosen_rejected_chat", _PAIR, hh_dialogues.prompt_of_messages, _named_only),
        Format("text", ("text",), row_readers.prompt),
    ),
    "text": (Format("text", ("text",), row_readers.text),),
}


def read_records(rows: Rows, kind: Kind, record_type: type[T], format: str, report: DatasetReport) -> list[T]:
    """Turn rows into records; what is skipped is counted in `report`, with its reason.

    Args:
        rows: The dataset.
        kind: What the rows are to be.
        record_type: The record class of that kind.
        format: "auto" (by the first row's columns), a format's name, or the dotted path of a function that takes a
            row's columns as a dict and returns a record of `lit_rlhf.data.records`, a dict with the columns of a known
            format, a list of either, or None to skip the row.
        report: Where the counts go.

    Raises:
        UserError: No format fits; a row lacks a column or holds the wrong kind of value (file and line are named); no
            record is left.
    """
    return list(stream_records(rows, kind, record_type, format, report))


def stream_records(
    rows: Iterable[Row], kind: Kind, record_type: type[T], format: str, report: DatasetReport
) -> Iterator[T]:
    """The same, one at a time: `report` is complete when the last one was taken."""
    assert _RECORDS[kind] is record_type, (kind, record_type)
    chosen = None
    for row in rows:
        chosen = chosen or find_format(format, kind, row)
        skipped = sum(report.skipped.values())
        made = _as_list(chosen.read(row, report))
        report.read += 1
        # a row that is made into none was skipped, once
        report.added += len(made) + sum(report.skipped.values()) - skipped - 1
        for record in made:
            assert isinstance(record, record_type)
            yield record
    report.require_some(kind)


def find_format(format: str, kind: Kind, first: Row) -> Format:
    """The format of the setting `format`, or the one that the first row's columns show."""
    if format == "auto":
        return detect_format(first, kind)
    if "." in format:
        return own_format(format, kind)
    by_name = {each.name: each for each in FORMATS[kind]}
    if format not in by_name:
        near = get_close_matches(format, by_name, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(by_name)}"
        raise UserError(f"format: no {kind} format is named {format!r}; {mend} (or my_file.my_function for your own)")
    return by_name[format]


def detect_format(row: Row, kind: Kind) -> Format:
    """The first format of this kind whose columns are all in the row."""
    for each in FORMATS[kind]:
        if all(name in row.fields for name in each.fields) and each.fits(row.fields):
            return each
    nearest = max(FORMATS[kind], key=lambda each: sum(name in row.fields for name in each.fields) / len(each.fields))
    missing = [name for name in nearest.fields if name not in row.fields]
    if len(missing) < len(nearest.fields):
        raise UserError(
            f"{row.origin}: no column {_quoted(missing)} (format {nearest.name}); the row has {_quoted(row.fields)}"
        )
    known = "; ".join(" + ".join(each.fields) for each in FORMATS[kind])
    raise UserError(
        f"{row.origin}: the columns {_quoted(row.fields)} are of no known {kind} format ({known}); "
        f"rename them, or set format to your own function, my_file.my_function"
    )


def own_format(path: str, kind: Kind) -> Format:
    """A format from the dotted path of a user's function, importable from the working directory."""
    function = import_function(path, "format")

    def read(row: Row, report: DatasetReport) -> list[Any]:
        try:
            value = function(dict(row.fields))
        except Exception as error:
            raise UserError(f"{row.origin}: {path} failed with {type(error).__name__}: {error}") from error
        values = value if isinstance(value, list) else [value]
        if value is None or not values:
            report.skip(f"by {path}", row.origin)
            return []
        return [record for each in values for record in _own_records(each, path, kind, row, report)]

    return Format(path, (), read)


def _own_records(value: Any, path: str, kind: Kind, row: Row, report: DatasetReport) -> list[Any]:
    if isinstance(value, _RECORDS[kind]):
        return _as_list(check_record(value, row, report))
    if isinstance(value, dict):
        converted = Row(value, row.origin)
        records = _as_list(detect_format(converted, kind).read(converted, report))
        if kind == "text":  # a document has no columns
            return records
        return [record._replace(fields={**row.fields, **value}) for record in records]
    raise UserError(
        f"{row.origin}: {path} returned a {type(value).__name__}; it must return a "
        f"{_RECORDS[kind].__name__}, a dict with the columns of a known format, a list of these, or None"
    )


def _as_list(made: Record | list[Any] | None) -> list[Any]:
    return made if isinstance(made, list) else [] if made is None else [made]


def import_function(path: str, setting: str) -> Callable[..., Any]:
    """A user's own function by its dotted path, importable from the working directory.

    Raises:
        UserError: There is none; the setting is named.
    """
    module_name, _, name = path.rpartition(".")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting}: {path!r} cannot be imported from {here!r}: {error}") from error
    if not callable(function):
        raise UserError(f"{setting}: {path!r} is a {type(function).__name__}, not a function")
    return cast(Callable[..., Any], function)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"
