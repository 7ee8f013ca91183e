"""Where the time of a PPO iteration goes, in seconds, tokens a second, and of what the device could do."""

import time
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from torch import nn

from lit_rlhf.rollout.experience import Experience


class Throughput(Callback):
    """Logs seconds and tokens a second of generating, scoring, updating and the rest, once an iteration.

    Beside the module's own `time/generate`, `time/score` and `time/rollout`. Rates count the tokens of all ranks:
    those of responses for generating, prompts and responses for the others, every pass over them for the update.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count; a resumed iteration is left out, for part of it is over."""
        self.last, self.figures = time.perf_counter(), dict[str, float]()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The rollout is over: its tokens are known."""
        if not isinstance(batch, Experience) or not batch.rollout_metrics:
            return
        module: Any = pl_module
        self.updating, trajectories = time.perf_counter(), module.loader.iteration.trajectories
        self.tokens = int(trajectories.attention_mask.sum())
        generate, score, rollout = (
            float(batch.rollout_metrics[f"time/{each}"]) for each in ("generate", "score", "rollout")
        )
        self.figures = {
            "time/other": self.updating - self.last - rollout,
            "throughput/generate_tokens_per_sec": int(trajectories.response_mask.sum()) / generate,
            "throughput/score_tokens_per_sec": self.tokens / score,
        }

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The update is over: log."""
        module: Any = pl_module
        now = time.perf_counter()
        if self.figures:
            seconds, tokens = now - self.updating, self.tokens * module.sizes.epochs
            self.figures |= {"time/update": seconds, "throughput/update_tokens_per_sec": tokens / seconds}
            device, dtype = trainer.strategy.root_device, _plugin_to_compute_dtype(trainer.precision_plugin)
            available = get_available_flops(device, dtype)  # None for what Lightning has no figure of: a CPU
            if available:
                done = tokens * sum(
                    flops_per_token(each) for each in (module.policy, module.critic) if each is not None
                )
                self.figures["throughput/mfu"] = done / (seconds * available * trainer.world_size)
            module.log_dict(self.figures)
        self.last, self.figures = now, {}


def flops_per_token(model: nn.Module) -> int:
    """Floating-point operations of forward and backward pass a token: 6 for a trained weight, 4 for a frozen one.

    Attention's own, which grow with the length, are left out, as is usual (Kaplan et al., 2020, section 2.1).
    """
    with torch.no_grad():
        return sum((6 if weight.requires_grad else 4) * weight.numel() for weight in model.parameters())
