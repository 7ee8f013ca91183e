"""Hashes of file contents."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path


def hash_file(file: Path) -> str:
    """Compute the SHA-256 of a file's bytes, as a stream (about one second per GB)."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_files(files: Iterable[Path], hash_file: Callable[[Path], str] = hash_file) -> str:
    """Compute one SHA-256 of the names and contents of files, in the order given.

    Args:
        files: the files.
        hash_file: returns the SHA-256 of a file; a caller may cache it.
    """
    combined = hashlib.sha256()
    for file in files:
        combined.update(f"{file.name} {hash_file(file)}\n".encode())
    return combined.hexdigest()
