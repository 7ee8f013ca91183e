"""Going on with a run: which checkpoint `last` is, and its logs, without the rows of what is done once more."""

import csv
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lit_rlhf.callbacks.run_state import log_files
from lit_rlhf.checkpoints import RUN_KEY, CheckpointSummary, last_checkpoint, read_plain
from lit_rlhf.errors import UserError

KEPT = ".kept"  # ending of a log while it is written anew


def run_folders(trainer: L.Trainer) -> list[Path]:
    """Return where the run of a Trainer may have left checkpoints, and the runs before it in the same folder."""
    root = Path(trainer.default_root_dir)
    folders = [Path(path) for callback in trainer.checkpoint_callbacks if (path := getattr(callback, "dirpath", None))]
    for logger in trainer.loggers[:1]:  # as a ModelCheckpoint without dirpath does
        base = Path(logger.save_dir or root) / str(logger.name or "")
        folders += [base / "checkpoints", *base.glob("*/checkpoints")]
    return [path.resolve() for path in (*folders, root / "checkpoints", root)]


def find_last(trainer: L.Trainer, command: str) -> Path | None:
    """Return the checkpoint that `last` stands for, and say so; None where the run begins.

    Raises:
        UserError: there are checkpoints, but none is whole; or there is none, and `command` needs one.
    """
    folders = run_folders(trainer)
    last, passed = last_checkpoint(folders)
    say = print_resume_line if trainer.is_global_zero else no_word
    for reason in passed:
        say(f"ckpt_path=last: passed over: {reason}")
    if last is not None:
        say(f"ckpt_path=last: {last.path}{described(last)}")
        return last.path
    if passed:
        raise UserError(
            f"ckpt_path=last: no checkpoint in {folders[0]} can be gone on with ({passed[0]}); leave ckpt_path out to "
            "start from the beginning"
        )
    if command != "fit":
        raise UserError(f"ckpt_path=last: there is no checkpoint in {folders[0]}")
    say(f"ckpt_path=last: no checkpoint in {folders[0]} yet; starting from the beginning")
    return None


def described(found: CheckpointSummary) -> str:
    """Return the step, where it is known."""
    return "" if found.step < 0 else f", step {found.step}"


def print_resume_line(line: str) -> None:
    """Print a line beside the output."""
    print(line, file=sys.stderr)


def no_word(line: str) -> None:
    """Say nothing: another rank does."""


def continue_logs(trainer: L.Trainer, checkpoint: Path) -> None:
    """Let the loggers go on with what they wrote in the run of `checkpoint`; before any of them has begun."""
    content = read_plain(checkpoint) if checkpoint.exists() else None
    if content is None:
        return
    about = content.get(RUN_KEY) or {}
    for logger, (kind, version) in zip(trainer.loggers, about.get("loggers", [])):
        if type(logger).__name__ == kind:
            be_version(logger, version)
    if not trainer.is_global_zero:
        return
    for path in log_files(trainer):
        if path.name in about.get("lines", {}):
            cut_off(path, about["lines"][path.name])
    pending = {**about["row"], "step": content["global_step"] - 1} if about.get("row") else {}
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            keep_rows(logger, pending)


def be_version(logger: Logger, version: Any) -> None:
    """Set which run a logger writes to, where the recipe leaves that open; there is no public way once it is made."""
    if isinstance(logger, CSVLogger) and logger._version is None:
        logger._version = version
    elif isinstance(logger, WandbLogger) and logger._id is None:
        logger._id = logger._wandb_init["id"] = version


def cut_off(path: Path, lines: int) -> None:
    """Leave the first `lines` lines of a file: what comes behind them will be done once more."""
    if path.exists():
        part = path.with_name(path.name + KEPT)
        part.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
        os.replace(part, path)


def keep_rows(logger: CSVLogger, pending: dict[str, Any]) -> None:
    """Give a logger that has not begun the rows of its metrics.csv, which it would delete.

    Args:
        logger: of the run that goes on.
        pending: the row of the last step, which the checkpoint holds, for it was written before the row was.
    """
    file = Path(logger.log_dir) / "metrics.csv"
    kept = file.with_name(file.name + KEPT)
    if file.exists():
        os.replace(file, kept)
    if not kept.exists():  # it does where an earlier attempt at this was killed
        return
    with open(kept, newline="") as text:
        rows: list[dict[str, Any]] = [{k: v for k, v in row.items() if v} for row in csv.DictReader(text)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it deletes what is given back to it here
        logger.experiment.metrics = [*rows, pending] if pending else rows
    logger.experiment.save()
    kept.unlink()
