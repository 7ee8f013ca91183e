"""Step 3: a validation part that shares nothing with the training part (§3.2: split by user)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from lit_rlhf.data.preprocessing.keys import Rec, column, hashed, prompt_key
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError

R = TypeVar("R")


def split(
    records: list[R], key: Callable[[R], Hashable], fraction: float, seed: int, report: DatasetReport
) -> tuple[list[R], list[R]]:
    """Records for training and for validation, none of whose keys are on both sides.

    Args:
        records: The records.
        key: What stays together: a prompt, a document.
        fraction: Share of the distinct keys held out.
        seed: Decides, with the keys, which.
        report: Names the data.

    Raises:
        UserError: Nothing would be left on one side.
    """
    hashes = [hashed(key(record), seed) for record in records]
    held_out = hold_out_hashes(hashes, fraction, report.source)
    training = [record for record, each in zip(records, hashes) if each not in held_out]
    return training, [record for record, each in zip(records, hashes) if each in held_out]


def split_by_column(
    records: list[Rec], name: str, fraction: float, seed: int, report: DatasetReport
) -> tuple[list[Rec], list[Rec]]:
    """The same by the values of a column, such as the user, the tree or the question.

    A prompt that stands under values on both sides stays in the validation part alone.

    Raises:
        UserError: A row has no such column, or nothing would be left on one side.
    """
    setting = "preprocessing.split_by"
    values = [repr(column(record, name, setting)) for record in records]
    held_out = hold_out(values, fraction, seed)
    count = len(set(values))
    if not 0 < len(held_out) < count:
        mend = "it cannot be split by that column" if count == 1 else f"validation_fraction {fraction} leaves no side"
        raise UserError(f"{setting}: column {name!r} has {count} value{'s' * (count > 1)} in {report.source!r}; {mend}")
    validation = [record for record, value in zip(records, values) if value in held_out]
    training = [record for record, value in zip(records, values) if value not in held_out]
    return drop_seen(training, validation, report), validation


def drop_seen(training: list[Rec], validation: list[Rec], report: DatasetReport) -> list[Rec]:
    """The training records whose prompt is in no validation record."""
    reason = "prompt is also held out for validation"
    report.step(reason)
    seen = {prompt_key(record) for record in validation}
    for record in training:
        if prompt_key(record) in seen:
            report.skip(reason, record.origin)
    return [record for record in training if prompt_key(record) not in seen]


def hold_out(keys: Sequence[Hashable], fraction: float, seed: int) -> set[Hashable]:
    """The share of distinct keys that is held out: those whose hash with the seed is lowest.

    A key is held out whatever the order of the rows is, and no key is on both sides.
    """
    distinct = set(keys)
    ordered = sorted(distinct, key=lambda key: hashed(key, seed))
    return set(ordered[: round(fraction * len(distinct))])


def hold_out_hashes(hashes: Iterable[bytes], fraction: float, source: str) -> set[bytes]:
    """The same of keys that are known by their hash alone, because they are too many to be kept.

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
