"""Histograms of scores, advantages and probability ratios of PPO, for loggers that draw them."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.loggers import Histogram, log_histograms, media_loggers
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.experience_loader import ExperienceLoader

NUM_BINS = 64


class LogHistograms(Callback):
    """Log histograms of an iteration: scores, advantages, and the ratios π(y_t) / π_old(y_t) of its update.

    Scores and advantages are those of all ranks, ratios those of rank zero's micro-batches. Ratios outside 0 to
    `max_ratio` are counted in the first and the last bin. Nothing is computed if no logger draws histograms
    (`lit_rlhf.loggers.media_loggers`).

    Args:
        every_n_epochs: iterations between two of each histogram.
        max_ratio: upper edge of the last bin of the ratios.

    Raises:
        UserError: `every_n_epochs` is below 1.
    """

    def __init__(self, every_n_epochs: int = 1, max_ratio: float = 2.0) -> None:
        if every_n_epochs < 1:
            raise UserError(f"LogHistograms: every_n_epochs must be 1 or more, got {every_n_epochs}")
        self.every_n_epochs, self.max_ratio = every_n_epochs, max_ratio
        self.ratio_counts = torch.zeros(NUM_BINS)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether this iteration is logged, by this rank."""
        due = trainer.is_global_zero and trainer.current_epoch % self.every_n_epochs == 0
        return due and bool(media_loggers(trainer.loggers))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin to count."""
        self.ratio_counts = torch.zeros(NUM_BINS)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the ratios of a micro-batch."""
        if isinstance(batch, Experience) and pl_module.log_ratios is not None and self.is_due(trainer):
            ratios = pl_module.log_ratios.exp().clamp(0, self.max_ratio)  # NaN, outside responses, is in no bin
            counts = torch.histc(ratios.nan_to_num(-1.0).float(), NUM_BINS, 0.0, self.max_ratio)
            self.ratio_counts = self.ratio_counts.to(counts.device) + counts

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log."""
        loader: Any = trainer.train_dataloader
        if not isinstance(loader, ExperienceLoader) or loader.iteration is None or not self.is_due(trainer):
            return
        trajectories, advantages = loader.iteration.trajectories, loader.iteration.advantages
        edges = torch.linspace(0, self.max_ratio, NUM_BINS + 1).tolist()
        histograms = {
            "histogram/scores": count_in_bins(trajectories.scores),
            "histogram/advantages": count_in_bins(advantages[trajectories.response_mask]),
            "histogram/ratios": Histogram(self.ratio_counts.tolist(), edges),
        }
        log_histograms(trainer.loggers, histograms, trainer.global_step, **pl_module.axes())


def count_in_bins(values: Tensor) -> Histogram:
    """Return a histogram of values, (N,), from the smallest to the largest one."""
    low, high = float(values.min()), float(values.max())
    if not low < high:  # histc would then widen the interval by itself
        low, high = low - 0.5, math.nextafter(high, math.inf) + 0.5
    counts = torch.histc(values.float(), NUM_BINS, low, high)
    return Histogram(counts.tolist(), torch.linspace(low, high, NUM_BINS + 1).tolist())
