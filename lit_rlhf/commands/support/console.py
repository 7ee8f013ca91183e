"""How much a command prints, and how wide: the settings that log filters, progress bars and summaries share."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from textwrap import wrap
from typing import TextIO


class Verbosity(IntEnum):
    """How much a command prints besides its result."""

    STAGE = 0  # within another command, which prints one line about it: warnings and a bar
    NORMAL = 1
    VERBOSE = 2  # -v: all that the libraries say, and the full tables of what was read


_verbosity: ContextVar[Verbosity] = ContextVar("verbosity", default=Verbosity.NORMAL)


def get_verbosity() -> Verbosity:
    """Return how much the running command prints."""
    return _verbosity.get()


@contextmanager
def set_verbosity(verbosity: Verbosity) -> Iterator[None]:
    """Print that much within the block."""
    token = _verbosity.set(verbosity)
    try:
        yield
    finally:
        _verbosity.reset(token)


def take_verbose(args: list[str]) -> tuple[list[str], Verbosity]:
    """Return the arguments without `-v`, and how much to print: no setting has a value that begins with a dash."""
    rest = [arg for arg in args if arg != "-v"]
    return rest, Verbosity.VERBOSE if len(rest) < len(args) else get_verbosity()


def terminal_width(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream writes to; None for a file or a pipe, whose lines are whole."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def wrap_words(text: str, width: int | None) -> str:
    """Return a text with every line broken between words, and never within one; `width` None leaves it as it is."""
    if width is None:
        return text
    lines = text.splitlines()
    return "\n".join(
        part
        for line in lines
        for part in wrap(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]
    )


def fit_fields(fields: list[str], optional: list[int], width: int | None) -> str:
    """Join fields to one line; while it is too wide, leave out the next one of `optional`.

    Args:
        fields: in the order of the line.
        optional: indices of the fields that can be left out, the least important first.
        width: columns; None for any.
    """
    dropped: set[int] = set()
    for index in [*optional, None]:
        line = "  ".join(field for n, field in enumerate(fields) if n not in dropped and field)
        if width is None or len(line) <= width or index is None:
            break
        dropped.add(index)
    return line


def format_seconds(seconds: float) -> str:
    """9.84 -> "9.8 s", 127 -> "2:07", 3725 -> "1:02:05"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
