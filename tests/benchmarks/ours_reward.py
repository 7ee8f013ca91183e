"""Seconds of a training step on one ranking by this library: K completions, all pairs, one optimizer step."""

import torch
import work
from stepping import Clock, trainer_of

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.modules import RewardModule


def main() -> None:
    """Run."""
    parser = work.arguments()
    parser.add_argument("--rankings", default="rankings-9.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = Clock(args.device)
    trainer = trainer_of(args, clock)
    module = RewardModule(
        str(args.folder / f"policy-{args.size}"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True)
    )
    trainer.fit(module, ComparisonDataModule(str(args.folder / args.rankings), micro_batch_size=1))
    work.report(clock.seconds[1:])


if __name__ == "__main__":
    main()
