"""Time a step of this library's supervised fine-tuning on packed demonstrations, per real token."""

from typing import Any

import lightning as L
import torch
import workload
from step_clock import StepClock, build_trainer

from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.modules import SFTModule


class TokenClock(StepClock):
    """Also record the real tokens of every step."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.tokens: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Count tokens and start the clock."""
        self.tokens.append(int(batch.attention_mask.sum()))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def main() -> None:
    """Time the steps and report."""
    args = workload.build_parser().parse_args()
    torch.set_num_threads(args.threads)
    clock = TokenClock(args.device)
    trainer = build_trainer(args, clock)
    data = DemonstrationDataModule(
        str(args.folder / "demonstrations.jsonl"),
        max_prompt_length=workload.SFT_PROMPT,
        max_completion_length=workload.SFT_LENGTH - workload.SFT_PROMPT,
        micro_batch_size=args.rows * 7 // 4,  # 144 tokens on average, and rows of the peers have 256
        batching="packing",
    )
    trainer.fit(
        SFTModule(
            str(args.folder / f"policy-{args.size}"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True)
        ),
        data,
    )
    workload.report(clock.seconds[1:], units=clock.tokens[1:], flops=6 * workload.num_matmul_parameters(args.size))


if __name__ == "__main__":
    main()
