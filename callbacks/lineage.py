"""Where the run's model comes from: recorded in its folder, and mirrored as artifacts of Weights & Biases."""

import math
import os
import time
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.run_state import RunState
from lit_rlhf.data.batches import RankingBatch, TokenBatch
from lit_rlhf.data.pretraining import PretrainingDataModule
from lit_rlhf.data.report import DataReader
from lit_rlhf.errors import UserError
from lit_rlhf.lineage.environment import now, read_environment
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input
from lit_rlhf.lineage.records import (
    LINEAGE_KEY,
    Compute,
    DataInput,
    Environment,
    LineageRecord,
    ModelInput,
    RunReference,
    parse_record,
)
from lit_rlhf.lineage.settings import find_files
from lit_rlhf.lineage.traceable import Traceable
from lit_rlhf.lineage.wandb_artifacts import MAX_UPLOAD_GB, describe_run, mirror_output
from lit_rlhf.loggers import media_loggers
from lit_rlhf.models.flops import count_training_flops_per_token
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.strategies import data_parallel_group

SEED_VARIABLE = "PL_GLOBAL_SEED"  # where `seed_everything` keeps its seed


class Lineage(Callback):
    """Record inputs, time and operations of a run, for the `lineage.json` that `ExportModel` writes.

    The inputs are hashed in the background when training starts; a file whose size and modification time are known is
    not read again. Checkpoints hold the record so far, so a resumed run adds up the time of its sessions up to the
    checkpoint that each was resumed from, and `lit-rlhf export` can write it. `lit-rlhf fit` adds this callback to
    every run.

    With an online WandbLogger, models and data that the run was made from become its input artifacts, and the exported
    folder a version of the collection GROUP-ROLE, such as small-reward. Offline W&B takes no inputs: the version waits
    in the files of the run, and `lit-rlhf lineage push` adds the inputs after `wandb sync`.

    Args:
        max_upload_gb: a larger folder becomes an artifact by reference: its files stay where they are.
        registry: collection of a registry that the exported model is linked to, such as
            "wandb-registry-model/assistant".
    """

    def __init__(self, max_upload_gb: float = MAX_UPLOAD_GB, registry: str = "") -> None:
        self.max_upload_gb, self.registry = max_upload_gb, registry
        self.start = 0.0  # time.monotonic()
        self.started = ""
        self.tokens: torch.Tensor | int = 0  # of this session, of this rank or of all, see `shared_tokens`
        self.shared_tokens = False  # whether every rank has counted the tokens of all
        self.first_step = 0
        self.earlier: Compute | None = None  # of the sessions before this one
        self.inputs: Future[tuple[tuple[ModelInput, ...], tuple[DataInput, ...], Environment]] = Future()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        if stage == "fit":
            self.start, self.started = time.monotonic(), now()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Hash the inputs in the background: what is on the disk later may be others."""
        self.tokens, self.first_step, self.inputs = 0, trainer.global_step, Future()
        if trainer.is_global_zero:
            Thread(target=self.hash_inputs, args=(trainer, pl_module, self.inputs), daemon=True).start()

    def hash_inputs(self, trainer: Trainer, pl_module: Any, result: "Future[Any]") -> None:
        """Fill `inputs`."""
        try:
            models, data = collect_inputs(trainer, pl_module)
            device = trainer.strategy.root_device
            result.set_result((models, data, read_environment(device, trainer.world_size)))
        except (OSError, UserError) as problem:  # a file that was removed: no reason to lose the run
            rank_zero_warn(f"lineage: the inputs of this run are not recorded: {problem}")
            result.set_result(((), (), Environment()))
        except BaseException as problem:  # raised where the result is read
            result.set_exception(problem)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the tokens, without waiting for the device."""
        if isinstance(batch, Experience):
            if batch.rollout_metrics:  # in the first micro-batch of an iteration
                loader: Any = trainer.train_dataloader
                self.tokens, self.shared_tokens = self.tokens + loader.iteration.trajectories.attention_mask.sum(), True
        elif isinstance(batch, TokenBatch | RankingBatch):
            self.tokens = self.tokens + batch.attention_mask.sum()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the record so far; a collective call."""
        compute = self.measure(trainer, pl_module)
        if trainer.is_global_zero and self.started:
            checkpoint[LINEAGE_KEY] = asdict(self.make_record(trainer, pl_module, compute))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add up with the sessions before."""
        if LINEAGE_KEY in checkpoint:
            self.earlier = parse_record(checkpoint[LINEAGE_KEY]).compute

    def measure(self, trainer: Trainer, pl_module: Any) -> Compute:
        """Return time and operations of all sessions; a collective call."""
        tokens = torch.as_tensor(self.tokens).to(trainer.strategy.root_device)
        if not self.shared_tokens:
            tokens = trainer.strategy.reduce(tokens, group=data_parallel_group(trainer.strategy), reduce_op="sum")
        flops = None
        if isinstance(pl_module, Traceable):
            flops = float(tokens) * pl_module.flops_per_token()
            others = [each for each in trainer.callbacks if isinstance(each, Traceable)]  # type: ignore[attr-defined]
            extra = sum(each.extra_tokens_per_step() for each in others) * (trainer.global_step - self.first_step)
            module: Any = pl_module
            if extra:
                flops += extra * count_training_flops_per_token(module.exported_model)
        seconds = time.monotonic() - self.start
        compute = Compute(self.started, now(), seconds, seconds * trainer.world_size, int(tokens), flops or None)
        return compute if self.earlier is None else add_compute(self.earlier, compute)

    def finish(self, trainer: Trainer, pl_module: Any, alias: str = "") -> LineageRecord | None:
        """Return the record of the run for an export, on rank zero; a collective call.

        Args:
            trainer: the trainer.
            pl_module: the trained module.
            alias: a further alias of the version in Weights & Biases, such as "best".
        """
        compute = self.measure(trainer, pl_module) if self.started else Compute(now(), now())
        if not trainer.is_global_zero:
            return None
        if not self.started:  # it is not one of the Trainer's callbacks
            self.hash_inputs(trainer, pl_module, self.inputs)
        record = self.make_record(trainer, pl_module, compute)
        if record.wandb is None or not alias:
            return record
        return replace(record, wandb=replace(record.wandb, aliases=(*record.wandb.aliases, alias)))

    def make_record(self, trainer: Trainer, pl_module: LightningModule, compute: Compute) -> LineageRecord:
        """Return the record of the run so far, without files; on rank zero."""
        models, data, environment = self.inputs.result()
        return build_record(trainer, pl_module, compute, models, data, environment, self.registry)

    def mirror(self, trainer: Trainer, record: LineageRecord, folder: Path) -> None:
        """Record inputs and exported folder in every run of Weights & Biases; on rank zero."""
        for logger in media_loggers(trainer.loggers) if record.wandb is not None else ():
            mirror_output(logger.experiment, record, folder, self.max_upload_gb)


