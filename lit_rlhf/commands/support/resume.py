"""Resume a run: find the checkpoint that `last` means, and continue its logs without the rows that will be repeated."""

import csv
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lit_rlhf.callbacks.run_state import find_log_files
from lit_rlhf.checkpoints import RUN_KEY, find_last_checkpoint, read_metadata
from lit_rlhf.errors import UserError

KEPT = ".kept"  # suffix of a log while it is being rewritten


def find_checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Return where this run, and earlier runs in the same folder, may have written checkpoints."""
    root = Path(trainer.default_root_dir)
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
    for logger in trainer.loggers[:1]:  # the default of a ModelCheckpoint without dirpath
        base = Path(logger.save_dir or root) / str(logger.name or "")
        folders += [base / "checkpoints", *base.glob("*/checkpoints")]
    return [path.resolve() for path in (*folders, root / "checkpoints", root)]


def find_last(trainer: L.Trainer, command: str) -> Path | None:
    """Return the checkpoint that `ckpt_path=last` means, and print it; None if the run starts from the beginning.

    Raises:
        UserError: every checkpoint is damaged, or there is none and `command` needs one.
    """
    folders = find_checkpoint_folders(trainer)
    last, skipped = find_last_checkpoint(folders)
    lines = [f"skipped: {reason}" for reason in skipped]
    if last is not None:
        lines.append(f"{last.path}" + (f", step {last.step}" if last.step >= 0 else ""))
    elif not skipped and command == "fit":
        lines.append(f"no checkpoint in {folders[0]} yet; starting from the beginning")
    if trainer.is_global_zero:
        print(*(f"ckpt_path=last: {line}" for line in lines), sep="\n", end="\n" if lines else "", file=sys.stderr)
    if last is None and skipped:
        raise UserError(
            f"ckpt_path=last: no checkpoint in {folders[0]} can be resumed ({skipped[0]}); leave ckpt_path out to "
            "start from the beginning"
        )
    if last is None and command != "fit":
        raise UserError(f"ckpt_path=last: there is no checkpoint in {folders[0]}")
    return None if last is None else last.path


def continue_logs(trainer: L.Trainer, checkpoint: Path) -> None:
    """Make the loggers continue what they wrote in the run of `checkpoint`; call it before any of them has started."""
    content = read_metadata(checkpoint) if checkpoint.exists() else None
    if content is None:
        return
    run = content.get(RUN_KEY) or {}
    for logger, (kind, version) in zip(trainer.loggers, run.get("loggers", [])):
        if type(logger).__name__ == kind:
            set_version(logger, version)
    if not trainer.is_global_zero:
        return
    for path in find_log_files(trainer):
        if path.name in run.get("lines", {}):
            truncate_lines(path, run["lines"][path.name])
    pending = {**run["row"], "step": content["global_step"] - 1} if run.get("row") else {}
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            restore_rows(logger, pending)


def set_version(logger: Logger, version: Any) -> None:
    """Set the run that a logger writes to, unless the recipe sets it; loggers have no public way after construction."""
    if isinstance(logger, CSVLogger) and logger._version is None:
        logger._version = version
    elif isinstance(logger, WandbLogger) and logger._id is None:
        logger._id = logger._wandb_init["id"] = version


def truncate_lines(path: Path, lines: int) -> None:
    """Keep the first `lines` lines of a file: the steps behind them will be repeated."""
    if path.exists():
        part = path.with_name(path.name + KEPT)
        part.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
        os.replace(part, path)


def restore_rows(logger: CSVLogger, pending: dict[str, Any]) -> None:
    """Give a logger that has not started the rows of its metrics.csv, which it would delete.

    Args:
        logger: the logger of the resumed run.
        pending: row of the checkpoint's step, which was not yet written to metrics.csv when the checkpoint was.
    """
    file = Path(logger.log_dir) / "metrics.csv"
    kept = file.with_name(file.name + KEPT)
    if file.exists():
        os.replace(file, kept)
    if not kept.exists():  # it also exists if an earlier attempt was killed here
        return
    with open(kept, newline="") as text:
        rows: list[dict[str, Any]] = [{k: v for k, v in row.items() if v} for row in csv.DictReader(text)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the file, whose rows are given back here, will be deleted
        logger.experiment.metrics = [*rows, pending] if pending else rows
    logger.experiment.save()
    kept.unlink()
