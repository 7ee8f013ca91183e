"""Base of the three modules: tokenizer, optimizer, loss normalization, metrics, and what a checkpoint contains."""

import inspect
import json
import math
import os
import warnings
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.checkpoint_files import open_checkpoint
from lit_rlhf.checkpoints import save_last_step, set_saved_step
from lit_rlhf.data.base import DataRequirements
from lit_rlhf.data.loader import get_dp_world_size_and_rank
from lit_rlhf.data.own_batches import OwnRows, read_batch
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.distributed import all_gather_object
from lit_rlhf.errors import UserError
from lit_rlhf.hyperparameters import restore_settings
from lit_rlhf.lineage.fingerprints import cached_hash_file
from lit_rlhf.lineage.traceable import Traceable
from lit_rlhf.loggers import AXES, VALIDATION_METRICS, define_metrics
from lit_rlhf.models.export import CHECKPOINT_KEY, describe_model
from lit_rlhf.models.fingerprint import model_fingerprint
from lit_rlhf.models.flops import count_training_flops_per_token
from lit_rlhf.models.given import TokenizerSource, check_applies_to, model_name, resolve_tokenizer
from lit_rlhf.models.loading import load_config, load_tokenizer, max_positions
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora, check_lora
from lit_rlhf.models.memory_estimate import build_meta_model
from lit_rlhf.models.pretrained import check_weight_values
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource
from lit_rlhf.modules.epoch_metrics import EpochMeans
from lit_rlhf.modules.random_state import get_random_state, set_random_state
from lit_rlhf.modules.resume import (
    ResumePoint,
    check_optimizer_state,
    class_path,
    describe_optimizer,
    find_resume_point,
    finish_epoch,
    iter_settings,
    regroup_parameters,
    remaining_steps,
    restore_callback_settings,
    restore_recipe,
)
from lit_rlhf.modules.trainer_settings import check_trainer_settings, check_whole_minibatches
from lit_rlhf.schedules import TrainerLengthSchedule
from lit_rlhf.strategies import (
    data_parallel_group,
    sharded_parameters,
    tensor_parallel_plan,
    tensor_parallel_size,
    total_norm,
    trainable_names,
)

CHECKPOINT_FORMAT = 2  # 2: positions in rows, the optimizer of the recipe
SEED_VARIABLE = "PL_GLOBAL_SEED"  # where `seed_everything` keeps its seed


