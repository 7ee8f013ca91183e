"""Seconds of a training step on one ranking by this library: K completions, all pairs, one optimizer step."""

import torch
import work
from stepping import Clock, trainer_of

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.modules import RewardModule


def main() -> None:
    """Run."""
    args = work.arguments().parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock()
    trainer = trainer_of(args, clock)
    module = RewardModule(str(args.folder / "policy"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True))
    trainer.fit(module, ComparisonDataModule(str(args.folder / "rankings.jsonl"), micro_batch=1))
    work.report(clock.seconds[1:])


if __name__ == "__main__":
    main()
