"""A table of responses with score and KL, to Weights & Biases or to a file."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class LogSamples(Callback):
    """Logs the module's `samples` every few iterations.

    A logger with `log_table` (WandbLogger) gets a table `samples`; beside it the rows go to `samples.jsonl` in the log
    folder, one JSON object a row, with the optimizer step.

    Args:
        every_n_epochs: iterations between two tables.
        rows: rows a table.
    """

    def __init__(self, every_n_epochs: int = 5, rows: int = 8) -> None:
        self.every_n_epochs, self.rows = every_n_epochs, rows

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the samples of the iteration that ends."""
        samples: list[dict[str, Any]] = getattr(pl_module, "samples", [])[: self.rows]
        if trainer.current_epoch % self.every_n_epochs == 0:
            write_samples(trainer, samples)


def write_samples(trainer: Trainer, samples: list[dict[str, Any]]) -> None:
    """Log rows of one set of columns to the loggers that take tables, and append them to `samples.jsonl`.

    Every rank must call it; rank zero writes.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call: before any rank leaves
    if not samples or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if hasattr(logger, "log_table"):
            columns = list(samples[0])
            logger.log_table("samples", columns=columns, data=[[row[c] for c in columns] for row in samples])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "samples.jsonl", "a") as file:
        file.writelines(json.dumps({"step": trainer.global_step, **row}) + "\n" for row in samples)
