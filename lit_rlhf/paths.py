"""Paths as users write them, and files that are whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # suffix of a file or folder that is being written


def expand_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced; one of an unknown home stays as it is, for which `Path.expanduser` raises."""
    return Path(os.path.expanduser(path))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file to write, which becomes `path` when the block ends; none is left after an error or an interrupt.

    Its name is hidden and its own, so that two processes may write the same file.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
