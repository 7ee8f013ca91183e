"""Seconds of a step of supervised fine-tuning by this library, demonstrations packed; real tokens are counted."""

from typing import Any

import lightning as L
import torch
import work
from stepping import Clock, trainer_of

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.modules import SFTModule


class TokenClock(Clock):
    """The same, and the real tokens of every step."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count, then start."""
        self.tokens.append(int(batch.attention_mask.sum()))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def main() -> None:
    """Run."""
    args = work.arguments().parse_args()
    torch.set_num_threads(args.threads)
    clock = TokenClock(args.device)
    trainer = trainer_of(args, clock)
    data = DemonstrationDataModule(
        str(args.folder / "demonstrations.jsonl"),
        max_prompt_length=work.SFT_PROMPT,
        max_completion_length=work.SFT_LENGTH - work.SFT_PROMPT,
        micro_batch_size=work.SFT_ROWS * 7 // 4,  # of 144 tokens on average, where a row of the peers has 256
        batching="packed",
    )
    trainer.fit(
        SFTModule(
            str(args.folder / f"policy-{args.size}"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True)
        ),
        data,
    )
    work.report(clock.seconds[1:], units=clock.tokens[1:], flops=6 * work.parameters(args.size))


if __name__ == "__main__":
    main()
