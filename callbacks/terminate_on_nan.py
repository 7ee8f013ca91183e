"""Stop at the first loss that is not a finite number."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlhf.errors import UserError


class TerminateOnNaN(Callback):
    """Stops before the backward pass of a NaN or infinite loss, so that weights and last checkpoint stay good."""

    batch_idx = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Remember which batch it is."""
        self.batch_idx = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss."""
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss.detach())} at step {trainer.global_step} (epoch {trainer.current_epoch}, "
                f"batch {self.batch_idx}); training stopped before it touched the weights, and the last checkpoint "
                "is good. Lower the learning rate, set trainer.gradient_clip_val, or look at that batch"
            )
