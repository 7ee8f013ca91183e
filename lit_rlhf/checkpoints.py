"""Crash-safe checkpoints: written atomically, verified before they are read, found by step.

What Lightning's `ModelCheckpoint` takes for saved is corrected in two places. One by steps does not know at which step
its run was resumed, and would write in the middle of an accumulation, whose gradients are in no checkpoint. And
`last.ckpt` would stay at the last step that it wrote: of 229 steps, saved every 20, that is step 220.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.checkpoint_files import UNSHARDED_FILE, ContainsObjects, DamagedCheckpoint, open_checkpoint
from lit_rlhf.paths import PART, written_whole

RUN_KEY = "run"  # where `lit_rlhf.callbacks.RunState` stores its state


class Stoppable:
    """Optional base of a LightningModule: what it does before the checkpoint of a run that was told to stop."""

    def prepare_stop(self) -> None:
        """Give up what the checkpoint would wait for; every rank calls it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file in the target's folder, then renames it, so a file with its final name is complete.

    Lightning's own writes to $TMPDIR and moves, which is a copy if that is another disk, and calls no fsync. Leftovers
    of a killed run are removed at the first write to their folder.
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
        with written_whole(target) as part, open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(target.parent)

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """Verify a local file's checksums, then load it."""
        if Path(path).is_file():
            check_intact(Path(path))
        return super().load_checkpoint(path, *args, **settings)


def set_saved_step(trainer: Trainer, step: int) -> None:
    """Let every `ModelCheckpoint` take `step` for the last that it saved, or none if -1: when the state was changed."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            callback._last_global_step_saved = step


def save_last_step(trainer: Trainer) -> None:
    """Write `last.ckpt` of every `ModelCheckpoint(save_last=True)` if it is of an earlier step; call in `on_train_end`.

    Before an average replaces the weights. Every rank must call it.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback._should_skip_saving_checkpoint(trainer):
            continue
        if callback.save_last is True:
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


class CheckpointSummary(NamedTuple):
    """What is known of a checkpoint without reading its tensors."""

    path: Path
    step: int  # -1 if unknown
    run: str  # id of the run that wrote it, "" if unknown
    written: float  # modification time, seconds since the epoch
    resumable: bool  # holds optimizer state


def sync_folder(folder: Path) -> None:
    """Flush renames in `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed run left in `folder`."""
    for part in folder.glob(f".*{PART}"):
        part.unlink(missing_ok=True)


def check_intact(path: Path) -> None:
    """Verify the checksum of every part of a checkpoint file.

    Raises:
        DamagedCheckpoint: the file was truncated, or its bytes have changed.
    """
    status = path.stat()
    reason = find_damage(path, status.st_size, status.st_mtime_ns)
    if reason:
        raise DamagedCheckpoint(f"ckpt_path: {path} is damaged ({reason}); take another checkpoint of the run")


@lru_cache(maxsize=64)
def find_damage(path: Path, size: int, modified: int) -> str:
    """Return what is wrong with a file, or ""; cached per process, size and modification time (ns)."""
    try:
        with zipfile.ZipFile(path) as archive:  # the format of torch.save; torch.load does not verify checksums
            corrupt = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as problem:
        return f"{problem}, {size:,} bytes"
    return f"the part {corrupt} has other bytes than were written" if corrupt else ""


def read_metadata(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint's content with meta tensors, or None if it holds objects besides plain values and tensors.

    Raises:
        DamagedCheckpoint: see `open_checkpoint`.
    """
    try:
        return open_checkpoint(path, device="meta")
    except ContainsObjects:  # of another module's state; Lightning's loader decides
        return None


def summarize_checkpoint(path: Path) -> CheckpointSummary:
    """Return a checkpoint's step, run and kind; see `read_metadata`."""
    content = read_metadata(path)
    written = (path / UNSHARDED_FILE if path.is_dir() else path).stat().st_mtime
    if content is None:
        return CheckpointSummary(path, -1, "", written, True)
    run = (content.get(RUN_KEY) or {}).get("id", "")
    return CheckpointSummary(path, content["global_step"], run, written, path.is_dir() or "optimizer_states" in content)


def iter_checkpoints(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the checkpoints directly in `folders`: files, and folders of shards."""
    for folder in dict.fromkeys(folders):
        yield from sorted(folder.glob("*.ckpt"))


def find_last_checkpoint(folders: Iterable[Path]) -> tuple[CheckpointSummary | None, list[str]]:
    """Return the intact checkpoint of the highest step of the run that wrote last, and why others were skipped.

    Other runs may have written to the same folders; runs are identified by the id in their checkpoints.
    """
    found, skipped = [], []
    for path in iter_checkpoints(folders):
        try:
            summary = summarize_checkpoint(path)
        except DamagedCheckpoint as problem:
            skipped.append(str(problem))
            continue
        if summary.resumable:
            found.append(summary)
        else:
            skipped.append(f"{path} holds weights only")
    while found:
        run = max(found, key=lambda each: each.written).run
        best = max((each for each in found if each.run == run), key=lambda each: (each.step, each.written))
        try:
            if best.path.is_file():
                check_intact(best.path)
            return best, skipped
        except DamagedCheckpoint as problem:
            skipped.append(str(problem).removeprefix("ckpt_path: "))
            found.remove(best)
    return None, skipped
