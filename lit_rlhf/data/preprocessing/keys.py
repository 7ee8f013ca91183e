"""Keys that identify records (their prompt, their content, a column), and a hash that orders keys at random."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any, TypeVar

from lit_rlhf.data.records import Demonstration, PromptRow, Ranking
from lit_rlhf.errors import UserError

RecordT = TypeVar("RecordT", Demonstration, Ranking, PromptRow)


def prompt_key(record: Demonstration | Ranking | PromptRow) -> str:
    """Return the prompt of a record as a hashable key."""
    return repr(record.prompt)


def hash_key(key: Hashable, seed: int) -> bytes:
    """Hash a key with the seed. Sorting by it is a shuffle that does not depend on the order of the rows."""
    return hashlib.blake2b(f"{seed} {key!r}".encode()).digest()


def hash_content(record: Demonstration | Ranking | PromptRow, seed: int) -> bytes:
    """Hash the content of a record with the seed; its position in the file plays no part."""
    if isinstance(record, Demonstration):
        return hash_key((record.prompt, record.completion), seed)
    if isinstance(record, Ranking):
        return hash_key((record.prompt, record.completions, record.ranks, record.labeler), seed)
    return hash_key((record.prompt, record.fields), seed)


def get_column(record: Demonstration | Ranking | PromptRow, name: str, setting: str) -> Any:
    """Return a column of the record's row.

    Raises:
        UserError: The row has no such column; the message names it, the setting and the row's columns.
    """
    if name not in record.fields:
        columns = ", ".join(repr(each) for each in record.fields)
        raise UserError(f"{record.origin}: no column {name!r}, which {setting} names; the row has {columns}")
    return record.fields[name]
