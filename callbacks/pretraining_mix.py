"""PPO-ptx: pretraining gradients beside the stage's own (§3.5 Eq. 2, App. C.4); also the 10 % mix of SFT (App. C.3)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf.data.batches import PretrainingBatch
from lit_rlhf.data.loader import BatchShape, data_ranks
from lit_rlhf.data.pretraining import TextBlocks, text_blocks
from lit_rlhf.errors import UserError
from lit_rlhf.strategies import total_norm


class PretrainingMix(Callback):
    """Adds `coefficient` times the gradient of the mean language-modelling loss to every optimizer step.

    Before each batch of the stage, backward passes over pretraining text go into the same gradient buffer; the stage's
    own backward follows, then one step. The module needs a `training_step` that takes a `PretrainingBatch`, and a
    `tally` for what is logged. Which text a step reads depends on the step's number and the seed alone.

    Args:
        path: pretraining text: any source of `PretrainingDataModule`.
        coefficient: γ. The paper's 27.8 multiplies a loss whose reduction it does not state; here it is the mean over
            tokens, beside a policy loss that is a mean over tokens.
        micro_batch_size: pretraining sequences a backward pass, on each rank.
        num_micro_batches: such passes beside each micro-batch of the stage. The paper draws 8 sequences an episode: micro_batch_size x
            passes is 8 times `ppo.micro_batch_size`.
        seq_len: tokens a sequence.
        seed: of the order.
        gradient_norms: log the norms of both gradients and their ratio, at the first optimizer step of an epoch (of
            PPO: an iteration). Takes the memory of one more gradient, and between ranks one more reduction then.
    """

    def __init__(
        self,
        path: str,
        coefficient: float = 27.8,
        micro_batch_size: int = 8,
        num_micro_batches: int = 1,
        seq_len: int = 512,
        seed: int = 0,
        gradient_norms: bool = True,
    ) -> None:
        if coefficient < 0:
            raise UserError(f"PretrainingMix: coefficient must not be negative, got {coefficient}")
        for name, value in (("micro_batch_size", micro_batch_size), ("passes", num_micro_batches)):
            if value < 1:
                raise UserError(f"PretrainingMix: {name} must be at least 1, got {value}")
        self.path, self.coefficient, self.micro_batch_size, self.num_micro_batches = (
            path,
            coefficient,
            micro_batch_size,
            num_micro_batches,
        )
        self.seq_len, self.seed, self.gradient_norms = seq_len, seed, gradient_norms
        self.blocks: TextBlocks
        self.apart = SeparateGradient()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Read and cut the text, once."""
        if stage == "fit" and not hasattr(self, "blocks"):
            if hasattr(pl_module, "check_max_positions"):
                pl_module.check_max_positions(self.seq_len, "PretrainingMix: a block", "its seq_len")
            self.blocks = text_blocks(self.path, pl_module.tokenizer, self.seq_len, seed=self.seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the pretraining gradient into the buffer, first and unsynchronised.

        The stage's backward pass, which follows, then reduces both over the ranks at once. The reverse order, or a
        call past the strategy's wrapper, leaves ranks with different gradients and says nothing.
        """
        measured = self.gradient_norms and batch_idx < trainer.accumulate_grad_batches
        with self.apart.kept(pl_module) if measured else nullcontext():
            for number in range(self.num_micro_batches):
                self.backward(trainer, batch_idx, number)

    def backward(self, trainer: Trainer, batch_idx: int, number: int) -> None:
        """Do the pass of that number beside a micro-batch of the stage."""
        strategy, accumulate = trainer.strategy, trainer.accumulate_grad_batches
        cut = BatchShape(self.micro_batch_size, accumulate * self.num_micro_batches, *data_ranks(trainer))
        text = self.blocks.batch(trainer.global_step, batch_idx % accumulate * self.num_micro_batches + number, cut)
        mixed = strategy.batch_to_device(PretrainingBatch(*text))
        unsynchronised = getattr(strategy, "block_backward_sync", nullcontext)
        with unsynchronised():
            loss = strategy.training_step(mixed, batch_idx)
            assert isinstance(loss, Tensor)
            # Lightning divides the stage's loss by the accumulation itself, but not this one
            strategy.backward(self.coefficient * loss / accumulate, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Log both norms, of the whole step: before the Trainer clips, and over all ranks."""
        if self.apart:
            for name, figure in self.apart.norms(trainer).items():
                pl_module.tally.add(name, figure)
            self.apart = SeparateGradient()


class SeparateGradient:
    """The pretraining gradient of a step by itself, beside the buffer in which it is added to the stage's."""

    def __init__(self) -> None:
        self.sums: dict[nn.Parameter, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self.sums)

    @contextmanager
    def kept(self, module: nn.Module) -> Iterator[None]:
        """Add what is accumulated within the block; the buffer gets it as well, as without this."""
        buffer = {parameter: parameter.grad for parameter in module.parameters() if parameter.requires_grad}
        for parameter in buffer:
            parameter.grad = None
        yield
        for parameter, held in buffer.items():
            added, parameter.grad = parameter.grad, held
            if added is None:
                continue
            if held is None:
                parameter.grad = added.clone()
            else:
                held.add_(added)
            self.sums[parameter] = self.sums[parameter] + added if parameter in self.sums else added

    @torch.no_grad()
    def norms(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the norms of both gradients over the weights that the text trains, and their ratio, () each."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # the buffer was unscaled by now, this was not
        scale = 1.0 if scaler is None else scaler.get_scale()
        text, stage = [], []
        for parameter, own in self.sums.items():
            # sharded gradients were reduced in their backward pass
            whole = (own if hasattr(own, "full_tensor") else trainer.strategy.reduce(own, reduce_op="mean")) / scale
            text.append(whole)
            stage.append(torch.zeros_like(whole) if parameter.grad is None else parameter.grad - whole)
        mixed, other = total_norm(text), total_norm(stage)
        return {
            "pretraining/grad_norm": mixed,
            "policy/grad_norm": other,
            "pretraining/grad_norm_ratio": mixed / other,
        }
