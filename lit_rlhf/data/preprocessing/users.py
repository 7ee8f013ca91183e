"""Step 2: a limit on the number of prompts per user (§3.2: 200)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lit_rlhf.data.formats.record_validation import is_blank
from lit_rlhf.data.preprocessing.keys import RecordT, get_column, hash_key, prompt_key
from lit_rlhf.data.report import DatasetReport


def cap_prompts_per_user(
    records: list[RecordT], user_column: str, limit: int, seed: int, report: DatasetReport
) -> list[RecordT]:
    """Keep the records of at most `limit` distinct prompts of each user.

    A row without a user (null, NaN or blank) is kept, and counted: the labelers' own prompts have none.

    Args:
        records: The records.
        user_column: The column with the user of a prompt.
        limit: Distinct prompts per user.
        seed: Decides, with the prompts, which ones are kept.
        report: Counts the others.
    """
    reason = f"more than {limit} prompts of one {user_column!r}"
    report.register_skip_reason(reason)
    prompts: dict[Any, set[str]] = defaultdict(set)
    users = [get_column(record, user_column, "preprocessing.user_column") for record in records]
    for user, record in zip(users, records):
        if is_blank(user):
            report.flag(f"without a {user_column!r}, not limited", record.origin)
        else:
            prompts[repr(user)].add(prompt_key(record))
    kept = {user: set(sorted(each, key=lambda key: hash_key(key, seed))[:limit]) for user, each in prompts.items()}
    is_kept = [is_blank(user) or prompt_key(record) in kept[repr(user)] for user, record in zip(users, records)]
    for keep, record in zip(is_kept, records):
        if not keep:
            report.skip(reason, record.origin)
    return [record for keep, record in zip(is_kept, records) if keep]
