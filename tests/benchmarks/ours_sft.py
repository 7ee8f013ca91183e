"""Seconds of a step of supervised fine-tuning by this library, demonstrations packed; real tokens are counted."""

import time
from typing import Any

import lightning as L
import torch
import work

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.modules import SFTModule


class Clock(L.Callback):
    """Seconds of every step, and the real tokens in it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start."""
        self.tokens.append(int((batch.attention_mask if batch.segment is None else batch.segment).bool().sum()))
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
    data = DemonstrationDataModule(
        str(args.folder / "demonstrations.jsonl"),
        max_prompt_length=work.SFT_PROMPT,
        max_completion_length=work.SFT_LENGTH - work.SFT_PROMPT,
        micro_batch=work.SFT_ROWS * 7 // 4,  # of 144 tokens on average, where a row has 256
        batching="packed",
    )
    trainer.fit(
        SFTModule(str(args.folder / "policy"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True)), data
    )
    work.report(clock.seconds[1:], units=clock.tokens[1:])


if __name__ == "__main__":
    main()
