"""Table of sampled responses with score and KL, for Weights & Biases and as a file."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger


class LogSamples(Callback):
    """Log the module's `samples` every few iterations.

    The rows are appended to `samples.jsonl` in the log folder, one JSON object per row, with the optimizer step; a
    WandbLogger also gets them as a table `samples`.

    Args:
        every_n_epochs: iterations between two tables.
        rows: rows per table.
    """

    def __init__(self, every_n_epochs: int = 5, rows: int = 8) -> None:
        self.every_n_epochs, self.rows = every_n_epochs, rows

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the samples of the last iteration."""
        if trainer.current_epoch % self.every_n_epochs == 0:
            write_samples(trainer, pl_module.samples[: self.rows])


def write_samples(trainer: Trainer, samples: list[dict[str, Any]], name: str = "samples") -> None:
    """Append rows to `NAME.jsonl` and log them as a table to WandbLoggers; a collective call.

    Args:
        trainer: the trainer, with its loggers and log folder.
        samples: rows with equal keys.
        name: of the table and the file.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective call: before any rank returns
    if not samples or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            columns = list(samples[0])
            logger.log_table(name, columns=columns, data=[[row[c] for c in columns] for row in samples])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as file:
        file.writelines(json.dumps({"step": trainer.global_step, **row}) + "\n" for row in samples)
