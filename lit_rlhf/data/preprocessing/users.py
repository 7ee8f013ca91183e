"""Step 2: at most so many prompts of one user (§3.2: 200)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from lit_rlhf.data.preprocessing.keys import Rec, column, hashed, prompt_key
from lit_rlhf.data.report import DatasetReport


def cap_users(records: list[Rec], user_column: str, limit: int, seed: int, report: DatasetReport) -> list[Rec]:
    """Keep the records of at most `limit` distinct prompts of each user.

    A row without a user (null) is kept, and counted: labelers' own prompts have none.

    Args:
        records: The records.
        user_column: The column that says whose prompt it is.
        limit: Distinct prompts a user.
        seed: Decides, with the prompts, which ones are kept.
        report: Where the others are counted.
    """
    reason = f"more than {limit} prompts of one {user_column!r}"
    report.step(reason)
    prompts: dict[Any, set[str]] = defaultdict(set)
    users = [column(record, user_column, "preprocessing.user_column") for record in records]
    for user, record in zip(users, records):
        if user is None:
            report.note(f"without a {user_column!r}, not limited", record.origin)
        else:
            prompts[repr(user)].add(prompt_key(record))
    kept = {user: set(sorted(each, key=lambda key: hashed(key, seed))[:limit]) for user, each in prompts.items()}
    within = [user is None or prompt_key(record) in kept[repr(user)] for user, record in zip(users, records)]
    for fits, record in zip(within, records):
        if not fits:
            report.skip(reason, record.origin)
    return [record for fits, record in zip(within, records) if fits]
