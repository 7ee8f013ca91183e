"""Resume a run: find the checkpoint that `last` means, and continue its logs without the rows that will be repeated."""

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from lit_rlhf.callbacks.run_state import find_log_files
from lit_rlhf.checkpoints import RUN_KEY, CheckpointSummary, find_last_checkpoint
from lit_rlhf.errors import UserError
from lit_rlhf.paths import written_whole


def find_checkpoint_folders(root: Path, callbacks: Iterable[Any]) -> list[Path]:
    """Return where the runs of a folder have written checkpoints.

    Args:
        root: the folder of the run.
        callbacks: instances, or settings of them, of which ModelCheckpoints with a `dirpath` count.
    """
    settings = [each.get("init_args") or {} if isinstance(each, Namespace) else vars(each) for each in callbacks]
    folders = [Path(each["dirpath"]) for each in settings if each.get("dirpath")]
    return [path.resolve() for path in (*folders, root / "checkpoints", root)]


def find_last(trainer: L.Trainer, folders: list[Path], command: str) -> Path | None:
    """Return the checkpoint that `ckpt_path=last` means, and print it; None if the run starts from the beginning.

    Args:
        trainer: prints on its rank zero.
        folders: see `find_checkpoint_folders`.
        command: fit, validate or test.

    Raises:
        UserError: every checkpoint is damaged, or there is none and `command` needs one.
    """
    last, skipped = find_last_checkpoint(folders)
    lines = [f"skipped: {reason}" for reason in skipped]
    if last is not None:
        lines.append(describe_checkpoint(last))
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


def describe_checkpoint(checkpoint: CheckpointSummary) -> str:
    """Return path and step of a checkpoint."""
    return f"{checkpoint.path}" + (f", step {checkpoint.step}" if checkpoint.step >= 0 else "")


def find_trained(root: Path, settings: Namespace, command: str) -> str:
    """Make `validate` or `test` take what the run of a folder has trained; return it, for a message.

    It is the last checkpoint, or else the exported model, which then replaces the recipe's starting model.

    Args:
        root: the folder of the run.
        settings: of the subcommand, changed in place.
        command: validate or test.

    Raises:
        UserError: there is neither.
    """
    last, skipped = find_last_checkpoint(find_checkpoint_folders(root, settings.trainer.callbacks or ()))
    if last is not None:
        settings.ckpt_path = str(last.path)
        return describe_checkpoint(last)
    arguments, exported = settings.model.get("init_args") or Namespace(), root / "model"
    if "model" in arguments and any((exported / name).is_file() for name in ("config.json", "adapter_config.json")):
        if arguments.get("adapter") is not None:
            raise UserError(
                f"{command}: {root} holds no checkpoint, and {exported} is loaded with the adapter merged; set "
                f"model.adapter to null and model.model to {exported}, or name a checkpoint with --ckpt_path"
            )
        if "reference" in arguments and arguments.reference is None:
            arguments.reference = arguments.model  # the KL is still measured to the starting model
        arguments.model = str(exported)
        return str(exported)
    raise UserError(
        f"{command}: {root} holds neither a checkpoint nor a model"
        + (f" that can be read ({skipped[0]})" if skipped else "")
        + "; train it with lit-rlhf fit, name a checkpoint with --ckpt_path, or another folder with --run_dir"
    )


def is_of_same_run(checkpoint: Path, content: dict[str, Any] | None, folders: list[Path]) -> bool:
    """Return whether a checkpoint is of the run that wrote to these folders, so that it resumes that run."""
    if checkpoint.resolve().parent in folders:
        return True
    last, _ = find_last_checkpoint(folders)
    run = ((content or {}).get(RUN_KEY) or {}).get("id", "")
    return last is not None and bool(run) and last.run == run


def set_versions(trainer: L.Trainer, content: dict[str, Any]) -> None:
    """Make the loggers continue the runs of a checkpoint; call it before any of them has started."""
    for logger, (kind, version) in zip(trainer.loggers, (content.get(RUN_KEY) or {}).get("loggers", [])):
        if type(logger).__name__ == kind:
            set_version(logger, version)


def restore_logs(trainer: L.Trainer, content: dict[str, Any]) -> None:
    """Give the log files the rows that they had at a checkpoint; for rank zero only.

    Args:
        trainer: its loggers have written no row.
        content: metadata of the checkpoint.
    """
    run = content.get(RUN_KEY) or {}
    for path in find_log_files(trainer):
        if path.name in run.get("lines", {}):
            truncate_lines(path, run["lines"][path.name])
    # the row of the checkpoint's step is not yet in metrics.csv when the checkpoint is written
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
        with written_whole(path) as part:
            part.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def restore_rows(logger: CSVLogger, pending: dict[str, Any]) -> None:
    """Make a logger append to its metrics.csv, if there is one.

    Args:
        logger: the logger of the resumed run.
        pending: row of the checkpoint's step.
    """
    file = Path(logger.log_dir) / "metrics.csv"
    if not file.exists():
        return
    with open(file, newline="") as text:
        logger.experiment.metrics_keys = list(csv.DictReader(text).fieldnames or [])
    logger.experiment.metrics = [pending] if pending else []
    logger.experiment.save()
