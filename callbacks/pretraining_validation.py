"""Loss on unseen pretraining text during fine-tuning: the alignment tax (§4.2)."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_rlhf.data.base import DataRequirements
from lit_rlhf.data.loader import get_dp_world_size_and_rank
from lit_rlhf.data.pretraining import TextBlocks, collate_blocks, load_text_blocks
from lit_rlhf.data.report import DataReader
from lit_rlhf.data.sources import DataSource, held_rows
from lit_rlhf.errors import UserError
from lit_rlhf.models.lm_loss import causal_lm_loss


class PretrainingValidation(Callback, DataReader):
    """Log `validation/pretraining_loss`, the mean next-token loss of the trained model on text.

    Args:
        path: text that is not trained on: any source of `PretrainingDataModule`.
        every_n_epochs: epochs between two evaluations (of PPO: iterations). The last epoch is always evaluated.
        seq_len: tokens per sequence.
        batch_size: sequences per forward pass and rank.
        limit: maximum number of sequences; None: all.
    """

    data_role = "pretraining text, validation"

    def __init__(
        self,
        path: DataSource,
        every_n_epochs: int = 1,
        seq_len: int = 512,
        batch_size: int = 32,
        limit: int | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"PretrainingValidation: {name} must be at least 1, got {value}")
        self.path, self.every_n_epochs, self.seq_len = held_rows(path), every_n_epochs, seq_len
        self.batch_size, self.limit = batch_size, limit
        self.blocks: TextBlocks | None = None  # read in `setup`

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load the text, once."""
        if stage == "fit" and self.blocks is None:
            if isinstance(pl_module, DataRequirements):
                pl_module.check_max_positions(self.seq_len, "PretrainingValidation: a block", "its seq_len")
            text = load_text_blocks(self.path, pl_module.tokenizer, self.seq_len)
            self.blocks, self.reports = TextBlocks(text.blocks[: self.limit]), (text.report,) if text.report else ()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log the loss; a collective call."""
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if last or trainer.should_stop or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            total, count = trainer.strategy.reduce(self.sum_losses(trainer, pl_module), reduce_op="sum").tolist()
            pl_module.log("validation/pretraining_loss", total / count, rank_zero_only=False)

    @torch.no_grad()
    def sum_losses(self, trainer: Trainer, pl_module: Any) -> torch.Tensor:
        """Return the sum of the loss and the number of targets over the sequences of this rank, (2,) float64."""
        assert self.blocks is not None
        model, sums = pl_module.exported_model, torch.zeros(2, dtype=torch.float64)
        training = model.training
        model.eval()
        world_size, rank = get_dp_world_size_and_rank(trainer)
        step = self.batch_size * world_size
        for start in range(0, len(self.blocks), step):
            # with sharded weights every rank must call the model: one without a block left takes one without targets
            indices = range(start + rank, start + step, world_size)
            blocks = [self.blocks[index] for index in indices if index < len(self.blocks)]
            text = collate_blocks(blocks or [self.blocks[0]._replace(has_targets=False)], 1.0)
            batch = trainer.strategy.batch_to_device(text)
            with trainer.precision_plugin.forward_context():
                total, count = causal_lm_loss(model, batch.input_ids, batch.loss_mask, batch.attention_mask)
            sums += torch.stack([total.double(), count.double()]).cpu()
        model.train(training)
        return sums.to(pl_module.device)
