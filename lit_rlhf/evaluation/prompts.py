"""Prompts of an evaluation, read as those of PPO."""

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import DataSource, read_rows, source_name
from lit_rlhf.importing import Function


def read_prompt_rows(path: DataSource, format: str | Function) -> tuple[list[PromptRow], list[str]]:
    """Return the prompts of a dataset, and notes on the rows that are skipped, changed or doubtful.

    Args:
        path: a file, a hub name, or rows in memory.
        format: of the rows, as `format` of the data modules.

    Raises:
        UserError: the data cannot be read, or no prompt is left.
    """
    report = DatasetReport(source_name(path))
    records = read_records(read_rows(path), "prompt", PromptRow, format, report)
    return records, report.format_notes()
