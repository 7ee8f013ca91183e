"""Combinations of strategy, precision, optimizer and adapter that cannot work, refused before anything is loaded."""

import inspect
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple, get_args, get_type_hints

import torch
from jsonargparse import Namespace

from lit_rlhf.checkpoint_files import is_sharded_checkpoint
from lit_rlhf.commands.support.setting_paths import get_class_name, get_class_path
from lit_rlhf.errors import UserError
from lit_rlhf.generation.base import Generator
from lit_rlhf.importing import import_function
from lit_rlhf.modules.trainer_settings import HALF_PRECISION, LIMITS_ROLLOUT, OVERFITS, RELOADS
from lit_rlhf.suggestions import pip_command


class Setup(NamedTuple):
    """The settings that decide whether a run can work.

    Args:
        module: class name of the stage's module.
        device: "cpu", "cuda", or another value of the Trainer's accelerator.
        strategy: "ddp", "fsdp2", "fsdp1", "deepspeed", or "" for any other, such as one device.
        precision: the Trainer's precision.
        optimizer: class path.
        norm_clipping: whether gradients are clipped by their norm.
        four_bits: whether the base model is held in 4 bits.
        compiled: whether transformer blocks or the decode step are compiled.
        adapter: whether low-rank adapters are trained.
        tensor_parallel: whether tensors are split over ranks.
        pretraining_mix: whether a callback adds gradients of pretraining text.
        generator: class name, "" for the default.
        overfits: whether an epoch is a few batches, repeated.
        reloads: whether dataloaders are made anew after some epochs.
        limits_training: whether an epoch has fewer batches than its loader.
        tuner: class name of a callback that tunes an attribute of the module, or "".
    """

    module: str = ""
    device: str = "cpu"
    strategy: str = ""
    precision: str = ""
    optimizer: str = ""
    norm_clipping: bool = False
    four_bits: bool = False
    compiled: bool = False
    adapter: bool = False
    tensor_parallel: bool = False
    pretraining_mix: bool = False
    generator: str = ""
    overfits: bool = False
    reloads: bool = False
    limits_training: bool = False
    tuner: str = ""

    @property
    def shards_weights(self) -> bool:
        """Whether weights are sharded over ranks, so that an optimizer gets parts of them."""
        return self.strategy in ("fsdp1", "fsdp2")

    @property
    def uses_bitsandbytes(self) -> bool:
        """Whether the optimizer is one of bitsandbytes."""
        return self.optimizer.startswith("bitsandbytes.")


