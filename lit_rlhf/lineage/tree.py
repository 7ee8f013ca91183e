"""The tree of records from an output back to base models and data, and what on the disk no longer matches it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.errors import UserError
from lit_rlhf.hashing import hash_file
from lit_rlhf.lineage.fingerprints import HashFile, hash_lineage, hash_weight_files
from lit_rlhf.lineage.records import DataInput, LineageRecord, ModelInput, read_record
from lit_rlhf.paths import expand_path


@dataclass(frozen=True)
class Node:
    """An output or an input, with what it was made from.

    Attributes:
        role: what it is used as; of the root, its own.
        path: as the settings name it.
        record: of how it was made; None without a lineage.json.
        rows: of a data set: rows kept.
        is_data: whether it is a data set, not a model.
        parents: its inputs; of something that the tree shows twice, at its first place alone.
        repeated: whether it stands at an earlier place, with its inputs.
        problems: what on the disk is no longer what was recorded.
    """

    role: str
    path: str
    record: LineageRecord | None = None
    rows: int | None = None
    is_data: bool = False
    parents: "tuple[Node, ...]" = ()
    repeated: bool = False
    problems: tuple[str, ...] = ()

    def walk(self) -> "Iterator[Node]":
        """Yield this node and all below, each place of the tree once."""
        yield self
        for each in self.parents:
            yield from each.walk()


def build_tree(output: Path, hash_file: HashFile = hash_file) -> Node:
    """Read the records from an output backwards, and compare them with what is on the disk.

    Args:
        output: a model folder, the folder of an evaluation, or a file that was sampled.
        hash_file: returns the SHA-256 of a file. One that knows hashes by modification time would miss a change.

    Raises:
        UserError: there is no record, or a record is damaged.
    """
    if not output.exists():
        raise UserError(f"lineage: there is no folder or file {output}")
    record = read_record(output)
    if record is None:
        raise UserError(
            f"lineage: {output} has no lineage.json; lit-rlhf fit, export, evaluate, best-of-n and rank write one"
        )
    seen, hash_file = {output.resolve()}, cache(hash_file)
    problems = tuple(compare_files(output, str(output), record.files, hash_file, "was written"))
    parents = _build_parents(_Output(output, str(output), record), seen, hash_file)
    return Node(record.role, str(output), record, problems=problems, parents=parents)


class _Output(NamedTuple):
    """What inputs were used for."""

    place: Path
    name: str  # for messages: as the settings of its user name it
    record: LineageRecord

    @property
    def folder(self) -> Path:
        return self.place if self.place.is_dir() else self.place.parent


def _build_parents(user: _Output, seen: set[Path], hash_file: HashFile) -> tuple[Node, ...]:
    return tuple(_build_node(each, user, seen, hash_file) for each in user.record.inputs)


def _build_node(each: ModelInput | DataInput, user: _Output, seen: set[Path], hash_file: HashFile) -> Node:
    is_data = isinstance(each, DataInput)
    rows = each.rows_kept if isinstance(each, DataInput) else None
    source = resolve_input(each, user.folder)
    if source is None:
        missing = (f"missing: {each.path}",) if each.location else ()  # nothing on this disk stands for a hub name
        return Node(each.role, each.path, rows=rows, is_data=is_data, problems=missing)
    expected = each.files if isinstance(each, ModelInput) else {source.name: each.fingerprint.removeprefix("sha256 ")}
    problems = list(compare_files(source, each.path, expected, hash_file, f"was used for {user.name}"))
    if each.lineage and hash_lineage(source) != each.lineage and not problems:
        problems.append(f"its lineage.json is another than when it was used for {user.name}: {each.path}")
    record = read_record(source) if each.lineage else None
    # an earlier place in the tree may have used other bytes of the same path, so these were compared again
    repeated = source.resolve() in seen
    seen.add(source.resolve())
    parents = () if record is None or repeated else _build_parents(_Output(source, each.path, record), seen, hash_file)
    return Node(each.role, each.path, record, rows, is_data, parents, repeated, tuple(problems))


def resolve_input(each: ModelInput | DataInput, folder: Path) -> Path | None:
    """Return where an input is now: beside the record as when it was written, or where the settings name it.

    Args:
        each: the input.
        folder: of the record.
    """
    if not each.location:
        return None
    places = (Path(os.path.normpath(folder.resolve() / each.location)), expand_path(each.path))
    return next((path for path in places if path.exists()), None)


def read_parent(each: ModelInput | DataInput, folder: Path) -> tuple[Path, LineageRecord] | None:
    """Return where an input is now, and its record; None if either is missing, or the record is damaged."""
    source = resolve_input(each, folder) if each.lineage else None
    try:
        record = None if source is None else read_record(source)
    except UserError:
        return None
    return None if source is None or record is None else (source, record)


def compare_files(output: Path, name: str, expected: dict[str, str], hash_file: HashFile, when: str) -> Iterator[str]:
    """Yield what differs between the files of an output and their recorded hashes.

    Args:
        output: folder or file.
        name: of it, for the message.
        expected: file name -> SHA-256.
        hash_file: returns the SHA-256 of a file.
        when: since when, for the message.
    """
    for file, digest in expected.items():
        path, shown = (output / file, f"{name}/{file}") if output.is_dir() else (output, name)
        if not path.is_file():
            yield f"missing: {shown}"
        elif hash_file(path) != digest:
            yield f"changed since it {when}: {shown}"
    if output.is_dir() and any(file.endswith((".safetensors", ".bin")) for file in expected):
        for file in sorted(set(hash_weight_files(output, lambda _: "")) - set(expected)):
            yield f"added since it {when}: {name}/{file}"
