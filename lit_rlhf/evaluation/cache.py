"""What is computed is kept, row by row, so that an interrupted evaluation goes on where it was.

A file holds the rows of one piece of work. Its name is the hash of everything the rows depend on: the model's weights,
the inputs, the settings. Change any of it and it is other work.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_of_file
from lit_rlhf.models.loading_config import ModelLoadingConfig

FORMAT = 1  # raise it where the meaning of stored rows changes
FLUSH_SECONDS = 2.0

Compute = Callable[[list[int]], Iterator[tuple[int, Any]]]


class Cache:
    """Rows of finished work in a folder.

    Args:
        folder: made where it is not there. None keeps nothing: every row is computed.
        progress: whether to show a progress bar of what remains to be computed.
    """

    def __init__(self, folder: Path | None, progress: bool = True) -> None:
        self.folder, self.progress = folder, progress
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"out: cannot make the folder {folder}: {problem.strerror}") from None

    def rows(self, label: str, key: Any, count: int, compute: Compute) -> list[Any]:
        """Return the rows of a piece of work, computing those that are not there.

        Args:
            label: for the progress bar.
            key: all that the rows depend on, as JSON takes it.
            count: how many rows there are.
            compute: gets the places of the rows wanted and yields each place with its row, in any order. A row of None
                is one that failed: it is not stored, and is tried again next time.

        Returns:
            The rows in order, each as JSON gives it back: tuples as lists.
        """
        path = Path(os.devnull) if self.folder is None else self.folder / f"{digest(key)}.jsonl"
        found = read_rows(path)
        wanted = [place for place in range(count) if place not in found]
        if wanted:
            bar = tqdm(
                total=count,
                initial=count - len(wanted),
                desc=label,
                unit="row",
                leave=False,
                disable=None if self.progress else True,  # None: only on a terminal
            )
            with path.open("a", encoding="utf-8") as file, bar:
                flushed = time.monotonic()
                for place, row in compute(wanted):
                    bar.update()
                    if row is None or place in found:  # a batch may bring rows again that are there already
                        continue
                    line = json.dumps([place, row], ensure_ascii=False)
                    found[place] = json.loads(line)[1]
                    file.write(line + "\n")
                    if time.monotonic() - flushed > FLUSH_SECONDS:
                        file.flush()
                        flushed = time.monotonic()
        return [found.get(place) for place in range(count)]

    def value(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return one value, computing it where it is not there."""
        return self.rows("", {"value": key}, 1, lambda _: iter([(0, compute())]))[0]


def chunks_of(lengths: Sequence[int], size: int, wanted: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of rows in chunks of like length, those chunks left out of which no row is wanted.

    They are cut over all rows, so that a row has the same neighbours, and to the last bit the same result, whatever was
    computed before.

    Args:
        lengths: of every row.
        size: rows a chunk.
        wanted: places.
    """
    order, needed = sorted(range(len(lengths)), key=lengths.__getitem__), set(wanted)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        if not needed.isdisjoint(chunk):
            yield chunk


def read_rows(path: Path) -> dict[int, Any]:
    """Return the rows of a file by place; a last line that was cut off by a kill is taken away."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return dict(json.loads(line) for line in whole.decode("utf-8").split("\n") if line)


def digest(key: Any) -> str:
    """Return a short hash of a JSON value."""
    text = json.dumps([FORMAT, key], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def digest_of_texts(texts: Sequence[Any]) -> str:
    """Return a hash of many texts, or of tuples of them."""
    return hashlib.sha256(json.dumps(list(texts), ensure_ascii=False).encode()).hexdigest()[:24]


def digest_of_model(model: str, loading: ModelLoadingConfig, cache: Cache) -> str:
    """Return the identity of a model: its folder's files, or its name on the hub, and what changes as it is loaded.

    Hashing many gigabytes takes a while, so a file's hash is kept under its path, size and time of change.
    """
    folder = Path(model).expanduser()
    parts: list[Any] = [asdict(loading)]
    if not folder.is_dir():
        return f"{model} {digest(parts)}"
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"):
            state = file.stat()
            key = {"file": str(file.resolve()), "size": state.st_size, "changed": state.st_mtime_ns}
            parts.append([file.name, cache.value(key, partial(hash_of_file, file))])
    return digest(parts)
