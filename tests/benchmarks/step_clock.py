"""Clock of every training step, and the Trainer of this library's workers."""

from argparse import Namespace
from typing import Any

import lightning as L
import workload


class StepClock(L.Callback):
    """Record the seconds of every training step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self.start = workload.clock(self.device)

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        self.seconds.append(workload.clock(self.device) - self.start)


def build_trainer(args: Namespace, clock: StepClock) -> L.Trainer:
    """Build a Trainer without output, for `args.updates` steps and one of warm-up."""
    return L.Trainer(
        accelerator=args.device,
        precision=args.precision,
        devices=1,
        max_steps=args.updates + 1,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[clock],
        default_root_dir=args.folder,
    )
