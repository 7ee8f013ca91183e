"""Files known by their content."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def hash_of_file(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, read as a stream (about a second a GB)."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def hash_of_files(files: Iterable[Path]) -> str:
    """Return one SHA-256 of names and contents, in the order given."""
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name} {hash_of_file(file)}\n".encode())
    return whole.hexdigest()
