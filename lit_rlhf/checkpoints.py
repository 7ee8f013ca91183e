"""Checkpoints that a kill cannot damage: written whole or not at all, checked before they are read, found by step."""

import os
import pickle
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lit_rlhf.errors import UserError

RUN_KEY = "run"  # of what `lit_rlhf.callbacks.RunState` stores
PART = ".part"
SHARDS = ".metadata"  # PyTorch's list of the shards, in a folder of them
REST = "meta.pt"  # what Lightning stores beside the shards, last of all


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file under another name in the same folder, then renames it: what has its name is whole.

    Lightning's own writes to $TMPDIR and moves, which is a copy where that lies on another disk, and does not wait for
    the disk. Leftovers of a killed run go at the first write to their folder.
    """

    def __init__(self) -> None:
        self.cleaned: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a local path atomically; a URL is left to its own file system."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent not in self.cleaned:
            remove_leftovers(target.parent)
            self.cleaned.add(target.parent)
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PART}")
        try:
            with open(part, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)  # a full disk must not stay full
        sync_folder(target.parent)

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """Read, after a look whether the file is whole."""
        if Path(path).is_file():
            check_intact(Path(path))
        return super().load_checkpoint(path, *args, **settings)


class CheckpointSummary(NamedTuple):
    """What is known of a checkpoint without its tensors."""

    path: Path
    step: int  # -1 where it does not say
    run: str  # of which run; empty where it does not say
    written: float  # seconds since the epoch
    resumable: bool  # holds an optimizer's state


class DamagedCheckpoint(UserError):
    """A file that is no whole checkpoint."""


def sync_folder(folder: Path) -> None:
    """Wait until a rename in `folder` is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed run left half-written in `folder`."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def check_intact(path: Path) -> None:
    """Check the sums of every part of a file.

    Raises:
        Damaged: the file was cut off, or its bytes are not those that were written.
    """
    status = path.stat()
    reason = damage(path, status.st_size, status.st_mtime_ns)
    if reason:
        raise DamagedCheckpoint(f"ckpt_path: {path} is damaged ({reason}); take another checkpoint of the run")


@lru_cache(maxsize=64)
def damage(path: Path, size: int, changed: int) -> str:
    """Return what is wrong with a file, or "": read once a process, for `size` and `changed` are part of the key."""
    try:
        with zipfile.ZipFile(path) as archive:  # as torch.save writes, which does not look at the sums on reading
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as problem:
        return f"{problem}, {size:,} bytes"
    return f"the part {broken} has other bytes than were written" if broken else ""


def read_plain(path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint holds, tensors unread, or None where it holds more than tensors and plain values.

    Raises:
        Damaged: cut off, no checkpoint, or a folder of shards without its last part.
    """
    file = path / REST if path.is_dir() else path
    if path.is_dir() and not (file.is_file() and (path / SHARDS).is_file()):
        raise DamagedCheckpoint(f"ckpt_path: the folder {path} is no whole checkpoint of shards")
    try:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except pickle.UnpicklingError:  # of a stranger's module
        return None
    except (RuntimeError, EOFError, OSError, ValueError) as problem:
        raise DamagedCheckpoint(f"ckpt_path: {path} is no readable checkpoint ({problem})") from None
    if not isinstance(content, dict) or "loops" not in content:
        raise DamagedCheckpoint(f"ckpt_path: {path} is no Lightning checkpoint; it holds no loops")
    return content


def summary(path: Path) -> CheckpointSummary:
    """Return what a checkpoint says about itself; see `read_plain`."""
    content = read_plain(path)
    written = (path / REST if path.is_dir() else path).stat().st_mtime
    if content is None:
        return CheckpointSummary(path, -1, "", written, True)
    run = (content.get(RUN_KEY) or {}).get("id", "")
    return CheckpointSummary(path, content["global_step"], run, written, path.is_dir() or "optimizer_states" in content)


def checkpoints_in(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the checkpoints that lie directly in `folders`: files, and folders of shards."""
    for folder in dict.fromkeys(folders):
        yield from sorted(folder.glob("*.ckpt"))


def last_checkpoint(folders: Iterable[Path]) -> tuple[CheckpointSummary | None, list[str]]:
    """Return the whole checkpoint of the highest step, of the run that wrote last, and what was passed over and why.

    Another run's checkpoints may lie in the same folder; a run is told by the id that it carries.
    """
    found, passed = [], []
    for path in checkpoints_in(folders):
        try:
            each = summary(path)
        except DamagedCheckpoint as problem:
            passed.append(str(problem).removeprefix("ckpt_path: "))
            continue
        if each.resumable:
            found.append(each)
        else:
            passed.append(f"{path} holds weights alone")
    while found:
        run = max(found, key=lambda each: each.written).run
        best = max((each for each in found if each.run == run), key=lambda each: (each.step, each.written))
        try:
            if best.path.is_file():
                check_intact(best.path)
            return best, passed
        except DamagedCheckpoint as problem:
            passed.append(str(problem).removeprefix("ckpt_path: "))
            found.remove(best)
    return None, passed
