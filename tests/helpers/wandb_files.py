"""What W&B wrote of a run: its records, by W&B's own message types."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes


def iter_records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file, a log in the format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:  # no header fits: padding
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0 and length == 0:
            position += left
            continue
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        parts = chunk if kind in (1, 2) else parts + chunk  # full, first, middle, last
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record


def read_items(items: Any) -> dict[str, Any]:
    """Return the keys and values of a record of history, summary or config."""
    values: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        inner = values
        for name in path:
            inner = inner.setdefault(name, {})
        inner[last] = json.loads(item.value_json)
    return values


class WandbFiles:
    """One run, read back.

    Args:
        folder: of the run: the parent of `wandb/`.
    """

    def __init__(self, folder: Path) -> None:
        import wandb

        wandb.teardown()  # a finished run may still be flushed
        (path,) = folder.glob("wandb/*run-*/*.wandb")
        self.folder, self.records = path.parent, list(iter_records(path))
        assert self.records[-1].WhichOneof("record_type") == "exit", "the file is complete"
        self.run = next(record.run for record in self.records if record.WhichOneof("record_type") == "run")
        self.rows = [read_items(record.history.item) for record in self.of_type("history")]
        self.config = read_items(self.run.config.update)
        for record in self.of_type("config"):
            self.config |= read_items(record.config.update)
        self.summary: dict[str, Any] = {}
        for record in self.of_type("summary"):
            self.summary |= read_items(record.summary.update)
        self.metrics = {record.metric.name: record.metric for record in self.of_type("metric")}

    def of_type(self, kind: str) -> list[Any]:
        """Return the records of one kind."""
        return [record for record in self.records if record.WhichOneof("record_type") == kind]

    def table(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a table that a history row refers to."""
        content = json.loads((self.folder / "files" / value["path"]).read_text())
        return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
