"""Seconds of a PPO update by this library: rollout, scoring and update, through the Trainer."""

from typing import Any

import lightning as L
import torch
import work

from lit_rlhf.data import PromptDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.rollout.kl_controller import FixedKLController


class Biased(PPOModule):
    """Policy and reference with a constant on the end token's logit."""

    bias: float

    def configure_model(self) -> None:
        """Load, then bias."""
        super().configure_model()
        for model in (self.policy, self.frozen["reference"]):
            work.bias_end(model, self.bias)


class Clock(L.Callback):
    """Seconds of every epoch (an iteration), and tokens of every response."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.lengths: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start."""
        self.start = work.clock(self.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop."""
        self.seconds.append(work.clock(self.device) - self.start)
        self.lengths.append(float(trainer.callback_metrics["response/length"]))


def main() -> None:
    """Run."""
    parser = work.ppo_arguments()
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(3)  # of the responses: where they end early, 21.8 tokens on average, a third of the limit
    minibatch = args.episodes // 4
    micro_batch_size = min(args.micro_batch_size, minibatch // args.devices)
    module = Biased(
        model=str(args.folder / f"policy-{args.size}"),
        reward=RewardModelScorer(str(args.folder / f"reward-{args.size}"), require_centered=False),
        sampling=SamplingParams(max_new_tokens=args.response),
        ppo=PPOConfig(
            rollout_batch_size=args.episodes,
            samples_per_prompt=args.samples,
            micro_batch_size=micro_batch_size,
            critic_learning_rate=3e-6,
        ),
        kl=FixedKLController(0.05),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-6, fused=True),  # as TRL's by default
    )
    module.bias = args.bias
    clock = Clock(args.device)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator=args.device,
        devices=args.devices,
        strategy="auto" if args.devices == 1 else "ddp",
        max_epochs=args.updates + 1,
        precision=args.precision,
        accumulate_grad_batches=minibatch // (micro_batch_size * args.devices),
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[clock],
        default_root_dir=args.folder,
        **quiet,
    )
    trainer.fit(module, PromptDataModule(str(work.prompt_file(args)), max_prompt_length=2048))
    if trainer.is_global_zero:
        length = sum(clock.lengths) / len(clock.lengths)
        tokens = args.episodes // args.samples * args.prompt + args.episodes * length
        # a product is 2 operations a parameter: rollout, reference, critic and reward model forward; two updates
        # of three products each
        work.report(clock.seconds[1:], length=length, flops=(4 * 2 + 2 * 6) * work.parameters(args.size) * tokens)


if __name__ == "__main__":
    main()
