"""An exponential moving average of the trained weights (App. C.4: 0.992)."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lit_rlhf.errors import UserError
from lit_rlhf.models.export import AVERAGE_KEY


class Trained(nn.Module):
    """The trained parameters of a module, the same tensors, without the rest of it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)

    def named(self) -> dict[str, nn.Parameter]:
        """Return them by the names that the module has for them."""
        return {name.replace("/", "."): parameter for name, parameter in self.named_parameters()}


class EMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, of what is trained alone, and of weights that are sharded (FSDP2) as well.

    Lightning's copies the whole module, frozen models with it, and cannot copy a sharded one. Otherwise it is that:
    updated after every optimizer step, from the weights after the first; validation sees the average, and when training
    ends the module holds it. A checkpoint has the current weights in `state_dict` and the average beside them;
    `lit-rlhf export --weights=average` or `current` writes either.

    Args:
        decay: of the average, an optimizer step. The paper's 0.992 does not say of what.
        device: where the average lies; by default where the weights are.
    """

    def __init__(self, decay: float = 0.992, device: str | None = None) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be at least 0 and below 1, got {decay}")
        super().__init__(device=device, use_buffers=False, decay=decay)
        self.trained: Trained
        self.stored: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: the weights are not there."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the weights as they are, or go on with the average of the checkpoint."""
        self.trained = Trained(pl_module)
        self._average_model = AveragedModel(self.trained, self._device, use_buffers=False, **self._kwargs)
        if self.stored:
            self._average_model.n_averaged.fill_(self.stored["updates"])
            give(self.average(), self.stored["weights"])
            self.stored = {}

    def average(self) -> dict[str, nn.Parameter]:
        """Return the average by the module's names."""
        assert self._average_model is not None
        inner = self._average_model.module
        assert isinstance(inner, Trained)
        return inner.named()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update after an optimizer step."""
        super().on_train_batch_end(trainer, self.trained, *args)  # type: ignore[arg-type]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module."""
        self._copy_average_to_current(self.trained)  # type: ignore[arg-type]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average: before any other callback looks, and until all have."""
        if self._average_model is not None:
            self._swap_models(self.trained)  # type: ignore[arg-type]
        elif self.stored and not trainer.sanity_checking:
            # `lit-rlhf validate`: the module holds the current weights of the checkpoint
            give(Trained(pl_module).named(), self.stored["weights"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the current weights back."""
        if self._average_model is not None:
            self._swap_models(self.trained)  # type: ignore[arg-type]

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see `on_validation_start`."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: see `on_validation_end`."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the average, whole; every rank must call it."""
        if self._average_model is not None:
            weights = {name: full_tensor_copy(parameter) for name, parameter in self.average().items()}
            checkpoint[AVERAGE_KEY] = {"weights": weights, "updates": int(self._average_model.n_averaged)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what was stored until there are weights to give it to."""
        self.stored = checkpoint.get(AVERAGE_KEY, {})


def full_tensor_copy(parameter: Tensor) -> Tensor:
    """Return a parameter on the CPU, gathered where it is sharded."""
    value = parameter.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().clone()


@torch.no_grad()
def give(parameters: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> None:
    """Set parameters by name, each rank its shard where they are sharded.

    Raises:
        UserError: a parameter that is trained now has no average in the checkpoint.
    """
    for name, parameter in parameters.items():
        if name not in weights:
            raise UserError(f"ckpt_path: the checkpoint's average lacks the weight {name!r} that this recipe trains")
        value = weights[name].to(parameter.device)
        if hasattr(parameter, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
        parameter.copy_(value)


def restore_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Leave in the module what a weight-averaging callback will leave there when training ends; done twice, no harm."""
    averaging: list[Callback] = [
        each
        for each in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(each, WeightAveraging)
    ]
    for callback in averaging:
        callback.on_train_end(trainer, pl_module)