TUNERS = ("LearningRateFinder", "BatchSizeFinder")
OWN_MODULES = ("SFTModule", "RewardModule", "PPOModule")
IN_PROCESS_GENERATORS = ("", "CachedGenerator", "HuggingFaceGenerator")
# condition -> the setting, why it is refused, and what to use instead; the first that applies is reported
RULES: list[tuple[Callable[[Setup], bool], str]] = [
    (
        lambda s: s.precision in ("bf16-true", "16-true") and s.module in OWN_MODULES,
        HALF_PRECISION,
    ),
    (
        lambda s: s.overfits and s.module in OWN_MODULES,
        OVERFITS,
    ),
    (
        lambda s: s.reloads and s.module in OWN_MODULES,
        RELOADS,
    ),
    (
        lambda s: s.limits_training and s.module == "PPOModule",
        LIMITS_ROLLOUT,
    ),
    (
        lambda s: bool(s.tuner) and s.module in OWN_MODULES,
        "trainer.callbacks: LearningRateFinder and BatchSizeFinder tune an attribute lr or batch_size, which the "
        "modules do not have; try values with lit-rlhf sweep --over model.optimizer.lr=1e-5,1e-4, and sizes with "
        "lit-rlhf plan",
    ),
    (
        lambda s: s.precision.startswith("16") and s.device == "cpu",
        "trainer.precision: float16 does not train on a CPU (Lightning would silently use bfloat16); "
        "use -c precision/bf16-mixed",
    ),
    (
        lambda s: s.precision == "16-mixed" and s.strategy == "fsdp2",
        "trainer.precision: 16-mixed needs loss scaling, which FSDP2 does not support; use -c precision/bf16-mixed",
    ),
    (
        lambda s: s.strategy == "fsdp1" and (s.device == "cpu" or s.module == "PPOModule" or s.norm_clipping),
        "trainer.strategy: FSDP1 supports neither CPUs, nor rollouts outside the training step, nor clipping by norm; "
        "use FSDP2: -c strategy/fsdp",
    ),
    (
        lambda s: s.strategy == "deepspeed" and s.device == "cpu",
        "trainer.strategy: DeepSpeed under Lightning needs GPUs; use -c strategy/ddp, or -c strategy/fsdp to shard",
    ),
    (
        lambda s: s.strategy == "deepspeed" and (s.module == "PPOModule" or s.pretraining_mix),
        "trainer.strategy: PPO's rollouts and the second gradient of a PretrainingMix bypass DeepSpeed's engine; "
        "use -c strategy/fsdp",
    ),
    (
        lambda s: s.four_bits and (s.shards_weights or s.strategy == "deepspeed"),
        "loading.quantization: 4-bit weights cannot be sharded; use -c strategy/ddp, or -c adapter/lora with "
        "--model.loading.dtype=bfloat16",
    ),
    (
        lambda s: s.uses_bitsandbytes and s.shards_weights,
        "model.optimizer: the optimizers of bitsandbytes do not support sharded weights; "
        "use -c optimizer/adamw-8bit-sharded",
    ),
    (
        lambda s: s.tensor_parallel and (s.adapter or s.compiled or s.optimizer.startswith("torchao.")),
        "trainer.strategy.tensor_parallel_size: adapters, compiled blocks and 8-bit optimizers cannot be split; "
        "set it to 1, or model.adapter to null, loading.compile to false and -c optimizer/adamw",
    ),
    (
        lambda s: s.tensor_parallel and s.generator not in IN_PROCESS_GENERATORS,
        "trainer.strategy.tensor_parallel_size: a generator outside this process does not support split weights, and "
        "may return different responses to ranks that need the same; set it to 1, or model.generator to null",
    ),
    (
        lambda s: s.compiled and s.device == "cpu" and not any(map(which, (os.environ.get("CXX", "g++"), "clang++"))),
        "loading.compile or generator.init_args.compile: on a CPU torch.compile needs a C++ compiler; install g++, or "
        "set both to false",
    ),
    (
        lambda s: s.uses_bitsandbytes and ".Paged" in s.optimizer and s.device == "cpu",
        "model.optimizer: a paged optimizer moves its state between GPU and host memory, and there is no GPU; "
        "use -c optimizer/adamw-8bit",
    ),
]


def check_compatibility(settings: Any) -> None:
    """Refuse a recipe whose parts do not go together.

    Args:
        settings: the parsed configuration of a subcommand.

    Raises:
        UserError: the setting, the reason, and what to use instead.
    """
    setup, checkpoint = read_setup(settings), settings.get("ckpt_path")
    reason = setup_unsupported_reason(setup)
    if reason is not None:
        raise UserError(reason)
    if checkpoint and setup.strategy != "fsdp2" and is_sharded_checkpoint(Path(checkpoint)):
        raise UserError(
            f"ckpt_path: {checkpoint} is a folder of shards, which only FSDP2 reads: use -c strategy/fsdp, on any "
            "number of devices, including one"
        )
    if setup.generator:
        _check_connection(settings.model.init_args.generator)
    for name in ("optimizer", "scheduler"):
        if isinstance(given := settings.model.init_args.get(name), Namespace):
            _check_nulls(f"model.{name}", given)


