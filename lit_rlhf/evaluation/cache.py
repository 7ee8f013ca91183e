"""Row-by-row cache of computed results, so that an interrupted evaluation resumes where it stopped.

A file holds the rows of one computation. Its name is the hash of everything that the rows depend on (model weights,
inputs, settings): a change of any of them is a new computation.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_file

CACHE_FORMAT = 2  # increase it when the meaning of stored rows changes
FLUSH_SECONDS = 2.0

ComputeRows = Callable[[list[int]], Iterator[tuple[int, Any]]]


class Cache:
    """Computed rows in a folder of JSON lines.

    Args:
        folder: created if it is missing. None disables the cache: every row is computed.
        progress: whether to show a progress bar over the rows that are computed.
    """

    def __init__(self, folder: Path | None, progress: bool = True) -> None:
        self.folder, self.progress = folder, progress
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"out: cannot make the folder {folder}: {problem.strerror}") from None

    def get_or_compute_rows(self, label: str, key: Any, count: int, compute: ComputeRows) -> list[Any]:
        """Return the rows of a computation; only those that are missing are computed.

        Args:
            label: for the progress bar.
            key: everything that the rows depend on, JSON-serializable.
            count: number of rows.
            compute: takes the indices of the missing rows and yields (index, row) in any order. A row of None failed:
                it is not stored, and is computed again the next time.

        Returns:
            The rows in order, after a JSON round trip: tuples become lists, half of a surrogate pair becomes "?".
        """
        path = Path(os.devnull) if self.folder is None else self.folder / f"{hash_json(key)}.jsonl"
        rows = read_cached_rows(path)
        missing = [index for index in range(count) if index not in rows]
        if missing:
            bar = tqdm(
                total=count,
                initial=count - len(missing),
                desc=label,
                unit="row",
                leave=False,
                disable=None if self.progress else True,  # None: only on a terminal
            )
            with path.open("a", encoding="utf-8") as file, bar:
                flushed = time.monotonic()
                for index, row in compute(missing):
                    bar.update()
                    if row is None or index in rows:  # a batch may contain rows that are cached already
                        continue
                    # half of a surrogate pair, which a service's JSON may hold, is no character of a file or page
                    line = json.dumps([index, row], ensure_ascii=False).encode(errors="replace").decode()
                    rows[index] = json.loads(line)[1]
                    file.write(line + "\n")
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        file.flush()
                        flushed = time.monotonic()
        return [rows.get(index) for index in range(count)]

    def get_or_compute(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return one value; compute it if it is missing."""
        return self.get_or_compute_rows("", {"value": key}, 1, lambda _: iter([(0, compute())]))[0]

    def hash_file(self, file: Path) -> str:
        """Return a file's SHA-256, cached by path, size and modification time: weights take a second per gigabyte."""
        stat = file.stat()
        key = {"file": str(file.resolve()), "size": stat.st_size, "changed": stat.st_mtime_ns}
        digest: str = self.get_or_compute(key, lambda: hash_file(file))
        return digest


def iter_length_sorted_batches(lengths: Sequence[int], batch_size: int, needed: Sequence[int]) -> Iterator[list[int]]:
    """Yield batches of row indices of similar length; batches without a needed row are skipped.

    Batches are formed over all rows, so that a row has the same batch, and bitwise the same result, whatever is cached.

    Args:
        lengths: length of each row.
        batch_size: rows per batch.
        needed: indices of the rows to compute.
    """
    order, needed_set = sorted(range(len(lengths)), key=lengths.__getitem__), set(needed)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if not needed_set.isdisjoint(batch):
            yield batch


def read_cached_rows(path: Path) -> dict[int, Any]:
    """Return the rows of a file by index; an incomplete last line, left by a killed process, is removed."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        path.write_bytes(complete)
    return dict(json.loads(line) for line in complete.decode("utf-8").split("\n") if line)


def hash_json(value: Any) -> str:
    """Return a short hash of a JSON value."""
    text = json.dumps([CACHE_FORMAT, value], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def hash_texts(texts: Sequence[Any]) -> str:
    """Return a short hash of a sequence of texts, or of tuples of texts."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:24]
