"""PPO-ptx: pretraining gradients in every optimizer step (§3.5 Eq. 2, App. C.4); also the mix of SFT (App. C.3)."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_rlhf.data.base import DataRequirements
from lit_rlhf.data.batches import PretrainingBatch
from lit_rlhf.data.loader import BatchShape, get_dp_world_size_and_rank
from lit_rlhf.data.pretraining import TextBlocks, load_text_blocks
from lit_rlhf.data.report import DataReader
from lit_rlhf.data.sources import DataSource, held_rows, source_key
from lit_rlhf.errors import UserError
from lit_rlhf.lineage.traceable import Traceable
from lit_rlhf.strategies import sharded_parameters, total_norm


class PretrainingMix(Callback, DataReader, Traceable):
    """Add `coefficient` times the gradient of the mean next-token loss on pretraining text to every optimizer step.

    Before each micro-batch of the stage, backward passes on pretraining text accumulate into the same gradients; the
    backward pass of the stage follows, then one optimizer step. The module needs a `training_step` that accepts a
    `PretrainingBatch`, and `epoch_means` for the metrics. The text of a step depends on the sequences before it and the
    seed alone: a run that is resumed with other sizes takes every sequence once, and one with another text, seq_len or
    seed begins that at its first sequence.

    Args:
        path: pretraining text, also rows in memory: any source of `PretrainingDataModule`.
        coefficient: γ. The paper's 27.8 multiplies a loss whose reduction it does not state; here both this loss and
            the policy loss are means over tokens.
        micro_batch_size: pretraining sequences per backward pass and rank.
        num_micro_batches: such passes per micro-batch of the stage. The paper samples 8 sequences per episode:
            micro_batch_size x num_micro_batches is then 8 times `ppo.micro_batch_size`.
        seq_len: tokens per sequence.
        seed: seed of the order.
        gradient_norms: log the norms of both gradients and their ratio at the first optimizer step of an epoch (of
            PPO: an iteration). At that step it takes the memory of one more gradient, and one more reduction over the
            ranks.
    """

    data_role = "pretraining text"

    def __init__(
        self,
        path: DataSource,
        coefficient: float = 27.8,
        micro_batch_size: int = 8,
        num_micro_batches: int = 1,
        seq_len: int = 512,
        seed: int = 0,
        gradient_norms: bool = True,
    ) -> None:
        if coefficient < 0:
            raise UserError(f"PretrainingMix: coefficient must not be negative, got {coefficient}")
        for name, value in (("micro_batch_size", micro_batch_size), ("num_micro_batches", num_micro_batches)):
            if value < 1:
                raise UserError(f"PretrainingMix: {name} must be at least 1, got {value}")
        self.path, self.coefficient, self.seq_len, self.seed = held_rows(path), coefficient, seq_len, seed
        self.micro_batch_size, self.num_micro_batches = micro_batch_size, num_micro_batches
        self.gradient_norms = gradient_norms
        self.blocks: TextBlocks | None = None  # read in `setup`
        self.separate_gradient = SeparateGradient()
        self.first_step = self.first_sequence = 0  # where this run began
        self.minibatch_size = 0  # sequences per optimizer step, set when training starts

    @property
    def state_key(self) -> str:
        """What decides the order of sequences: a position is one in that order."""
        return self._generate_state_key(path=source_key(self.path), seq_len=self.seq_len, seed=self.seed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the sequence of the checkpoint, or at the first."""
        self.first_step, self.minibatch_size = trainer.global_step, self.get_shape(trainer).minibatch_size

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the number of sequences that the optimizer steps so far took."""
        taken = (trainer.global_step - self.first_step) * self.minibatch_size
        checkpoint["callbacks"][self.state_key] = {"sequences": self.first_sequence + taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after these sequences."""
        self.first_sequence = state_dict["sequences"]

    def get_shape(self, trainer: Trainer) -> BatchShape:
        """Return how the sequences of an optimizer step are partitioned."""
        micro_batches = trainer.accumulate_grad_batches * self.num_micro_batches
        return BatchShape(self.micro_batch_size, micro_batches, *get_dp_world_size_and_rank(trainer))

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Load the text, once."""
        if stage == "fit" and self.blocks is None:
            if isinstance(pl_module, DataRequirements):
                pl_module.check_max_positions(self.seq_len, "PretrainingMix: a block", "its seq_len")
            self.blocks = load_text_blocks(self.path, pl_module.tokenizer, self.seq_len, seed=self.seed)
            self.reports = (self.blocks.report,) if self.blocks.report else ()

    def extra_tokens_per_step(self) -> int:
        """See `Traceable.extra_tokens_per_step`."""
        return self.minibatch_size * self.seq_len

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Accumulate the pretraining gradient, before that of the stage and without reducing it over the ranks.

        The backward pass of the stage then reduces both at once. In the reverse order, or without the strategy's
        wrapper, ranks would have different gradients without an error.
        """
        measures_norms = self.gradient_norms and batch_idx < trainer.accumulate_grad_batches
        with self.separate_gradient.capture(pl_module) if measures_norms else nullcontext():
            for index in range(self.num_micro_batches):
                self.backward(trainer, batch_idx, index)

    def backward(self, trainer: Trainer, batch_idx: int, index: int) -> None:
        """Run one backward pass on pretraining text.

        Args:
            trainer: the trainer.
            batch_idx: micro-batch of the stage.
            index: number of the pass within it.
        """
        assert self.blocks is not None
        strategy, accumulate = trainer.strategy, trainer.accumulate_grad_batches
        step = batch_idx % accumulate * self.num_micro_batches + index
        minibatch, shape = trainer.global_step - self.first_step, self.get_shape(trainer)
        text = self.blocks.get_batch(minibatch, step, shape, self.first_sequence)
        batch = strategy.batch_to_device(PretrainingBatch(*text))
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            loss = strategy.training_step(batch, batch_idx)
            assert isinstance(loss, Tensor)
            # Lightning divides the loss of the stage by accumulate_grad_batches, but not this one
            strategy.backward(self.coefficient * loss / accumulate, None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        """Log both norms, of the full step over all ranks: before the Trainer clips."""
        if self.separate_gradient.gradients:
            for name, norm in self.separate_gradient.compute_norms(trainer).items():
                pl_module.epoch_means.add(name, norm)
            self.separate_gradient = SeparateGradient()


class SeparateGradient:
    """A copy of the pretraining gradient of a step, without that of the stage."""

    def __init__(self) -> None:
        self.gradients: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def capture(self, module: nn.Module) -> Iterator[None]:
        """Add what is accumulated within the block, which goes to the gradients of the parameters as well."""
        previous = {parameter: parameter.grad for parameter in sharded_parameters(module).values()}
        for parameter in previous:
            parameter.grad = None
        yield
        for parameter, gradient in previous.items():
            added, parameter.grad = parameter.grad, gradient
            if added is None:
                continue
            if gradient is None:
                parameter.grad = added.clone()
            else:
                gradient.add_(added)
            self.gradients[parameter] = self.gradients[parameter] + added if parameter in self.gradients else added

    @torch.no_grad()
    def compute_norms(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the norms of both gradients over the weights that the text trains, and their ratio, () each."""
        scale, plugin = 1.0, trainer.precision_plugin
        # the gradients of the parameters are unscaled already, these copies are not
        if isinstance(plugin, MixedPrecision | FSDPPrecision) and plugin.scaler is not None:
            scale = plugin.scaler.get_scale()
        pretraining, stage = [], []
        for parameter, gradient in self.gradients.items():
            # sharded gradients were reduced in their backward pass
            is_reduced = isinstance(gradient, DTensor)
            reduced = (gradient if is_reduced else trainer.strategy.reduce(gradient, reduce_op="mean")) / scale
            pretraining.append(reduced)
            stage.append(torch.zeros_like(reduced) if parameter.grad is None else parameter.grad - reduced)
        pretraining_norm, stage_norm = total_norm(pretraining), total_norm(stage)
        return {
            "pretraining/grad_norm": pretraining_norm,
            "policy/grad_norm": stage_norm,
            "pretraining/grad_norm_ratio": pretraining_norm / stage_norm,
        }
