"""Hashes of file contents."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def hash_file(file: Path) -> str:
    """Compute the SHA-256 of a file's bytes, as a stream (about one second per GB)."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_files(files: Iterable[Path]) -> str:
    """Compute one SHA-256 of the names and contents of files, in the order given."""
    combined = hashlib.sha256()
    for file in files:
        combined.update(f"{file.name} {hash_file(file)}\n".encode())
    return combined.hexdigest()
