"""Combinations of strategy, precision, optimizer and adapter that cannot work, refused before anything is loaded."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import torch

from lit_rlhf.commands.support.suggestions import pip_command
from lit_rlhf.errors import UserError
from lit_rlhf.models.checkpoint_files import is_sharded_checkpoint


class Setup(NamedTuple):
    """What decides whether a run can work.

    Args:
        module: class of the stage's module.
        device: "cpu", "cuda", or what else the Trainer's accelerator says.
        strategy: "ddp", "fsdp2", "fsdp1", "deepspeed", or "" for any other, one device among them.
        precision: as the Trainer takes it.
        optimizer: class path.
        clipping: whether gradients are clipped by their norm.
        four_bits: whether the base is held in 4 bits.
        compiled: whether blocks or the rollout's step are compiled.
        adapted: whether adapters are trained.
        split: whether tensors are split over ranks.
        mixes: whether a callback adds gradients of pretraining text.
        engine: class path of what generates, "" for the default.
    """

    module: str = ""
    device: str = "cpu"
    strategy: str = ""
    precision: str = ""
    optimizer: str = ""
    clipping: bool = False
    four_bits: bool = False
    compiled: bool = False
    adapted: bool = False
    split: bool = False
    mixes: bool = False
    engine: str = ""

    @property
    def shards_weights(self) -> bool:
        """Whether weights are cut over ranks, so that an optimizer sees parts of them."""
        return self.strategy in ("fsdp1", "fsdp2")

    @property
    def bitsandbytes(self) -> bool:
        """Whether the optimizer is one of bitsandbytes."""
        return self.optimizer.startswith("bitsandbytes.")


OURS = ("SFTModule", "RewardModule", "PPOModule")
# what is refused; the setting, why, and what to use instead. The first that applies is told.
RULES: list[tuple[Callable[[Setup], bool], str]] = [
    (
        lambda s: s.precision in ("bf16-true", "16-true") and s.module in OURS,
        "trainer.precision: Lightning would round log-probs, advantages and normalizers to half precision with the "
        "weights; use -c precision/bf16-true, which sets model.loading.dtype instead, or -c precision/bf16-mixed",
    ),
    (
        lambda s: s.precision.startswith("16") and s.device == "cpu",
        "trainer.precision: float16 does not train on a CPU (Lightning would take bfloat16 without a word); "
        "use -c precision/bf16-mixed",
    ),
    (
        lambda s: s.precision == "16-mixed" and s.strategy == "fsdp2",
        "trainer.precision: 16-mixed scales its loss, which FSDP2 does not know; use -c precision/bf16-mixed",
    ),
    (
        lambda s: s.strategy == "fsdp1" and (s.device == "cpu" or s.module == "PPOModule" or s.clipping),
        "trainer.strategy: FSDP1 knows neither CPUs, nor rollouts outside of the training step, nor clipping by norm; "
        "use FSDP2: -c strategy/fsdp",
    ),
    (
        lambda s: s.strategy == "deepspeed" and s.device == "cpu",
        "trainer.strategy: DeepSpeed under Lightning needs GPUs; use -c strategy/ddp, or -c strategy/fsdp to shard",
    ),
    (
        lambda s: s.strategy == "deepspeed" and (s.module == "PPOModule" or s.mixes),
        "trainer.strategy: PPO's rollouts and the second gradient of a PretrainingMix go past DeepSpeed's engine; "
        "use -c strategy/fsdp",
    ),
    (
        lambda s: s.four_bits and (s.shards_weights or s.strategy == "deepspeed"),
        "loading.quantization: 4-bit weights cannot be sharded; use -c strategy/ddp, or -c adapter/lora with "
        "--model.loading.dtype=bfloat16",
    ),
    (
        lambda s: s.bitsandbytes and s.shards_weights,
        "model.optimizer: the optimizers of bitsandbytes do not take sharded weights; "
        "use -c optimizer/adamw-8bit-sharded",
    ),
    (
        lambda s: s.split and (s.adapted or s.compiled or s.optimizer.startswith("torchao.")),
        "trainer.strategy.tensor_parallel_size: adapters, compiled blocks and 8-bit optimizers cannot be split; "
        "set it to 1, or model.adapter to null, loading.compile to false and -c optimizer/adamw",
    ),
    (
        lambda s: s.split and bool(s.engine) and not s.engine.startswith("lit_rlhf.generation.generators."),
        "trainer.strategy.tensor_parallel_size: another engine knows no split weights, and may answer ranks "
        "differently that must see the same; set it to 1, or model.generator to null",
    ),
    (
        lambda s: s.compiled and s.device == "cpu" and not any(map(which, (os.environ.get("CXX", "g++"), "clang++"))),
        "loading.compile or generator.init_args.compile: on a CPU torch.compile needs a C++ compiler; install g++, or "
        "set both to false",
    ),
    (
        lambda s: s.bitsandbytes and ".Paged" in s.optimizer and s.device == "cpu",
        "model.optimizer: a paged optimizer moves its state between GPU and host, and on a CPU there is nothing to "
        "page; use -c optimizer/adamw-8bit",
    ),
]


def check_compatibility(settings: Any) -> None:
    """Refuse a recipe whose parts do not go together.

    Args:
        settings: the parsed configuration of a subcommand.

    Raises:
        UserError: the setting, the reason, and what to use instead.
    """
    setup, checkpoint = setup_of(settings), settings.get("ckpt_path")
    reason = refusal(setup)
    if reason is not None:
        raise UserError(reason)
    if checkpoint and setup.strategy != "fsdp2" and is_sharded_checkpoint(Path(checkpoint)):
        raise UserError(
            f"ckpt_path: {checkpoint} is a folder of shards, which only FSDP2 reads: use -c strategy/fsdp, on any "
            "number of devices, one among them"
        )
    if setup.engine:
        module, _, name = setup.engine.rpartition(".")
        engine = getattr(import_module(module), name)
        if hasattr(engine, "reach"):
            arguments = settings.model.init_args.generator.get("init_args")
            engine(**(arguments.as_dict() if arguments else {})).reach()


def refusal(setup: Setup) -> str | None:
    """Return why a setup cannot run, or None."""
    for applies, reason in RULES:
        if applies(setup):
            return reason
    if setup.strategy == "deepspeed" and find_spec("deepspeed") is None:
        return f"this run needs the package 'deepspeed', which is not installed: {pip_command('deepspeed')}"
    return None


def setup_of(settings: Any) -> Setup:
    """Return what matters of a parsed configuration; a module of someone else's may have none of our settings."""
    trainer, arguments = settings.trainer, settings.model.get("init_args") or {}
    loading = arguments.get("loading") or {}
    generator = (arguments.get("generator") or {}).get("init_args") or {}
    return Setup(
        module=settings.model.class_path.rsplit(".", 1)[-1],
        device=_device(str(trainer.accelerator)),
        strategy=_strategy(trainer.strategy),
        precision=str(trainer.precision or ""),
        optimizer=str(_class_path(arguments.get("optimizer"))),
        clipping=bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm != "value",
        four_bits=loading.get("quantization") is not None,
        compiled=bool(loading.get("compile") or generator.get("compile")),
        adapted=arguments.get("adapter") is not None,
        split=_tensor_parallel(trainer.strategy),
        mixes=any(str(_class_path(each)).endswith("PretrainingMix") for each in trainer.callbacks or ()),
        engine=str(_class_path(arguments.get("generator"))),
    )


def _device(accelerator: str) -> str:
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if accelerator == "gpu" else accelerator


def _strategy(strategy: Any) -> str:
    name = str(_class_path(strategy))
    if name.endswith(("FSDP2Strategy", "ModelParallelStrategy")):
        return "fsdp2"
    if name.startswith("fsdp") or name.endswith("FSDPStrategy"):
        return "fsdp1"
    if name.startswith("deepspeed") or name.endswith("DeepSpeedStrategy"):
        return "deepspeed"
    return "ddp" if name.startswith("ddp") or name.endswith("DDPStrategy") else ""


def _tensor_parallel(strategy: Any) -> bool:
    arguments = (strategy.get("init_args") or {}) if hasattr(strategy, "get") else {}
    return arguments.get("tensor_parallel_size", 1) != 1


def _class_path(setting: Any) -> Any:
    return setting.get("class_path", "") if hasattr(setting, "get") else setting or ""
