"""Tokens per second and peak memory of an epoch; of a PPO iteration also its phases and the FLOPs utilization."""

import resource
import sys
import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

from lit_rlhf.models.flops import count_training_flops_per_token
from lit_rlhf.rollout.experience import Experience


class Throughput(Callback):
    """Log tokens per second and device, and the peak memory of the run, once per epoch.

    In PPO, whose epoch is an iteration, also seconds and tokens per second of generating, scoring, updating and the
    rest. The module itself logs `time/generate`, `time/score` and `time/rollout`. Tokens are counted over all ranks:
    response tokens for generating, prompt and response tokens for scoring, and the latter times the number of PPO
    epochs for the update.
    """

    def __init__(self) -> None:
        self.epoch_end = self.update_start = 0.0  # time.perf_counter()
        self.num_tokens = 0  # of an iteration
        self.tokens_before = 0  # this epoch
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock. The phases of the first iteration of a run that was resumed within it are not logged."""
        self.epoch_end, self.metrics, self.tokens_before = time.perf_counter(), {}, pl_module.num_tokens

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
            "throughput/score_tokens_per_sec": self.num_tokens / score,
        }
        module: Any = pl_module
        if not module.ppo.overlap_rollouts:  # else the time of generating is the time that the update did not cover
            generated = int(trajectories.response_mask.sum())
            self.metrics["throughput/generate_tokens_per_sec"] = generated / generate

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Add the metrics of the update and of the epoch, and log."""
        module, now, device = pl_module, time.perf_counter(), trainer.strategy.root_device
        if self.metrics:
            seconds, tokens = now - self.update_start, self.num_tokens * module.sizes.ppo_epochs
            self.metrics |= {"time/update": seconds, "throughput/update_tokens_per_sec": tokens / seconds}
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            available = get_available_flops(device, dtype)  # per second; None for unknown devices and CPUs
            if available:
                models = [model for model in (module.policy, module.critic) if model is not None]
                flops = tokens * sum(count_training_flops_per_token(model) for model in models)
                self.metrics["throughput/mfu"] = flops / (seconds * available * trainer.world_size)
        tokens = module.num_tokens - self.tokens_before
        self.metrics |= {
            "throughput/device_tokens_per_sec": tokens / (now - self.epoch_end) / trainer.world_size,
            "memory/peak_gib": read_peak_memory(device),
        }
        module.define_metrics(self.metrics, module.epoch_axis)
        module.log_dict(self.metrics)
        self.epoch_end, self.metrics, self.tokens_before = now, {}, module.num_tokens


def read_peak_memory(device: torch.device) -> float:
    """Return the largest memory in use so far, in GiB: of PyTorch's tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss counts bytes on macOS and kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
