"""Durations of the phases of a PPO iteration, tokens per second, and model FLOPs utilization (MFU)."""

import time
from typing import Any

from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

from lit_rlhf.models.flops import count_training_flops_per_token
from lit_rlhf.rollout.experience import Experience


class Throughput(Callback):
    """Log seconds and tokens per second of generating, scoring, updating and the rest, once per iteration.

    The module itself logs `time/generate`, `time/score` and `time/rollout`. Tokens are counted over all ranks:
    response tokens for generating, prompt and response tokens for scoring, and the latter times the number of PPO
    epochs for the update.
    """

    def __init__(self) -> None:
        self.epoch_end = self.update_start = 0.0  # time.perf_counter()
        self.num_tokens = 0
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock. The first iteration of a run that was resumed within it is not logged."""
        self.epoch_end, self.metrics = time.perf_counter(), {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Read times and tokens of the rollout at the first micro-batch of an iteration."""
        if not isinstance(batch, Experience) or not batch.rollout_metrics:
            return
        loader: Any = trainer.train_dataloader
        self.update_start, trajectories = time.perf_counter(), loader.iteration.trajectories
        self.num_tokens = int(trajectories.attention_mask.sum())
        generate, score, rollout = (
            float(batch.rollout_metrics[f"time/{phase}"]) for phase in ("generate", "score", "rollout")
        )
        self.metrics = {
            "time/other": self.update_start - self.epoch_end - rollout,
            "throughput/generate_tokens_per_sec": int(trajectories.response_mask.sum()) / generate,
            "throughput/score_tokens_per_sec": self.num_tokens / score,
        }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the metrics of the update, and log."""
        module: Any = pl_module
        now = time.perf_counter()
        if self.metrics:
            seconds, tokens = now - self.update_start, self.num_tokens * module.sizes.ppo_epochs
            self.metrics |= {"time/update": seconds, "throughput/update_tokens_per_sec": tokens / seconds}
            device, dtype = trainer.strategy.root_device, _plugin_to_compute_dtype(trainer.precision_plugin)
            available = get_available_flops(device, dtype)  # per second; None for unknown devices and CPUs
            if available:
                models = [model for model in (module.policy, module.critic) if model is not None]
                flops = tokens * sum(count_training_flops_per_token(model) for model in models)
                self.metrics["throughput/mfu"] = flops / (seconds * available * trainer.world_size)
            module.log_dict(self.metrics)
        self.epoch_end, self.metrics = now, {}
