"""PPO-ptx: pretraining gradients beside those of the stage (§3.5 Eq. 2, App. C.4); also the 10 % mix of SFT (App. C.3)."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlhf.data.batches import PretrainingBatch, TokenBatch
from lit_rlhf.data.loader import PlannedLoader
from lit_rlhf.data.pretraining import collate_blocks, text_blocks
from lit_rlhf.errors import UserError


class PretrainingMix(Callback):
    """Adds `coefficient` times the gradient of the mean language-modelling loss to every optimizer step.

    Before each batch of the stage, one backward pass over pretraining text goes into the same gradient buffer; the
    stage's own backward follows, then one step. The module needs nothing but a `training_step` that takes a
    `PretrainingBatch`.

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
        self.path, self.coefficient, self.micro_batch = path, coefficient, micro_batch
        self.block_length, self.seed = block_length, seed
        self.loader: PlannedLoader
        self.batches: Iterator[TokenBatch]
        self.restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read and cut the text, once."""
        if stage != "fit" or hasattr(self, "loader"):
            return
        tokenizer = pl_module.tokenizer
        self.loader = PlannedLoader(
            rows=text_blocks(self.path, tokenizer, self.block_length),
            collate=lambda rows, normalizer: collate_blocks(rows, normalizer, tokenizer.pad_token_id),
            micro_batch=self.micro_batch,
            accumulate=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
            rank=trainer.global_rank,
            seed=self.seed,
            shuffle=True,
            weight=lambda block: len(block) - 1,
        )
        if self.restored is not None:
            self.loader.load_state_dict(self.restored)
        self.batches = self.forever()

    def forever(self) -> Iterator[TokenBatch]:
        """Yield batches, pass after pass, each in its own order."""
        while True:
            yield from self.loader

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the pretraining gradient into the buffer, first and unsynchronised.

        The stage's backward pass, which follows, then reduces both over the ranks at once. The reverse order, or a
        call past the strategy's wrapper, leaves ranks with different gradients and says nothing.
        """
        strategy = trainer.strategy
        mixed = strategy.batch_to_device(PretrainingBatch(*next(self.batches)))
        unsynchronised = getattr(strategy, "block_backward_sync", nullcontext)
        with unsynchronised():
            loss = strategy.training_step(mixed, batch_idx)
            assert isinstance(loss, Tensor)
            strategy.backward(self.coefficient * loss / trainer.accumulate_grad_batches, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the text."""
        return self.loader.state_dict() if hasattr(self, "loader") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.restored = state_dict
        if hasattr(self, "loader"):
            self.loader.load_state_dict(state_dict)
            self.batches = self.forever()
