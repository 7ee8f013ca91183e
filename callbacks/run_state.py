"""What makes a resumed run one with the run it goes on from: its name, its logs, its metrics."""

import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.checkpoints import RUN_KEY


class RunState(Callback):
    """Writes logs out with every checkpoint, and stores beside it which run it is of.

    A checkpoint holds under `run`: `id`, the same for a run and all that are resumed from it; `loggers`, class and
    version of each, such as the id at Weights & Biases; `lines`, how long the files of its log are; and `row`, the
    metrics of the step just done, which Lightning gives to the loggers only after the checkpoint is written.
    `lit-rlhf fit` takes them back.
    """

    def __init__(self) -> None:
        self.id = uuid.uuid4().hex  # not of a generator that is seeded

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the logs, add the run."""
        for logger in trainer.loggers:
            logger.save()
        versions = [[type(logger).__name__, logger.version] for logger in trainer.loggers]
        lines = {path.name: count_lines(path) for path in log_files(trainer)} if trainer.is_global_zero else {}
        row = pending_row(trainer)
        checkpoint[RUN_KEY] = {"id": self.id, "loggers": versions, "lines": lines, "row": row}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Be the same run."""
        self.id = checkpoint.get(RUN_KEY, {}).get("id", self.id)


def log_files(trainer: Trainer) -> list[Path]:
    """Return the files that grow by lines as a run goes on; they need not exist. On rank zero."""
    csv_folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    folders = [*csv_folders, *(Path(logger.save_dir) for logger in trainer.loggers if logger.save_dir)]
    samples = (folders or [Path(trainer.default_root_dir)])[0] / "samples.jsonl"
    return [*(folder / "metrics.csv" for folder in csv_folders[:1]), samples]


def count_lines(path: Path) -> int:
    """Return how many whole lines a file has, 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def pending_row(trainer: Trainer) -> dict[str, float]:
    """Return what Lightning will log of the step just done, once the hooks of its last batch are over."""
    connector = trainer._logger_connector
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    within_hooks = progress.processed == progress.completed + 1 and not trainer.fit_loop._should_accumulate()
    if not (within_hooks and connector.should_update_logs and connector.metrics["log"]):
        return {}
    return {name: float(value) for name, value in connector.metrics["log"].items()} | {"epoch": trainer.current_epoch}