def _check_nulls(section: str, given: Namespace) -> None:
    """Refuse null in a file where a constructor takes no None: jsonargparse passes it for what a callable returns."""
    constructor: Any = import_function(given.class_path, section)
    parameters = inspect.signature(constructor).parameters
    types = get_type_hints(vars(constructor).get("__init__", constructor))
    for name, value in given.get("init_args", Namespace()).items():
        takes_none = name not in types or type(None) in get_args(types[name]) or parameters[name].default is None
        if value is None and not takes_none:
            raise UserError(f"{section}.{name}: expected {getattr(types[name], '__name__', types[name])}, got null")


def setup_unsupported_reason(setup: Setup) -> str | None:
    """Return why a setup cannot run, or None."""
    for applies, reason in RULES:
        if applies(setup):
            return reason
    if setup.strategy == "deepspeed" and find_spec("deepspeed") is None:
        return f"this run needs the package 'deepspeed', which is not installed: {pip_command('deepspeed')}"
    return None


def read_setup(settings: Any) -> Setup:
    """Return the `Setup` of a parsed configuration; a module of the user's own may lack any of the settings."""
    trainer, arguments = settings.trainer, settings.model.get("init_args") or {}
    loading = arguments.get("loading") or {}
    generator = (arguments.get("generator") or {}).get("init_args") or {}
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    names = [get_class_name(callback) for callback in callbacks]
    return Setup(
        module=get_class_name(settings.model),
        device=_device(str(trainer.accelerator)),
        strategy=_strategy(trainer.strategy),
        precision=str(trainer.precision or ""),
        optimizer=get_class_path(arguments.get("optimizer")),
        norm_clipping=bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value",
        four_bits=loading.get("quantization") is not None,
        compiled=bool(loading.get("compile") or generator.get("compile")),
        adapter=arguments.get("adapter") is not None,
        tensor_parallel=_tensor_parallel_size(trainer.strategy) != 1,
        pretraining_mix="PretrainingMix" in names,
        generator=get_class_name(arguments.get("generator")),
        overfits=bool(trainer.overfit_batches),
        reloads=bool(trainer.reload_dataloaders_every_n_epochs),
        limits_training=not trainer.fast_dev_run and _is_limit(trainer.limit_train_batches),
        tuner=next((name for name in names if name in TUNERS), ""),
    )


def _check_connection(generator: Namespace) -> None:
    """Build a generator, which loads nothing, and let it check that its service can be reached."""
    engine = _instantiate(generator)
    if isinstance(engine, Generator):
        engine.check_connection()


def _instantiate(given: Any) -> Any:
    """Return the object that a setting names by `class_path`; another value as it is."""
    if not isinstance(given, Namespace) or "class_path" not in given:
        return given.as_dict() if isinstance(given, Namespace) else given
    module, _, name = given.class_path.rpartition(".")
    arguments = vars(given.get("init_args") or Namespace())
    return getattr(import_module(module), name)(**{key: _instantiate(value) for key, value in arguments.items()})


def _is_limit(batches: int | float | None) -> bool:
    """Return whether a limit of batches is one: 1.0 is all of them, 1 is one batch."""
    return isinstance(batches, int) or (batches is not None and batches < 1.0)


def _device(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator


def _strategy(strategy: Any) -> str:
    name = get_class_name(strategy)  # a class, or one of Lightning's names for it
    if name in ("FSDP2Strategy", "ModelParallelStrategy"):
        return "fsdp2"
    if name.startswith("fsdp") or name == "FSDPStrategy":
        return "fsdp1"
    if name.startswith("deepspeed") or name == "DeepSpeedStrategy":
        return "deepspeed"
    return "ddp" if name.startswith("ddp") or name == "DDPStrategy" else ""


def _tensor_parallel_size(strategy: Any) -> int:
    arguments = (strategy.get("init_args") or {}) if isinstance(strategy, Namespace) else {}
    size: int = arguments.get("tensor_parallel_size", 1)
    return size
