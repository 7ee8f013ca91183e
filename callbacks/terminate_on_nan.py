"""Stop training at the first loss that is not finite."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlhf.errors import UserError


class TerminateOnNaN(Callback):
    """Stop before the backward pass of a NaN or infinite loss, so that weights and last checkpoint stay valid."""

    def __init__(self) -> None:
        self.batch_idx = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Store the batch index for the error message."""
        self.batch_idx = batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Check the loss.

        Raises:
            UserError: the loss is NaN or infinite.
        """
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is {float(loss.detach())} at step {trainer.global_step} (epoch {trainer.current_epoch}, "
                f"batch {self.batch_idx}); training stopped before it touched the weights, and the last checkpoint "
                "is good. Lower the learning rate, set trainer.gradient_clip_val, or look at that batch"
            )
