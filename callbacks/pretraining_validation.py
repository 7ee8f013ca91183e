"""Loss on unseen pretraining text while a model is tuned: the alignment tax (§4.2), as a curve."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from lit_rlhf.data.loader import data_ranks
from lit_rlhf.data.pretraining import TextBlocks, collate_blocks, text_blocks
from lit_rlhf.errors import UserError
from lit_rlhf.models.lm_loss import causal_lm_loss


class PretrainingValidation(Callback):
    """Logs `validation/pretraining_loss`, the mean next-token loss of the trained model on text.

    Args:
        path: text that is not trained on: any source of `PretrainingDataModule`.
        every_n_epochs: epochs between two looks; one of PPO is an iteration. The last epoch always has one.
        seq_len: tokens a sequence.
        batch_size: sequences a forward pass, on each rank.
        limit: how many blocks, from the beginning; None: all.
    """

    def __init__(
        self,
        path: str,
        every_n_epochs: int = 1,
        seq_len: int = 512,
        batch_size: int = 32,
        limit: int | None = None,
    ) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"PretrainingValidation: {name} must be at least 1, got {value}")
        self.path, self.every_n_epochs, self.seq_len = path, every_n_epochs, seq_len
        self.batch_size, self.limit = batch_size, limit
        self.blocks: TextBlocks

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read and cut the text, once."""
        if stage == "fit" and not hasattr(self, "blocks"):
            if hasattr(pl_module, "check_max_positions"):
                pl_module.check_max_positions(self.seq_len, "PretrainingValidation: a block", "its seq_len")
            blocks = text_blocks(self.path, pl_module.tokenizer, self.seq_len).blocks
            self.blocks = TextBlocks(blocks[: self.limit])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Log, on all ranks together."""
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
        if last or trainer.should_stop or (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            total, count = trainer.strategy.reduce(self.sums(trainer, pl_module), reduce_op="sum").tolist()
            pl_module.log("validation/pretraining_loss", total / count, rank_zero_only=False)

    @torch.no_grad()
    def sums(self, trainer: Trainer, pl_module: Any) -> torch.Tensor:
        """Return the summed loss and the number of targets of this rank's share, (2,) float64."""
        model, sums = pl_module.exported, torch.zeros(2, dtype=torch.float64)
        training = model.training
        model.eval()
        ranks, rank = data_ranks(trainer)
        share = self.batch_size * ranks
        for start in range(0, len(self.blocks), share):
            # a rank without a block left reads the first one and counts nothing: sharded weights need every rank
            places = range(start + rank, start + share, ranks)
            mine = [self.blocks[place] for place in places if place < len(self.blocks)]
            text = collate_blocks(mine or [self.blocks[0]._replace(trained=False)], 1.0)
            batch = trainer.strategy.batch_to_device(text)
            with trainer.precision_plugin.forward_context():
                total, count = causal_lm_loss(model, batch.input_ids, batch.loss_mask, batch.attention_mask)
            sums += torch.stack([total.double(), count.double()]).cpu()
        model.train(training)
        return sums.to(pl_module.device)
