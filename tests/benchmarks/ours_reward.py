"""Time a reward-model step of this library on one ranking: K completions, all pairs, one optimizer step."""

import json

import torch
import workload
from step_clock import StepClock, build_trainer

from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.modules import RewardModule


def main() -> None:
    """Time the steps and report."""
    args = workload.build_reward_parser().parse_args()
    torch.set_num_threads(args.threads)
    clock = StepClock(args.device)
    trainer = build_trainer(args, clock)
    module = RewardModule(
        str(args.folder / f"policy-{args.size}"), lambda groups: torch.optim.AdamW(groups, lr=1e-5, fused=True)
    )
    trainer.fit(module, ComparisonDataModule(str(args.folder / args.rankings), micro_batch_size=1))
    completions = len(json.loads((args.folder / args.rankings).read_text().splitlines()[0])["completions"])
    tokens = workload.RANKED_PROMPT + completions * workload.RANKED_COMPLETION
    workload.report(clock.seconds[1:], flops=6 * workload.num_matmul_parameters(args.size, head=False) * tokens)


if __name__ == "__main__":
    main()
