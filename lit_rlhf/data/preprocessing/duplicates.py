"""Step 1: prompts that share a long common prefix are duplicates (§3.2)."""

from __future__ import annotations

from lit_rlhf.data.preprocessing.keys import RecordT, hash_content
from lit_rlhf.data.records import Ranking, to_plain_text
from lit_rlhf.data.report import DatasetReport


def drop_duplicates(records: list[RecordT], prefix_chars: int, seed: int, report: DatasetReport) -> list[RecordT]:
    """Keep one of all records whose prompts have the same first characters, or are equal if they are shorter.

    Rankings of one prompt by two labelers are no duplicates.

    Args:
        records: The records.
        prefix_chars: Length of the prefix in characters. The paper does not state its own.
        seed: Decides, with the content, which record is kept.
        report: Counts the others.
    """
    reason = f"prompt shares its first {prefix_chars} characters with another"
    report.register_skip_reason(reason)
    kept: dict[tuple[str, str | None], tuple[bytes, int]] = {}  # prefix and labeler -> hash and index of the record
    for index, record in enumerate(records):
        labeler = record.labeler if isinstance(record, Ranking) else None
        key = to_plain_text(record.prompt)[:prefix_chars], labeler
        kept[key] = min(kept.get(key, (b"\xff" * 65, 0)), (hash_content(record, seed), index))
    kept_indices = {index for _, index in kept.values()}
    for index, record in enumerate(records):
        if index not in kept_indices:
            report.skip(reason, record.origin)
    return [record for index, record in enumerate(records) if index in kept_indices]
