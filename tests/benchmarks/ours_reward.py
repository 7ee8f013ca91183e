"""Seconds of a training step on one ranking by this library: K completions, all pairs, one optimizer step."""

import time
from typing import Any

import lightning as L
import torch
import work

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.modules import RewardModule


class Clock(L.Callback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        """Start."""
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.start)


def main() -> None:
    """Run."""
    args = work.arguments().parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock()
    trainer = L.Trainer(
        accelerator="cpu",
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
    module = RewardModule(str(args.folder / "policy"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True))
    trainer.fit(module, ComparisonDataModule(str(args.folder / "rankings.jsonl"), micro_batch=1))
    work.report(clock.seconds[1:])


if __name__ == "__main__":
    main()
