"""Locks on folders and files, so that two processes never write to one place; the system frees those of a dead one."""

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_rlhf.errors import UserError


def try_lock(descriptor: int) -> bool:
    """Lock an open file or folder without waiting; False while another process holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked_folder(folder: Path, setting: str) -> Iterator[None]:
    """Within the block, no other process that locks the folder writes to it.

    The folder itself is locked: that leaves no file in it, and deleting what it holds frees nothing. It is made where
    it is missing, and removed again if nothing was written.

    Args:
        folder: to write to.
        setting: that names it, for the message.

    Raises:
        UserError: another process holds it, or it is a file.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{setting}: {folder} is a file; name a folder") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _try_lock_folder(descriptor, f"{setting}: {folder}"):
            raise UserError(f"{setting}: another run is writing to {folder}; wait for its end, or name another folder")
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()
        os.close(descriptor)


def _try_lock_folder(descriptor: int, name: str) -> bool:
    try:
        return try_lock(descriptor)
    except OSError as problem:
        print(f"{name} cannot be locked ({problem.strerror}); start no second run in it", file=sys.stderr)
        return True