class LitModule(LightningModule, DataRequirements, Traceable):
    """Base of `SFTModule`, `RewardModule` and `PPOModule`.

    A model that is given as an object is trained in place: it is the module's own, its dropout is set to 0, its
    embedding grows for an added padding token, the Trainer moves it to its device, and weights without
    `requires_grad` stay frozen. Its dtype and attention stay as they were loaded. Every other role (reference, critic)
    gets a copy.

    Attributes:
        model_path: folder or hub name of the starting model, or what an object is called.
        sources: what each role is loaded from, by its setting: "model", in PPO also "reference".
        tokenizer: loaded on first use; the data module takes it from here.
        samples: rows for sample tables.
        epoch_means: means over an epoch, logged at its last step.
        step_means: means over an optimizer step: all its micro-batches and ranks.
        num_tokens: tokens of the data that was trained on so far, over all ranks.
    """

    #: prefix of the exported transformers model in the state dict
    export_prefix: str
    #: epoch means that the progress bar shows
    prog_bar_metrics: tuple[str, ...] = ()
    #: trained network -> metrics of its learning rate and of its gradient norm
    network_metrics: dict[str, tuple[str, str]] = {"model": ("lr/model", "grad_norm/model")}
    #: metric on the x-axis of the means over an epoch; None: the optimizer step
    epoch_axis: str | None = None

    def __init__(
        self,
        model: ScalarSource,
        loading: ModelLoadingConfig | None,
        adapter: LoRA | None,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        super().__init__()
        self.model_path, self.loading, self.adapter = model_name(model), loading or ModelLoadingConfig(), adapter
        # a plain dict: a module among its values must not become a part of this one
        self.sources: dict[str, Any] = {"model": model}
        self.tokenizer_source = resolve_tokenizer(tokenizer, model)
        self.object_fingerprints: dict[str, str] = {}  # of models that are objects, by role, before training
        check_applies_to(model, self.loading)
        # no news: batches of the data modules pass through it as they are
        warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule`")
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.epoch_means, self.step_means = EpochMeans(), EpochMeans()
        self.last_epoch_means: dict[str, Tensor] = {}
        self.defined_metrics: set[str] = set()  # whose x-axis and summary the loggers know
        self.num_tokens = 0
        self.samples: list[dict[str, Any]] = []
        self.resumed_random_state: dict[str, Any] | None = None
        self.resumed_at: ResumePoint = "within"
        self.resumed: dict[str, Any] | None = None  # optimizer and schedulers of the checkpoint, until training starts
        self.recipe_optimizer: dict[str, Any] = {}  # see `describe_optimizer`
        if optimizer is None:  # which the recipe's parser accepts
            raise UserError("model.optimizer is null: name a class, such as torch.optim.AdamW")
        if self.loading.quantization is not None and adapter is None:
            raise UserError(
                f"loading.quantization: {self.loading.quantization} weights are not trained; set model.adapter "
                "as well (-c adapter/qlora sets both), or loading.quantization to null"
            )
        self.strict_loading = not self.has_base_folder

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the starting model, with a padding token that is not its end token."""
        return load_tokenizer(self.tokenizer_source, self.loading)

    @property
    def strategy(self) -> Strategy:
        """The Trainer's strategy; without a Trainer, as in `load_from_checkpoint`, a single device."""
        return SingleDeviceStrategy(self.device) if self._trainer is None else self.trainer.strategy

    @property
    def model_config(self) -> PretrainedConfig:
        """The configuration of the starting model; reads no weights."""
        model = self.sources["model"]
        return load_config(model.model if isinstance(model, ScalarModel) else model, self.loading)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, **settings: Any
    ) -> Self:
        """Return a module with the weights of a checkpoint, without a Trainer.

        Args:
            checkpoint_path: a checkpoint file.
            map_location: device of the weights; by default that of the checkpoint.
            settings: of the constructor, in place of those of the checkpoint. Objects, such as a reward or a model, are
                not in it: give them again.

        Raises:
            UserError: an object is missing, or the checkpoint is of another module or of other models.
        """
        stored = open_checkpoint(Path(checkpoint_path)).get(cls.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "_instantiator" not in stored:  # else of a recipe, which LightningCLI instantiates
            functions = {name: partial(_raise_missing, name) for name in ("optimizer", "scheduler") if stored.get(name)}
            settings = {**functions, **settings}
            accepted = {name: stored[name] for name in inspect.signature(cls).parameters if name in stored}
            settings |= restore_settings(accepted, settings, cls.__name__)
        with warnings.catch_warnings():  # the frozen base of an adapter; `on_load_checkpoint` checks what was trained
            warnings.filterwarnings("ignore", "Found keys that are in the model state dict but not in the checkpoint")
            module: Self = super().load_from_checkpoint(
                checkpoint_path, map_location=map_location, weights_only=True, **settings
            )
        return module

    def setup(self, stage: str) -> None:
        """Refuse settings of the Trainer and of an adapter that cannot work, and forget an earlier fit.

        Reads the model's config alone.
        """
        if stage == "fit":
            check_trainer_settings(self.trainer)
            self.forget_earlier_fit()
        if self.adapter is not None:
            check_lora(self.adapter, build_meta_model(self.model_config, self.loading, None, scalar=False))
        ranks = tensor_parallel_size(self.trainer.strategy)
        if ranks > 1:
            tensor_parallel_plan(self.model_config, ranks)

    def forget_earlier_fit(self) -> None:
        """Begin with no sums and no checkpoint: an earlier fit may have ended within an epoch."""
        self.step_means = EpochMeans()
        self.resumed, self.resumed_at, self.resumed_random_state = None, "within", None
        if self.trainer.global_step == 0:  # else the same Trainer goes on, perhaps within an epoch
            self.epoch_means, self.last_epoch_means = EpochMeans(), {}
            self.num_tokens, self.samples = 0, []

    def check_max_positions(self, tokens: int, what: str, setting: str) -> None:
        """Refuse more tokens than the starting model has positions for; reads its configuration, not its weights.

        Args:
            tokens: of the longest sequence.
            what: that sequence, in words.
            setting: what to lower.
        """
        limit = max_positions(self.model_config)
        if limit is not None and tokens > limit:
            raise UserError(f"{what} has {tokens:,} tokens, more than the model's {limit:,} positions; lower {setting}")

    @property
    def has_base_folder(self) -> bool:
        """Whether an adapter is trained on a base that is loaded again from its folder or hub name.

        Its checkpoints hold the trained weights alone, which `on_load_checkpoint` checks.
        """
        return self.adapter is not None and isinstance(self.sources["model"], str)

    def add_adapter(self, model: PreTrainedModel) -> None:
        """Add the recipe's adapter to the model; without one, do nothing."""
        if self.adapter is not None:
            add_lora(model, self.adapter)

    # ------------------------------------------------------------------------------------- a user's own data and loops

    @cached_property
    def template(self) -> PromptTemplate:
        """Renders the prompts of a user's own batches."""
        return PromptTemplate(self.tokenizer)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn a batch of a user's own loader, of text or token ids (see `read_batch`), into one of this module's."""
        rows = read_batch(batch, self.tokenizer.pad_token_id)
        return batch if rows is None else self.collate(rows)

    def collate(self, rows: OwnRows) -> Any:
        """Build a batch of rows of a user's own loader.

        Raises:
            UserError: the rows are not those that this module is trained on.
        """
        raise UserError(f"{type(self).__name__} takes batches of its own type alone, not rows of text or token ids")

    @property
    def num_averaged_batches(self) -> int:
        """Batches whose gradients an optimizer step averages; 1 outside training."""
        if self._trainer is None or not self.trainer.training:
            return 1
        return self.trainer.accumulate_grad_batches * get_dp_world_size_and_rank(self.trainer)[0]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        """Return the output of the transformers model, with its logits.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T), 1 = real token; by default all.
        """
        return self.exported_model(input_ids=input_ids, attention_mask=attention_mask)

    def metric_name(self, name: str) -> str:
        """Return the name of a validation metric, in a test with `test/` in front."""
        return name.replace("validation/", "test/", 1) if self.trainer.testing else name

    @property
    def exported_model(self) -> PreTrainedModel:
        """The transformers model that is exported."""
        raise NotImplementedError

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: all trainable parameters."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Build optimizer and scheduler; the paper's schedules get the length of the run."""
        optimizer = self.make_optimizer(self.optimizer_groups())
        # A fused optimizer would unscale gradients itself; with mixed precision Lightning then refuses to clip.
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        scheduler = None if self.make_scheduler is None else self.make_scheduler(optimizer)
        self.recipe_optimizer = describe_optimizer(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, TrainerLengthSchedule):
            self.trainer.fit_loop.setup_data()  # the length of the dataloader is known afterwards
            # what is left, not all: a Trainer that is fitted again counts on, and the optimizer is a new one
            scheduler.set_length(remaining_steps(self.trainer, self.steps_per_epoch), self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return `parameter_groups`, those with vectors apart if the recipe's optimizer has weight decay."""
        groups = self.parameter_groups()
        decays = self.make_optimizer(groups).defaults.get("weight_decay")
        # an optimizer writes its defaults into the groups that it is given: without weight decay, new ones
        return split_weight_decay_groups(groups) if decays else self.parameter_groups()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; 1 if its length is not known."""
        batches = self.trainer.num_training_batches
        return math.ceil((batches if batches != float("inf") else 1) / self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the means of the minibatch, learning rates, and gradient norms before the Trainer clips."""
        # the same on every rank; counted once per step, so that a run resumed on fewer ranks weighs all steps alike
        ranks, _ = get_dp_world_size_and_rank(self.trainer)
        logged: dict[str, Tensor | float] = {}
        for group in optimizer.param_groups:
            for network in self.split_by_network(group["params"]):
                logged[self.network_metrics[network][0]] = group["lr"]
        norms = []
        for network, parameters in self.split_by_network(sharded_parameters(self).values()).items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:  # DeepSpeed does not expose them
                norms.append(total_norm(gradients))
                logged[self.network_metrics[network][1]] = norms[-1]
        if norms:
            norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
            self.epoch_means.add("train/grad_norm", norm / ranks, 1 / ranks)
        sums = self.step_means.reduced_sums(self.sum_over_ranks)
        if "tokens" in sums:
            self.num_tokens += int(sums.pop("tokens")[0])
            logged["tokens"] = float(self.num_tokens)
        means = self.step_means.reset(sums)
        # only where a row is written: a call of `log` takes Lightning longer than the norm of a small gradient
        is_due = self.trainer._logger_connector.should_update_logs
        self.define_metrics([*means, *logged], None)
        for name, value in {**means, **(logged if is_due else {})}.items():
            self.log(name, value, prog_bar=name == "train/loss", batch_size=1)

    def split_by_network(self, parameters: Iterable[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
        """Return trained parameters by the network of `network_metrics` that they belong to; none is empty."""
        (network,), own = self.network_metrics, list(parameters)
        return {network: own} if own else {}

    def define_metrics(self, names: Iterable[str], axis: str | None) -> None:
        """Tell the loggers the x-axis and the summary of metrics, once per name."""
        new = [name for name in names if name not in self.defined_metrics]
        if new:
            define_metrics(self.loggers, new, axis)
            self.defined_metrics |= set(new)

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
        """Add what is needed to export the checkpoint; with an adapter, leave out all that is frozen.

        The base has a folder of its own, which is loaded again, and whose fingerprint is stored.
        """
        base = (self.model_path, self.loading) if self.has_base_folder else None
        about = describe_model(self.exported_model, self.tokenizer, self.export_prefix, self.adapter, base)
        checkpoint[CHECKPOINT_KEY] = {
            "module": type(self).__name__,
            **about,
            "random": all_gather_object(get_random_state()),
            "format": CHECKPOINT_FORMAT,
            "seed": os.environ.get(SEED_VARIABLE),
            "optimizer": self.recipe_optimizer,
        }
        checkpoint[CHECKPOINT_KEY]["fingerprints"] = self.model_fingerprints
        checkpoint["tokens"] = self.num_tokens
        checkpoint["epoch_sums"] = self.epoch_means.reduced_sums(self.sum_over_ranks)
        if self.trainer.is_last_batch:
            checkpoint["epoch_end"] = {"means": self.last_epoch_means, "samples": self.samples}
        if base is not None:
            trainable = trainable_names(self)
            checkpoint["state_dict"] = {name: w for name, w in checkpoint["state_dict"].items() if name in trainable}

    def frozen_model_paths(self) -> dict[str, str]:
        """Return the models that a run uses but neither trains nor saves in its checkpoints: role to path or name."""
        return {"base": self.model_path} if self.has_base_folder else {}

    def input_models(self) -> dict[str, str]:
        """See `Traceable.input_models`; a model that is an object has no folder to trace."""
        return {"starting model": self.model_path} if isinstance(self.sources["model"], str) else {}

    def input_loading(self) -> ModelLoadingConfig:
        """See `Traceable.input_loading`."""
        return self.loading

    def flops_per_token(self) -> int:
        """See `Traceable.flops_per_token`."""
        return count_training_flops_per_token(self.exported_model)

    @cached_property
    def model_fingerprints(self) -> dict[str, str]:
        """Content fingerprints of `frozen_model_paths`; every rank must call it."""
        paths = self.frozen_model_paths() if self.strategy.is_global_zero else {}
        own = {
            role: self.object_fingerprints.get(role) or model_fingerprint(path, self.loading, cached_hash_file)
            for role, path in paths.items()
        }
        return self.strategy.broadcast(own)

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
        if row:
            self.define_metrics([*AXES, *row], self.epoch_axis)
        for logger in self.loggers if row else ():
            logger.log_metrics({**row, **self.axes(), "epoch": self.current_epoch}, step=self.global_step)
            logger.save()

    def axes(self) -> dict[str, float]:
        """Return what was trained on so far, for the x-axis of the metrics."""
        return {"tokens": float(self.num_tokens)}

    def sample_responses(self, count: int) -> list[dict[str, Any]]:
        """Return rows for the sample table: responses of the model as it is to the same prompts every time.

        Every rank must call it. A module that generates nothing returns none.
        """
        return []

    def on_train_batch_end(self, *_: Any) -> None:
        """Publish the epoch's means with its last batch, so that callbacks find them when the epoch ends."""
        if self.trainer.is_last_batch:
            for name, mean in self.last_epoch_means.items():
                prog_bar = name in self.prog_bar_metrics
                self.log(name, mean, on_step=False, on_epoch=True, prog_bar=prog_bar, logger=False, batch_size=1)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum over all data-parallel ranks, on the CPU; every rank must call it."""
        strategy = self.trainer.strategy
        # not on `self.device`, which is the CPU when the Trainer is done: NCCL sums on the GPU alone
        values = values.to(strategy.root_device)
        total: Tensor = strategy.reduce(values, group=data_parallel_group(strategy), reduce_op="sum")
        return total.cpu()

    def on_train_start(self) -> None:
        """Restore the random state of a resumed run, and finish the epoch if it was resumed at its end."""
        check_whole_minibatches(self.trainer)  # now that the length of the dataloader is known
        if self.resumed_random_state is not None:
            set_random_state(self.resumed_random_state)
            self.resumed_random_state = None
        self.defined_metrics = set()  # a run may have other loggers than the one before
        self.define_metrics(VALIDATION_METRICS, self.epoch_axis)
        set_saved_step(self.trainer, self.global_step)
        # now, and not at the first checkpoint: what is on the disk then may be another model
        _ = self.model_fingerprints
        if self.resumed is None:
            return
        self.resume_optimizer(self.resumed)
        if self.resumed_at != "within":
            self.trainer.callback_metrics.update(self.last_epoch_means)  # callbacks read them there when an epoch ends
            finish_epoch(self.trainer, self.resumed_at)
            self.resumed_at = "within"
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if isinstance(scheduler, TrainerLengthSchedule):
                left = remaining_steps(self.trainer, self.steps_per_epoch)
                scheduler.set_length(scheduler.last_epoch + left, self.steps_per_epoch)
        self.resumed = None

    def on_train_end(self) -> None:
        """Write the last checkpoint again if it is not of the last step."""
        # after a callback that averages the module holds the average; ours saves before
        if not any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            save_last_step(self.trainer)

    def resume_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Give the optimizer the recipe's settings if they are not those of the checkpoint, and the scheduler its step.

        Args:
            checkpoint: with `optimizer`, see `describe_optimizer`, and `lr_schedulers`, Lightning's states.
        """
        optimizer = self.trainer.optimizers[0]
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if checkpoint["optimizer"] == self.recipe_optimizer:
            for scheduler, state in zip(schedulers, checkpoint["lr_schedulers"]):
                scheduler.load_state_dict(state)
            return
        restore_recipe(optimizer, next(iter(schedulers), None), self.recipe_optimizer, self.global_step)
        check_optimizer_state(optimizer, self.make_optimizer)

    def check_resumable(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to train on from a checkpoint whose optimizer or position in the data cannot be continued.

        It needs no weights: `lit-rlhf fit` calls it before any is loaded.
        """
        about = checkpoint.get(CHECKPOINT_KEY, {})
        remedy = "`lit-rlhf export` it and start a new run from the folder"
        if about.get("format") != CHECKPOINT_FORMAT:
            raise UserError(
                f"ckpt_path: the checkpoint is of another version of lit_rlhf, which counts other positions; {remedy}"
            )
        stored = about["optimizer"]
        if "lr_schedulers" not in checkpoint or not stored:
            raise UserError(f"ckpt_path: the checkpoint holds weights only, without an optimizer to resume; {remedy}")
        optimizer = self.make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
        if class_path(optimizer) != stored["class"]:
            raise UserError(
                f"ckpt_path: the checkpoint's optimizer is {stored['class']}, whose state {class_path(optimizer)} "
                f"cannot continue; set model.optimizer back, or {remedy}"
            )
        decays = any(group.get("weight_decay") for group in stored["groups"])
        if "optimizer_states" not in checkpoint and decays != bool(optimizer.defaults.get("weight_decay")):
            raise UserError(
                "ckpt_path: weight decay of a checkpoint in shards can be changed, but not switched on or off; set "
                f"model.optimizer.weight_decay back, or {remedy}"
            )

    def regroup_optimizer_states(self, checkpoint: dict[str, Any]) -> None:
        """Convert the optimizer's state to the parameter groups of now, which weight decay decides."""
        for state in checkpoint.get("optimizer_states", []):
            groups = self.parameter_groups()
            regroup_parameters(state, self.optimizer_groups(), (groups, split_weight_decay_groups(groups)))

    def load_optimizer_state(self, checkpoint: dict[str, Any]) -> None:
        """Load the optimizer's state in the middle of a run, whose settings and learning rate stay."""
        settings = [settings for optimizer in self.trainer.optimizers for settings, _ in iter_settings(optimizer)]
        self.regroup_optimizer_states(checkpoint)
        self.trainer.strategy.load_optimizer_state_dict(checkpoint)
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, settings):
            group.update(own)

    def load_training_state(self, checkpoint: dict[str, Any]) -> None:
        """Take what is not weights from a checkpoint; what Lightning would take is changed in place, see `resume`."""
        self.check_resumable(checkpoint)
        about = checkpoint[CHECKPOINT_KEY]
        self.resumed = {"optimizer": about["optimizer"], "lr_schedulers": checkpoint["lr_schedulers"]}
        checkpoint["lr_schedulers"] = []
        self.regroup_optimizer_states(checkpoint)
        restore_callback_settings(self.trainer, checkpoint.get("callbacks", {}))
        self.resumed_at = find_resume_point(checkpoint["loops"])
        epoch_end = checkpoint.get("epoch_end", {})
        self.last_epoch_means, self.samples = epoch_end.get("means", {}), epoch_end.get("samples", [])
        self.num_tokens = checkpoint["tokens"]
        self.epoch_means.load(checkpoint["epoch_sums"], get_dp_world_size_and_rank(self.trainer)[1] == 0)
        # other ranks cannot continue the random states, and another seed asks for others
        states = about["random"] if about["seed"] == os.environ.get(SEED_VARIABLE) else []
        if len(states) == self.trainer.world_size:
            self.resumed_random_state = states[self.trainer.global_rank]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another module or of another model shape, or with weights that are no numbers."""
        about = checkpoint.get(CHECKPOINT_KEY, {})
        if about.get("module") != type(self).__name__:
            raise UserError(
                f"ckpt_path: the checkpoint is of {about.get('module', 'another program')}, this recipe trains "
                f"{type(self).__name__}; give the matching recipe, or `lit-rlhf export` it and start from the folder"
            )
        stored = checkpoint.get("state_dict", {})  # none under FSDP2, which loads it before and checks it itself
        missing = () if self.strict_loading or not stored else trainable_names(self) - stored.keys()
        if missing:
            raise UserError(f"ckpt_path: the checkpoint lacks the weight {min(missing)!r} that this recipe trains")
        trained = [(name, stored[name]) for name, _ in self.named_parameters() if name in stored]
        path = "the checkpoint" if self._trainer is None else str(self.trainer.ckpt_path)
        check_weight_values("ckpt_path", path, trained)
        self.check_fingerprints(about.get("fingerprints", {}))
        config, own = json.loads(about["config"]), self.exported_model.config.to_dict()
        for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers"):
            if config.get(name) != own.get(name):
                raise UserError(
                    f"ckpt_path: the checkpoint's model has {name} {config.get(name)}, "
                    f"{self.model_path!r} has {own.get(name)}"
                )
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.load_training_state(checkpoint)


def _raise_missing(name: str, *_: Any) -> Any:
    raise UserError(f"load_from_checkpoint: a checkpoint holds no functions; to train on, give {name}= again")


def split_weight_decay_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split parameter groups such that vectors (biases and norm scales) have no weight decay."""
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        split += [group | {"params": matrices}] if matrices else []
        split += [group | {"params": vectors, "weight_decay": 0.0}] if vectors else []
    return split
