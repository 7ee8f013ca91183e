"""Base of the three modules: tokenizer, optimizer, loss normalization, metrics, and what a checkpoint contains."""

import json
import math
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.data.base import DataRequirements
from lit_rlhf.data.loader import get_dp_world_size_and_rank
from lit_rlhf.distributed import all_gather_object
from lit_rlhf.errors import UserError
from lit_rlhf.models.export import CHECKPOINT_KEY, describe_model
from lit_rlhf.models.fingerprint import model_fingerprint
from lit_rlhf.models.loading import load_config, load_tokenizer, max_positions
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.modules.epoch_metrics import EpochMeans
from lit_rlhf.modules.random_state import get_random_state, set_random_state
from lit_rlhf.modules.resume import ResumePoint, find_resume_point, finish_epoch, mark_step_as_saved
from lit_rlhf.schedules import TrainerLengthSchedule
from lit_rlhf.strategies import data_parallel_group, tensor_parallel_plan, tensor_parallel_size, total_norm


class LitModule(LightningModule, DataRequirements):
    """Base of `SFTModule`, `RewardModule` and `PPOModule`.

    Attributes:
        model_path: folder or hub name of the starting model.
        tokenizer: loaded from there on first use; the data module takes it from here.
        samples: rows for sample tables.
        epoch_means: means over an epoch, logged at its last step.
        step_means: means over an optimizer step: all its micro-batches and ranks.
    """

    #: prefix of the exported transformers model in the state dict
    export_prefix: str
    #: epoch means that the progress bar shows
    prog_bar_metrics: tuple[str, ...] = ()

    def __init__(
        self,
        model: str,
        loading: ModelLoadingConfig | None,
        adapter: LoRA | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
    ) -> None:
        super().__init__()
        self.model_path, self.loading, self.adapter = model, loading or ModelLoadingConfig(), adapter
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.epoch_means, self.step_means = EpochMeans(), EpochMeans()
        self.last_epoch_means: dict[str, Tensor] = {}
        self.samples: list[dict[str, Any]] = []
        self.resumed_random_state: dict[str, Any] | None = None
        self.resumed_at: ResumePoint = "within"
        if self.loading.quantization is not None:
            if adapter is None:
                raise UserError(
                    f"loading.quantization: {self.loading.quantization} weights are not trained; set model.adapter "
                    "as well (-c adapter/qlora sets both), or loading.quantization to null"
                )
            self.strict_loading = (
                False  # its checkpoints hold the trained weights only, which `on_load_checkpoint` checks
            )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the starting model, with a padding token that is not its end token."""
        return load_tokenizer(self.model_path, self.loading)

    def setup(self, stage: str) -> None:
        """Refuse a model whose tensors the strategy cannot split; reads its config alone."""
        ranks = tensor_parallel_size(self.trainer.strategy)
        if ranks > 1:
            tensor_parallel_plan(load_config(self.model_path, self.loading), ranks)

    def check_max_positions(self, tokens: int, what: str, setting: str) -> None:
        """Refuse more tokens than the starting model has positions for; reads its configuration, not its weights.

        Args:
            tokens: of the longest sequence.
            what: that sequence, in words.
            setting: what to lower.
        """
        limit = max_positions(load_config(self.model_path, self.loading))
        if limit is not None and tokens > limit:
            raise UserError(f"{what} has {tokens:,} tokens, more than the model's {limit:,} positions; lower {setting}")

    @property
    def exported_model(self) -> PreTrainedModel:
        """The transformers model that is exported."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: all trainable parameters."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Build optimizer and scheduler; the paper's schedules get the length of the run."""
        groups = self.parameter_groups()
        optimizer = self.make_optimizer(groups)
        if optimizer.defaults.get("weight_decay"):
            optimizer = self.make_optimizer(split_weight_decay_groups(groups))
        # A fused optimizer would unscale gradients itself; with mixed precision Lightning then refuses to clip.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, TrainerLengthSchedule):
            total = int(
                self.trainer.estimated_stepping_batches
            )  # builds the dataloader, whose length is known afterwards
            batches = self.trainer.num_training_batches
            finite = batches if batches != float("inf") else 1
            scheduler.set_length(total, math.ceil(finite / self.trainer.accumulate_grad_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the means of the minibatch, and the gradient norm before the Trainer clips."""
        # the same on every rank; counted once per step, so that a run resumed on fewer ranks weighs all steps alike
        ranks, _ = get_dp_world_size_and_rank(self.trainer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:  # DeepSpeed does not expose them
            self.epoch_means.add("train/grad_norm", total_norm(gradients) / ranks, 1 / ranks)
        for name, mean in self.step_means.compute(self.sum_over_ranks).items():
            self.log(name, mean, prog_bar=name == "train/loss", batch_size=1)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip gradients. With tensor parallelism by `total_norm`: PyTorch's cannot combine split and full tensors."""
        split = tensor_parallel_size(self.trainer.strategy) > 1
        if not split or gradient_clip_val is None or gradient_clip_algorithm == "value":
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        clipped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(p.grad for p in clipped)
        torch.nn.utils.clip_grads_with_norm_(clipped, gradient_clip_val, norm, foreach=False)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then clear the gradients immediately."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        if self.trainer.is_last_batch:
            self.log_epoch_means()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: `optimizer_step` cleared them.

        Lightning calls this between forward and backward, where it would erase the gradients of the pretraining mix;
        and gradients kept until then would take memory during the next rollout.
        """

    def normalize_loss(self, total: Tensor, normalizer: Tensor) -> Tensor:
        """Return the loss of a micro-batch, scaled such that gradients add up to that of minibatch sum / normalizer.

        Lightning divides by accumulate_grad_batches and strategies average over ranks; both are multiplied back.
        """
        return total / normalizer * self.trainer.accumulate_grad_batches * get_dp_world_size_and_rank(self.trainer)[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to export the checkpoint; leave out a 4-bit base, which has a folder of its own."""
        base = None if self.loading.quantization is None else (self.model_path, self.loading)
        about = describe_model(self.exported_model, self.tokenizer, self.export_prefix, self.adapter, base)
        checkpoint[CHECKPOINT_KEY] = {
            "module": type(self).__name__,
            **about,
            "random": all_gather_object(get_random_state()),
        }
        checkpoint[CHECKPOINT_KEY]["fingerprints"] = self.model_fingerprints
        if self.trainer.is_last_batch:
            checkpoint["epoch_end"] = {"means": self.last_epoch_means, "samples": self.samples}
        if base is not None:
            trainable = self.trainable_names()
            checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in trainable}

    def frozen_model_paths(self) -> dict[str, str]:
        """Return the models that a run uses but neither trains nor saves in its checkpoints: role to path."""
        return {} if self.loading.quantization is None else {"base": self.model_path}

    @cached_property
    def model_fingerprints(self) -> dict[str, str]:
        """Content fingerprints of `frozen_model_paths`; every rank must call it."""
        paths = self.frozen_model_paths() if self.trainer.is_global_zero else {}
        own = {role: model_fingerprint(path, self.loading) for role, path in paths.items()}
        return self.trainer.strategy.broadcast(own)

    def check_fingerprints(self, stored: dict[str, str]) -> None:
        """Refuse to resume with other models than those of the run so far."""
        for role, identity in self.model_fingerprints.items():
            if stored.get(role, identity) != identity:
                raise UserError(
                    f"ckpt_path: the {role} {self.frozen_model_paths()[role]!r} is not the one that this run began "
                    f"with ({identity[:19]} now, {stored[role][:19]} then); put that one back, or start a new run from "
                    "`lit-rlhf export`"
                )

    def log_epoch_means(self) -> None:
        """Log the means of an epoch at its last step.

        Lightning logs an epoch only after this step's checkpoint; a run killed in between would lose this row.
        """
        self.last_epoch_means = self.epoch_means.compute(self.sum_over_ranks)
        row = {name: float(mean) for name, mean in self.last_epoch_means.items()}
        for logger in self.loggers if row else ():
            logger.log_metrics({**row, "epoch": self.current_epoch}, step=self.global_step)
            logger.save()

    def on_train_batch_end(self, *_: Any) -> None:
        """Publish the epoch's means with its last batch, so that callbacks find them when the epoch ends."""
        if self.trainer.is_last_batch:
            for name, mean in self.last_epoch_means.items():
                prog_bar = name in self.prog_bar_metrics
                self.log(name, mean, on_step=False, on_epoch=True, prog_bar=prog_bar, logger=False, batch_size=1)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum over all data-parallel ranks, on the CPU; every rank must call it."""
        strategy = self.trainer.strategy
        total: Tensor = strategy.reduce(values.to(self.device), group=data_parallel_group(strategy), reduce_op="sum")
        return total.cpu()

    def on_train_start(self) -> None:
        """Restore the random state of a resumed run, and finish the epoch if it was resumed at its end."""
        if self.resumed_random_state is not None:
            set_random_state(self.resumed_random_state)
            self.resumed_random_state = None
        mark_step_as_saved(self.trainer)
        _ = (
            self.model_fingerprints
        )  # now, and not at the first checkpoint: what is on the disk then may be another model
        if self.resumed_at != "within":
            self.trainer.callback_metrics.update(self.last_epoch_means)  # callbacks read them there when an epoch ends
            finish_epoch(self.trainer, self.resumed_at)
            self.resumed_at = "within"

    def trainable_names(self) -> set[str]:
        """Return the names of the trainable weights: with a 4-bit base, the only ones in a checkpoint."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another module or of another model shape."""
        about = checkpoint.get(CHECKPOINT_KEY, {})
        if about.get("module") != type(self).__name__:
            raise UserError(
                f"ckpt_path: the checkpoint is of {about.get('module', 'another program')}, this recipe trains "
                f"{type(self).__name__}; give the matching recipe, or `lit-rlhf export` it and start from the folder"
            )
        missing = () if self.strict_loading else self.trainable_names() - checkpoint["state_dict"].keys()
        if missing:
            raise UserError(f"ckpt_path: the checkpoint lacks the weight {min(missing)!r} that this recipe trains")
        self.check_fingerprints(about.get("fingerprints", {}))
        self.resumed_at = find_resume_point(checkpoint["loops"])
        epoch_end = checkpoint.get("epoch_end", {})
        self.last_epoch_means, self.samples = epoch_end.get("means", {}), epoch_end.get("samples", [])
        states = about.get("random", [])
        if len(states) == self.trainer.world_size:  # another number of ranks cannot continue them
            self.resumed_random_state = states[self.trainer.global_rank]
        stored, own = json.loads(about["config"]), self.exported_model.config.to_dict()
        for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
            if stored.get(name) != own.get(name):
                raise UserError(
                    f"ckpt_path: the checkpoint's model has {name} {stored.get(name)}, "
                    f"{self.model_path!r} has {own.get(name)}"
                )


def split_weight_decay_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups such that vectors (biases and norm scales) have no weight decay."""
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        split += [group | {"params": matrices}] if matrices else []
        split += [group | {"params": vectors, "weight_decay": 0.0}] if vectors else []
    return split