def find_lineage(trainer: Trainer) -> Lineage | None:
    """Return the callback of a Trainer, if it has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, Lineage)), None)


def find_run_state(trainer: Trainer) -> RunState:
    """Return what `lit-rlhf fit` tells about the run; without it, nothing is known."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, RunState)), RunState())


def collect_inputs(trainer: Trainer, pl_module: Any) -> tuple[tuple[ModelInput, ...], tuple[DataInput, ...]]:
    """Return models and data of a run as they are now, with absolute locations."""
    data_module: Any = trainer.datamodule  # type: ignore[attr-defined]
    owners = [pl_module, data_module, *trainer.callbacks]  # type: ignore[attr-defined]
    models = [
        describe_model_input(role, path, owner.input_loading())
        for owner in owners
        if isinstance(owner, Traceable)
        for role, path in owner.input_models().items()
    ]
    data = [
        describe_data_input(f"{owner.data_role}, validation" if report.validation else owner.data_role, path, report)
        for owner in owners
        if isinstance(owner, DataReader)
        for report in owner.reports
        for path in [report.source]
    ]
    if not isinstance(data_module, DataReader):  # a user's own: what its settings name
        settings = find_run_state(trainer).recipe.get("data") or {}
        data += [describe_data_input(name, path) for name, path in find_files(settings.get("init_args") or {})]
    return tuple(models), tuple(data)


def build_record(
    trainer: Trainer,
    pl_module: Any,
    compute: Compute,
    models: tuple[ModelInput, ...],
    data: tuple[DataInput, ...],
    environment: Environment,
    registry: str = "",
) -> LineageRecord:
    """Return the record of a run, without files."""
    run = find_run_state(trainer)
    role = pl_module.lineage_role if isinstance(pl_module, Traceable) else Traceable.lineage_role
    if isinstance(trainer.datamodule, PretrainingDataModule):  # type: ignore[attr-defined]
        role = "pretraining"
    seed = os.environ.get(SEED_VARIABLE)
    return LineageRecord(
        role,
        compute,
        models=models,
        data=data,
        recipe=run.recipe,
        configs=run.configs,
        command=run.command,
        seed=None if seed is None else int(seed),
        environment=environment,
        metrics=read_metrics(trainer),
        wandb=describe_wandb(trainer, role, registry),
    )


def read_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the last values of the metrics that are one finite number, which JSON can hold."""
    numbers = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def describe_wandb(trainer: Trainer, role: str, registry: str) -> RunReference | None:
    """Return the first run of Weights & Biases that the Trainer logs to."""
    loggers = media_loggers(trainer.loggers)
    if not loggers or not trainer.is_global_zero:
        return None
    folder = Path(trainer.default_root_dir).resolve()
    step = f"iteration-{trainer.current_epoch}" if role == "ppo" else f"step-{trainer.global_step}"
    run = describe_run(loggers[0].experiment, role, folder.parent.name)
    return None if run is None else replace(run, aliases=("latest", step), registry=registry)


def add_compute(earlier: Compute, session: Compute) -> Compute:
    """Return the sum over the sessions of a resumed run; what one of them did not count stays unknown."""

    def add(one: Any, other: Any) -> Any:
        return None if one is None or other is None else one + other

    names = ("wall_seconds", "device_seconds", "tokens", "flops")
    sums = {name: add(getattr(earlier, name), getattr(session, name)) for name in names}
    return Compute(earlier.started, session.ended, **sums, sessions=earlier.sessions + session.sessions)
