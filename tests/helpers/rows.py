"""Rows of a data file, converted to records without the file."""

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking, TextRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import Row

TYPES = {"demonstration": Demonstration, "ranking": Ranking, "prompt": PromptRow, "text": TextRow}


def convert(kind, *rows, format="auto"):
    """Return the records of rows, and the report."""
    report = DatasetReport("rows.jsonl")
    located = [Row(fields, f"rows.jsonl:{number}") for number, fields in enumerate(rows, start=1)]
    return read_records(located, kind, TYPES[kind], format, report), report


def user(text):
    """Return a user's message."""
    return {"role": "user", "content": text}


def assistant(text):
    """Return a reply."""
    return {"role": "assistant", "content": text}
