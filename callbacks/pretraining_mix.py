"""PPO-ptx: pretraining gradients beside the stage's own (§3.5 Eq. 2, App. C.4); also the 10 % mix of SFT (App. C.3)."""

from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlhf.data.batches import PretrainingBatch
from lit_rlhf.data.loader import Cut
from lit_rlhf.data.pretraining import TextBlocks, text_blocks
from lit_rlhf.errors import UserError


class PretrainingMix(Callback):
    """Adds `coefficient` times the gradient of the mean language-modelling loss to every optimizer step.

    Before each batch of the stage, one backward pass over pretraining text goes into the same gradient buffer; the
    stage's own backward follows, then one step. The module needs nothing but a `training_step` that takes a
    `PretrainingBatch`. Which text a step reads depends on the step's number and the seed alone.

    Args:
        path: pretraining text: any source of `PretrainingDataModule`.
        coefficient: γ. The paper's 27.8 multiplies a loss whose reduction it does not state; here it is the mean over
            tokens, beside a policy loss that is a mean over tokens.
        micro_batch: pretraining sequences beside each micro-batch of the stage, on each rank. The paper draws 8 an
            episode.
        block_length: tokens a sequence.
        seed: of the order.
    """

    def __init__(
        self, path: str, coefficient: float = 27.8, micro_batch: int = 8, block_length: int = 512, seed: int = 0
    ) -> None:
        if coefficient < 0:
            raise UserError(f"PretrainingMix: coefficient must not be negative, got {coefficient}")
        if micro_batch < 1:
            raise UserError(f"PretrainingMix: micro_batch must be at least 1, got {micro_batch}")
        self.path, self.coefficient, self.micro_batch = path, coefficient, micro_batch
        self.block_length, self.seed = block_length, seed
        self.blocks: TextBlocks

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read and cut the text, once."""
        if stage == "fit" and not hasattr(self, "blocks"):
            if hasattr(pl_module, "require_positions"):
                pl_module.require_positions(self.block_length, "PretrainingMix: a block", "its block_length")
            self.blocks = text_blocks(self.path, pl_module.tokenizer, self.block_length, seed=self.seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the pretraining gradient into the buffer, first and unsynchronised.

        The stage's backward pass, which follows, then reduces both over the ranks at once. The reverse order, or a
        call past the strategy's wrapper, leaves ranks with different gradients and says nothing.
        """
        strategy, accumulate = trainer.strategy, trainer.accumulate_grad_batches
        cut = Cut(self.micro_batch, accumulate, trainer.world_size, trainer.global_rank)
        text = self.blocks.batch(trainer.global_step, batch_idx % accumulate, cut)
        mixed = strategy.batch_to_device(PretrainingBatch(*text))
        unsynchronised = getattr(strategy, "block_backward_sync", nullcontext)
        with unsynchronised():
            loss = strategy.training_step(mixed, batch_idx)
            assert isinstance(loss, Tensor)
            # Lightning divides the stage's loss by the accumulation itself, but not this one
            strategy.backward(self.coefficient * loss / accumulate, None)
