"""Step 1: prompts that share a long common prefix are duplicates (§3.2)."""

from __future__ import annotations

from lit_rlhf.data.preprocessing.keys import Rec, content_hash
from lit_rlhf.data.records import Ranking, plain_text
from lit_rlhf.data.report import DatasetReport


def drop_duplicates(records: list[Rec], characters: int, seed: int, report: DatasetReport) -> list[Rec]:
    """Keep one of all records whose prompts begin with the same `characters`, or are equal where they are shorter.

    Two labelers' rankings of one prompt are no duplicates.

    Args:
        records: The records.
        characters: Length of the prefix. The paper does not give its own.
        seed: Decides, with the content, which one is kept.
        report: Where the others are counted.
    """
    reason = f"prompt shares its first {characters} characters with another"
    report.step(reason)
    kept: dict[tuple[str, str | None], tuple[bytes, int]] = {}
    for place, record in enumerate(records):
        labeler = record.labeler if isinstance(record, Ranking) else None
        key = plain_text(record.prompt)[:characters], labeler
        kept[key] = min(kept.get(key, (b"\xff" * 65, 0)), (content_hash(record, seed), place))
    places = {place for _, place in kept.values()}
    for place, record in enumerate(records):
        if place not in places:
            report.skip(reason, record.origin)
    return [record for place, record in enumerate(records) if place in places]
