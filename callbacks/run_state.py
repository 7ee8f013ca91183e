"""Identity and log positions of a run in its checkpoints, so that a resumed run continues its logs."""

import uuid
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.checkpoints import RUN_KEY


class RunState(Callback):
    """Flush the loggers at every checkpoint, and store the identity of the run in it.

    A checkpoint has under `run`: `id`, common to a run and all runs resumed from it; `loggers`, class name and version
    of each, such as the run id of Weights & Biases; `lines`, the number of lines of each log file; and `row`, the
    metrics of the last step, which Lightning passes to the loggers only after the checkpoint is written; and `recipe`
    and `ranks`. `lit-rlhf fit` restores them, and prints in what the recipe of a resumed run differs.

    Args:
        recipe: the full configuration of the run as plain values, without credentials.
        command: the command line, without credentials.
        configs: the names of the recipe and its overlays.
    """

    def __init__(self, recipe: dict[str, Any] | None = None, command: str = "", configs: tuple[str, ...] = ()) -> None:
        self.recipe, self.command, self.configs = recipe or {}, command, configs
        self.id = uuid.uuid4().hex  # random, whatever the seed of the run

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flush the loggers and add `run`."""
        for logger in trainer.loggers:
            logger.save()
        versions = [[type(logger).__name__, logger.version] for logger in trainer.loggers]
        lines = {path.name: count_lines(path) for path in find_log_files(trainer)} if trainer.is_global_zero else {}
        row = read_pending_metrics(trainer)
        run = {"id": self.id, "loggers": versions, "lines": lines, "row": row}
        checkpoint[RUN_KEY] = {**run, "recipe": self.recipe, "ranks": trainer.world_size}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the id of the checkpoint."""
        self.id = checkpoint.get(RUN_KEY, {}).get("id", self.id)


def find_log_files(trainer: Trainer) -> list[Path]:
    """Return the files that a run appends lines to; they need not exist. For rank zero only."""
    csv_folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    folders = [*csv_folders, *(Path(logger.save_dir) for logger in trainer.loggers if logger.save_dir)]
    folder = (folders or [Path(trainer.default_root_dir)])[0]
    samples = [folder / name for name in ("samples.jsonl", "validation_samples.jsonl")]
    return [*(folder / "metrics.csv" for folder in csv_folders[:1]), *samples]


def count_lines(path: Path) -> int:
    """Return the number of complete lines of a file; 0 if it does not exist."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_pending_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the current step that Lightning logs only after the batch hooks."""
    connector = trainer._logger_connector
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    within_hooks = progress.processed == progress.completed + 1 and not trainer.fit_loop._should_accumulate()
    if not (within_hooks and connector.should_update_logs and connector.metrics["log"]):
        return {}
    return {name: float(value) for name, value in connector.metrics["log"].items()} | {"epoch": trainer.current_epoch}
