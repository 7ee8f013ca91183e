"""What tells records apart: their prompt, their whole content, a column; and an order that no file decides."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any, TypeVar

from lit_rlhf.data.records import Demonstration, PromptRow, Ranking
from lit_rlhf.errors import UserError

Rec = TypeVar("Rec", Demonstration, Ranking, PromptRow)


def prompt_key(record: Demonstration | Ranking | PromptRow) -> str:
    """The prompt of a record, as something that can be compared."""
    return repr(record.prompt)


def hashed(key: Hashable, seed: int) -> bytes:
    """What keys are put in order by: a shuffle that depends on the seed and on nothing around a key."""
    return hashlib.blake2b(f"{seed} {key!r}".encode()).digest()


def content_hash(record: Demonstration | Ranking | PromptRow, seed: int) -> bytes:
    """The same for everything that a record says; where it stood plays no part."""
    if isinstance(record, Demonstration):
        return hashed((record.prompt, record.completion), seed)
    if isinstance(record, Ranking):
        return hashed((record.prompt, record.completions, record.ranks, record.labeler), seed)
    return hashed((record.prompt, record.fields), seed)


def column(record: Demonstration | Ranking | PromptRow, name: str, setting: str) -> Any:
    """A column of the record's row.

    Raises:
        UserError: The row has no such column; it, the setting and the columns seen are named.
    """
    if name not in record.fields:
        seen = ", ".join(repr(each) for each in record.fields)
        raise UserError(f"{record.origin}: no column {name!r}, which {setting} names; the row has {seen}")
    return record.fields[name]
