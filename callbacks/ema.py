"""Exponential moving average of the trained weights (App. C.4: decay 0.992)."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import AveragedModel

from lit_rlhf.checkpoints import save_last_step
from lit_rlhf.errors import UserError
from lit_rlhf.models.export import AVERAGE_KEY
from lit_rlhf.strategies import sharded_parameters


class TrainableParameters(nn.Module):
    """The trainable parameters of a module: the same tensors, without frozen ones and submodules."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in sharded_parameters(module).items():
            self.register_parameter(name.replace(".", "/"), parameter)  # a name must not contain a dot

    def to_dict(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in the original module."""
        return {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging` for trainable parameters only, sharded ones (FSDP2) included.

    Lightning's class copies the full module with its frozen models, and cannot copy a sharded one. The rest is the
    same: the average starts with the weights after the first optimizer step and is updated after every further one;
    validation uses the average, and the module has it when training ends. So do `validate`, `test` and `predict` of a
    checkpoint, which has the current weights in `state_dict`, and the average under its own key; `lit-rlhf export
    --weights=average` or `current` writes either.

    The average of half-precision weights is kept in float32: a step of (1 - decay) times a difference would be rounded
    away.

    Args:
        decay: decay of the average per optimizer step. The paper gives 0.992 without its unit.
        device: device of the average; by default that of the weights.
    """

    def __init__(self, decay: float = 0.992, device: str | torch.device | None = None) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be at least 0 and below 1, got {decay}")
        super().__init__(device=device, use_buffers=False, decay=decay)
        # converted before the product, which would be rounded too
        self._kwargs["avg_fn"] = lambda average, current, _: decay * average + (1 - decay) * current.to(average.dtype)
        self.trainable: TrainableParameters | None = None
        self.checkpoint_average: dict[str, Any] = {}  # from the checkpoint, until training starts
        self.is_swapped = False  # whether the average is in the place of the weights
        self.current: dict[str, Tensor] = {}  # then the weights that are of another dtype than the average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; the average begins in `on_train_start`, as the weights are not loaded yet."""
        self.trainable, self._average_model, self._latest_update_step = None, None, 0
        self.checkpoint_average, self.current, self.is_swapped = {}, {}, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with the current weights, or with the average of the checkpoint."""
        self.trainable = TrainableParameters(pl_module)
        self._average_model = AveragedModel(self.trainable, self._device, use_buffers=False, **self._kwargs)
        dtypes = (parameter.dtype for parameter in self.trainable.parameters())
        self._average_model.module.to(reduce(torch.promote_types, dtypes, torch.float32))
        if self.checkpoint_average:
            self.load_average(self.checkpoint_average)
            self.checkpoint_average = {}
        else:  # also if the run is resumed: the first update is after the next optimizer step
            self._latest_update_step = trainer.global_step

    def get_average(self) -> dict[str, nn.Parameter]:
        """Return the averaged parameters by their names in the module."""
        assert self._average_model is not None
        average = self._average_model.module
        assert isinstance(average, TrainableParameters)
        return average.to_dict()

    def load_average(self, average: dict[str, Any]) -> None:
        """Continue with the average of a checkpoint.

        Args:
            average: what the checkpoint holds under `AVERAGE_KEY`.
        """
        assert self._average_model is not None
        self._average_model.n_averaged.fill_(average["updates"])
        load_parameters(self.get_average(), average["weights"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the average after an optimizer step."""
        super().on_train_batch_end(trainer, self.trainable, *args)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the average to the module, after the current weights are in the last checkpoint."""
        save_last_step(trainer)
        sharded_parameters(pl_module)  # so that the next forward pass gathers what is written here
        self._copy_average_to_current(self.trainable)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the average for all hooks of the validation."""
        if self._average_model is not None:
            self._swap_models(pl_module)
        elif not trainer.sanity_checking:
            self.use_checkpoint_average(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test the average of a checkpoint."""
        self.use_checkpoint_average(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict with the average of a checkpoint."""
        self.use_checkpoint_average(pl_module)

    def use_checkpoint_average(self, pl_module: LightningModule) -> None:
        """Copy the average of a checkpoint, if one was loaded, to the module, which has its current weights."""
        if self.checkpoint_average:
            load_parameters(TrainableParameters(pl_module).to_dict(), self.checkpoint_average["weights"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap the current weights back."""
        if self._average_model is not None:
            self._swap_models(pl_module)

    @torch.no_grad()
    def _swap_models(self, pl_module: LightningModule) -> None:
        """Put the average in the place of the current weights, or the current weights back.

        They are exchanged, without a further copy, except in half precision, which would round the average.
        """
        sharded_parameters(pl_module)  # so that the next forward pass gathers what is written here
        assert self.trainable is not None
        parameters, average = self.trainable.to_dict(), self.get_average()
        for name, parameter in parameters.items():
            weight = parameter.detach().clone()
            if parameter.dtype == average[name].dtype:
                parameter.copy_(average[name])
                average[name].copy_(weight)
            elif self.is_swapped:
                parameter.copy_(self.current.pop(name))
            else:
                self.current[name] = weight.to(average[name].device)
                parameter.copy_(average[name])
        self.is_swapped = not self.is_swapped

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: `on_validation_start` swaps earlier than Lightning's class does here."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: `on_validation_end` swaps later than Lightning's class does here."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the unsharded average; a collective call."""
        if self._average_model is not None:
            weights = {name: full_tensor_copy(parameter) for name, parameter in self.get_average().items()}
            for name, first in tied_names(pl_module).items():
                if first in weights:
                    weights[name] = weights[first]
            checkpoint[AVERAGE_KEY] = {"weights": weights, "updates": int(self._average_model.n_averaged)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average of the checkpoint until the weights are loaded."""
        self.checkpoint_average = checkpoint.get(AVERAGE_KEY, {})


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return the further names of tied weights, each with the first one: `state_dict` has all of them."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    every = module.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if name != first[id(parameter)]}


def full_tensor_copy(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter on the CPU, unsharded."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


@torch.no_grad()
def load_parameters(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Copy unsharded weights into the parameters of the same name; into sharded ones, each rank its shard.

    Raises:
        UserError: a parameter that is trained now has no average in the checkpoint.
    """
    for name, parameter in parameters.items():
        if name not in weights:
            raise UserError(f"ckpt_path: the checkpoint's average lacks the weight {name!r} that this recipe trains")
        value = weights[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def restore_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Copy to the module what a weight-averaging callback copies at the end of training; idempotent."""
    for callback in averaging_callbacks(trainer):
        callback.on_train_end(trainer, pl_module)


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Within the context, the module has the average of a weight-averaging callback, in a validation or not."""
    swapped = [each for each in averaging_callbacks(trainer) if not (isinstance(each, EMA) and each.is_swapped)]
    for callback in swapped:
        callback._swap_models(pl_module)
    try:
        yield
    finally:
        for callback in swapped:
            callback._swap_models(pl_module)


def load_averages(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Go back to the averages of a checkpoint in the middle of a run; without one, begin again from its weights."""
    average = checkpoint.get(AVERAGE_KEY, {"weights": checkpoint["state_dict"], "updates": 0})
    for callback in averaging_callbacks(trainer):
        if isinstance(callback, EMA):
            callback.load_average(average)


def averaging_callbacks(trainer: Trainer) -> list[WeightAveraging]:
    """Return the callbacks that average weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
