"""What the three modules share: tokenizer, optimizer, normalisation, and what a checkpoint says about itself."""

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

from lit_rlhf.data.loader import data_ranks
from lit_rlhf.distributed import all_gather_object
from lit_rlhf.errors import UserError
from lit_rlhf.models.export import CHECKPOINT_KEY, describe_model
from lit_rlhf.models.fingerprint import model_fingerprint
from lit_rlhf.models.loading import load_config, load_tokenizer, max_positions
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.modules.epoch_metrics import EpochMeans
from lit_rlhf.modules.random_state import random_state, set_random_state
from lit_rlhf.modules.resume import ResumePoint, find_resume_point, finish_epoch, mark_step_as_saved
from lit_rlhf.schedules import SizedSchedule
from lit_rlhf.strategies import data_group, tensor_plan, tensor_ranks, total_norm


class LitModule(LightningModule):
    """Base of `SFTModule`, `RewardModule` and `PPOModule`.

    Attributes:
        model_path: folder or hub name of the starting model.
        tokenizer: loaded from there on first use; the data module takes it from here.
        epoch_means: what an epoch logs as a mean over its parts.
        samples: rows for sample tables.
        step_means: what an optimizer step logs as a mean over its micro-batches and all ranks.
    """

    #: where the exported transformers model stands in the state dict
    export_prefix: str
    #: means of an epoch on the progress bar
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
        self.means: dict[str, Tensor] = {}
        self.samples: list[dict[str, Any]] = []
        self.resumed_random: dict[str, Any] | None = None
        self.resumed_at: ResumePoint = "within"
        if self.loading.quantization is not None:
            if adapter is None:
                raise UserError(
                    f"loading.quantization: {self.loading.quantization} weights are not trained; set model.adapter "
                    "beside it (-c adapter/qlora sets both), or loading.quantization to null"
                )
            self.strict_loading = False  # its checkpoints hold what is trained, and `on_load_checkpoint` checks that

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the starting model, with padding that differs from its end token."""
        return load_tokenizer(self.model_path, self.loading)

    def setup(self, stage: str) -> None:
        """Refuse a model whose tensors cannot be split as the strategy is to; reads its configuration alone."""
        ranks = tensor_ranks(self.trainer.strategy)
        if ranks > 1:
            tensor_plan(load_config(self.model_path, self.loading), ranks)

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
        """The transformers model that a folder is made of."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: what is trained, and nothing frozen."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Build the recipe's optimizer and scheduler; a schedule of the paper learns the run's length here."""
        groups = self.parameter_groups()
        optimizer = self.make_optimizer(groups)
        if optimizer.defaults.get("weight_decay"):
            optimizer = self.make_optimizer(split_weight_decay_groups(groups))
        # A fused optimizer offers to unscale gradients itself; under mixed precision Lightning then refuses to clip.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        if isinstance(scheduler, SizedSchedule):
            total = int(self.trainer.estimated_stepping_batches)  # asks for the loader, whose length is known after it
            batches = self.trainer.num_training_batches
            finite = batches if batches != float("inf") else 1
            scheduler.resize(total, math.ceil(finite / self.trainer.accumulate_grad_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the means of the minibatch, and the norm of the gradient that the Trainer is about to clip."""
        # every rank has the same; counted once a step, so that a run resumed on fewer ranks weighs its steps alike
        ranks, _ = data_ranks(self.trainer)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:  # DeepSpeed keeps them to itself
            self.epoch_means.add("train/grad_norm", total_norm(gradients) / ranks, 1 / ranks)
        for name, mean in self.step_means.means(self.sum_over_ranks).items():
            self.log(name, mean, prog_bar=name == "train/loss", batch_size=1)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip; by a norm of our own where tensors are split: PyTorch's does not add up such and whole ones."""
        split = tensor_ranks(self.trainer.strategy) > 1
        if not split or gradient_clip_val is None or gradient_clip_algorithm == "value":
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        clipped = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(p.grad for p in clipped)
        torch.nn.utils.clip_grads_with_norm_(clipped, gradient_clip_val, norm, foreach=False)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, then clear the gradients at once."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()
        if self.trainer.is_last_batch:
            self.log_epoch_means()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Do nothing: `optimizer_step` cleared them.

        Lightning calls this between forward and backward, where it would erase the gradients that the pretraining
        mix put into the buffer; and gradients kept until then would take memory through the next rollout.
        """

    def normalize_loss(self, total: Tensor, normalizer: Tensor) -> Tensor:
        """Return the loss of a micro-batch so that a minibatch's gradient is that of its sum over its normalizer.

        Lightning divides by accumulate_grad_batches and strategies average over ranks; both are multiplied back.
        """
        return total / normalizer * self.trainer.accumulate_grad_batches * data_ranks(self.trainer)[0]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what turns the checkpoint back into a transformers folder; leave out a 4-bit base, which has its own."""
        base = None if self.loading.quantization is None else (self.model_path, self.loading)
        about = describe_model(self.exported_model, self.tokenizer, self.export_prefix, self.adapter, base)
        checkpoint[CHECKPOINT_KEY] = {
            "module": type(self).__name__,
            **about,
            "random": all_gather_object(random_state()),
        }
        checkpoint[CHECKPOINT_KEY]["read_only"] = self.model_fingerprints
        if self.trainer.is_last_batch:
            checkpoint["epoch_end"] = {"means": self.means, "samples": self.samples}
        if base is not None:
            kept = self.trainable_names()
            checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in kept}

    def frozen_model_paths(self) -> dict[str, str]:
        """Return the models that a run reads and does not train, and that are not in its checkpoints: role to path."""
        return {} if self.loading.quantization is None else {"base": self.model_path}

    @cached_property
    def model_fingerprints(self) -> dict[str, str]:
        """What tells each of `read_only` from another model of the same name; every rank must ask."""
        paths = self.frozen_model_paths() if self.trainer.is_global_zero else {}
        own = {role: model_fingerprint(path, self.loading) for role, path in paths.items()}
        return self.trainer.strategy.broadcast(own)

    def check_fingerprints(self, stored: dict[str, str]) -> None:
        """Refuse to go on with another model in the place of one that the run has read so far."""
        for role, identity in self.model_fingerprints.items():
            if stored.get(role, identity) != identity:
                raise UserError(
                    f"ckpt_path: the {role} {self.frozen_model_paths()[role]!r} is not the one that this run began with "
                    f"({identity[:19]} now, {stored[role][:19]} then); put that one back, or start a new run from "
                    "`lit-rlhf export`"
                )

    def log_epoch_means(self) -> None:
        """Log the means of an epoch at its last step.

        At once, and not when Lightning logs an epoch: a checkpoint of this step comes before that, and a run that was
        killed between the two would go on without this row.
        """
        self.means = self.epoch_means.means(self.sum_over_ranks)
        row = {name: float(mean) for name, mean in self.means.items()}
        for logger in self.loggers if row else ():
            logger.log_metrics({**row, "epoch": self.current_epoch}, step=self.global_step)
            logger.save()

    def on_train_batch_end(self, *_: Any) -> None:
        """Show the means of an epoch with its last batch, so that callbacks find them when the epoch ends."""
        if self.trainer.is_last_batch:
            for name, mean in self.means.items():
                shown = name in self.prog_bar_metrics
                self.log(name, mean, on_step=False, on_epoch=True, prog_bar=shown, logger=False, batch_size=1)

    def sum_over_ranks(self, figures: Tensor) -> Tensor:
        """Return a sum over the ranks that have rows of their own, on the CPU; every rank must call it."""
        strategy = self.trainer.strategy
        whole: Tensor = strategy.reduce(figures.to(self.device), group=data_group(strategy), reduce_op="sum")
        return whole.cpu()

    def on_train_start(self) -> None:
        """Take the generators of a resumed run back, and finish the epoch that it was resumed at the end of."""
        if self.resumed_random is not None:
            set_random_state(self.resumed_random)
            self.resumed_random = None
        mark_step_as_saved(self.trainer)
        _ = (
            self.model_fingerprints
        )  # now, and not at the first checkpoint: what is on the disk then may be another model
        if self.resumed_at != "within":
            self.trainer.callback_metrics.update(self.means)  # callbacks look there when an epoch ends
            finish_epoch(self.trainer, self.resumed_at)
            self.resumed_at = "within"

    def trainable_names(self) -> set[str]:
        """Return the names of the weights that are trained: with a 4-bit base, all that a checkpoint holds."""
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
        self.check_fingerprints(about.get("read_only", {}))
        self.resumed_at = find_resume_point(checkpoint["loops"])
        epoch_end = checkpoint.get("epoch_end", {})
        self.means, self.samples = epoch_end.get("means", {}), epoch_end.get("samples", [])
        states = about.get("random", [])
        if len(states) == self.trainer.world_size:  # on another number of ranks there is none to go on with
            self.resumed_random = states[self.trainer.global_rank]
        stored, own = json.loads(about["config"]), self.exported_model.config.to_dict()
        for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
            if stored.get(name) != own.get(name):
                raise UserError(
                    f"ckpt_path: the checkpoint's model has {name} {stored.get(name)}, "
                    f"{self.model_path!r} has {own.get(name)}"
                )


def split_weight_decay_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split groups of parameters so that biases and the scales of norms, which are vectors, have no weight decay."""
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        split += [group | {"params": matrices}] if matrices else []
        split += [group | {"params": vectors, "weight_decay": 0.0}] if vectors else []
    return split
