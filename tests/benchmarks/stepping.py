"""What this library's workers share: a clock of every step, and the Trainer that it sits in."""

from argparse import Namespace
from typing import Any

import lightning as L
import work


class Clock(L.Callback):
    """Seconds of every step."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        self.start = work.clock(self.device)

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop."""
        self.seconds.append(work.clock(self.device) - self.start)


def trainer_of(args: Namespace, clock: Clock) -> L.Trainer:
    """A quiet Trainer of so many steps, and one to warm up."""
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
