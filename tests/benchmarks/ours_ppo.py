"""Time a PPO iteration of this library: rollout, scoring and update, through the Trainer."""

import argparse
from typing import Any

import lightning as L
import torch
import workload

from lit_rlhf.data import PromptDataModule
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.modules import PPOConfig, PPOModule
from lit_rlhf.rewards import RewardModelScorer
from lit_rlhf.rollout.kl_controller import FixedKLController


class BiasedPPOModule(PPOModule):
    """PPO with a constant added to the end token's logit of policy and reference."""

    bias: float

    def configure_model(self) -> None:
        """Load the models and add the bias."""
        super().configure_model()
        for model in (self.policy, self.frozen["reference"]):
            workload.bias_end_token(model, self.bias)


class IterationClock(L.Callback):
    """Record the seconds and the mean response length of every epoch, which is an iteration."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.lengths: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.start = workload.clock(self.device)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Stop the clock."""
        self.seconds.append(workload.clock(self.device) - self.start)
        self.lengths.append(float(trainer.callback_metrics["response/length"]))


def build_run(args: argparse.Namespace, *callbacks: L.Callback) -> tuple[PPOModule, L.Trainer, PromptDataModule]:
    """Return what `trainer.fit` takes, for `updates` iterations and one before them."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(3)  # samples responses of 21.8 tokens on average where they end early, a third of the limit
    minibatch = args.episodes // 4
    micro_batch_size = min(args.micro_batch_size, minibatch // args.devices)
    module = BiasedPPOModule(
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
        loading=ModelLoadingConfig(compile=args.compile),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-6, fused=True),  # as TRL's by default
    )
    module.bias = args.bias
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
        callbacks=list(callbacks),
        default_root_dir=args.folder,
        **quiet,
    )
    return module, trainer, PromptDataModule(str(workload.prompt_file(args)), max_prompt_length=2048)


def main() -> None:
    """Time the steps and report."""
    parser = workload.build_ppo_parser()
    args = parser.parse_args()
    clock = IterationClock(args.device)
    module, trainer, prompts = build_run(args, clock)
    trainer.fit(module, prompts)
    if trainer.is_global_zero:
        length = sum(clock.lengths) / len(clock.lengths)
        tokens = args.episodes // args.samples * args.prompt + args.episodes * length
        # 2 FLOP per parameter and token: forward of rollout, reference, critic and reward model; two trained models
        # with 3 times a forward each
        workload.report(
            clock.seconds[1:], length=length, flops=(4 * 2 + 2 * 6) * workload.num_matmul_parameters(args.size) * tokens
        )


if __name__ == "__main__":
    main()
