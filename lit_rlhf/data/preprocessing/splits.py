"""Step 3: a validation split that shares nothing with the training split (§3.2: split by user)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from lit_rlhf.data.formats.record_validation import is_blank
from lit_rlhf.data.preprocessing.keys import RecordT, get_column, hash_key, prompt_key
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError

R = TypeVar("R")


def split_by_key(
    records: list[R], key: Callable[[R], Hashable], fraction: float, seed: int, report: DatasetReport
) -> tuple[list[R], list[R]]:
    """Split records into training and validation; no key is on both sides.

    Args:
        records: The records.
        key: Returns what must not be split: a prompt, a document.
        fraction: Fraction of the distinct keys held out.
        seed: Decides, with the keys, which ones.
        report: Names the data in error messages.

    Raises:
        UserError: Nothing would be left on one side.
    """
    hashes = [hash_key(key(record), seed) for record in records]
    held_out = hold_out_hashes(hashes, fraction, report.source)
    training = [record for record, each in zip(records, hashes) if each not in held_out]
    return training, [record for record, each in zip(records, hashes) if each in held_out]


def split_by_column(
    records: list[RecordT], name: str, fraction: float, seed: int, report: DatasetReport
) -> tuple[list[RecordT], list[RecordT]]:
    """Split records by the values of a column, such as the user, the tree or the question.

    A row without a value (null, NaN or blank) is split by its prompt, and counted. A prompt that has values on both
    sides stays in the validation split only.

    Raises:
        UserError: A row has no such column, or nothing would be left on one side.
    """
    setting = "preprocessing.split_by"
    values: list[Hashable] = []
    for record in records:
        value = get_column(record, name, setting)
        if is_blank(value):
            report.flag(f"without a {name!r}, split by prompt", record.origin)
        values.append(("prompt", prompt_key(record)) if is_blank(value) else repr(value))
    held_out = hold_out(values, fraction, seed)
    count = len(set(values))
    if not 0 < len(held_out) < count:
        hint = "it cannot be split by that column" if count == 1 else f"validation_fraction {fraction} leaves no side"
        raise UserError(f"{setting}: column {name!r} has {count} value{'s' * (count > 1)} in {report.source!r}; {hint}")
    validation = [record for record, value in zip(records, values) if value in held_out]
    training = [record for record, value in zip(records, values) if value not in held_out]
    return drop_validation_prompts(training, validation, report), validation


def drop_validation_prompts(training: list[RecordT], validation: list[RecordT], report: DatasetReport) -> list[RecordT]:
    """Return the training records whose prompt is in no validation record."""
    reason = "prompt is also held out for validation"
    report.register_skip_reason(reason)
    validation_prompts = {prompt_key(record) for record in validation}
    for record in training:
        if prompt_key(record) in validation_prompts:
            report.skip(reason, record.origin)
    return [record for record in training if prompt_key(record) not in validation_prompts]


def hold_out(keys: Sequence[Hashable], fraction: float, seed: int) -> set[Hashable]:
    """Return the fraction of distinct keys that is held out: those with the lowest hashes.

    Which keys are held out does not depend on the order of the rows, and no key is on both sides.
    """
    distinct = set(keys)
    ordered = sorted(distinct, key=lambda key: hash_key(key, seed))
    return set(ordered[: round(fraction * len(distinct))])


def hold_out_hashes(hashes: Iterable[bytes], fraction: float, source: str) -> set[bytes]:
    """Return the held-out fraction of keys that are known by their hash alone, being too large to keep in memory.

    Raises:
        UserError: Nothing would be left on one side; `source` names the data.
    """
    distinct = set(hashes)
    held_out = set(sorted(distinct)[: round(fraction * len(distinct))])
    if not 0 < len(held_out) < len(distinct):
        raise UserError(
            f"validation_fraction: {fraction} of {len(distinct)} distinct prompts or documents in "
            f"{source!r} leaves none for training or none for validation"
        )
    return held_out
