"""Table of sampled responses with score and KL, for Weights & Biases and as a file."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_rlhf.errors import UserError
from lit_rlhf.loggers import ITERATION, GrowingTable

COLUMNS = (ITERATION, "prompt", "reference", "response", "score", "kl")
MAX_ROWS = 16


class LogSamples(Callback):
    """Every few iterations, log responses of the policy to the same prompts, so that they can be compared.

    The rows are appended to `samples.jsonl` in the log folder, one JSON object per row, with the optimizer step. A
    WandbLogger also gets them, as one table `samples` that grows. A row has the iteration after whose update the
    response was sampled, the prompt, the answer in the data where there is one (column "reference" or "completion"),
    response, score and KL. The sampling noise of a prompt is always the same.

    Args:
        every_n_epochs: iterations between two samples, the first of them after the first iteration. Decoding a few
            prompts takes as many steps as decoding a whole batch: up to a tenth of an iteration of a small model.
        rows: prompts, at most 16.

    Raises:
        UserError: there are too many rows, or `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int = 20, rows: int = 8) -> None:
        if not 1 <= rows <= MAX_ROWS:
            raise UserError(f"LogSamples: rows must lie between 1 and {MAX_ROWS}, got {rows}")
        if every_n_epochs < 1:
            raise UserError(f"LogSamples: every_n_epochs must be 1 or more, got {every_n_epochs}")
        self.every_n_epochs, self.rows = every_n_epochs, rows
        self.table = GrowingTable("samples", COLUMNS)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sample and log."""
        if trainer.current_epoch % self.every_n_epochs:
            return
        samples = pl_module.sample_responses(self.rows)
        write_samples(trainer, samples)
        if samples:
            self.table.add(trainer.loggers, samples, trainer.global_step, **pl_module.axes())


def write_samples(trainer: Trainer, samples: list[dict[str, Any]], name: str = "samples") -> None:
    """Append rows to `NAME.jsonl`, with the optimizer step; a collective call.

    Args:
        trainer: the trainer, with its log folder.
        samples: rows with equal keys.
        name: of the file.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is a collective call: before any rank returns
    if not samples or not trainer.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.jsonl", "a") as file:
        file.writelines(json.dumps({"step": trainer.global_step, **row}) + "\n" for row in samples)
