"""What each phase of a run holds on one device, from its parsed recipe: models, batches, strategy, precision."""

from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from lit_rlhf.commands.support.compatibility import Setup, setup_of
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_config, max_positions
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.memory_estimate import (
    ActivationMemory,
    ParameterMemory,
    PassShape,
    activation_memory,
    build_meta_model,
    cache_bytes,
    parameter_memory,
)
from lit_rlhf.strategies import transformer_blocks

SHARED_CRITICS = ("SharedBackboneCritic", "LoRACritic")
COMPLETIONS = 4  # of a ranking, where the data is not read


@dataclass
class MemoryPlan:
    """What a run holds on one device, in bytes.

    Args:
        sizes: the sizes that the figures are for, in words.
        phases: of each phase, what it holds.
        parameters: of each model, how many weights.
        assumed: what could not be known, in words.
    """

    sizes: str
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The phase that holds most."""
        return max(sum(parts.values()) for parts in self.phases.values())


class Recipe:
    """The settings of a parsed recipe that decide about memory."""

    def __init__(self, settings: Any) -> None:
        self.setup: Setup = setup_of(settings)
        self.model = settings.model.init_args
        self.data = (settings.data or {}).get("init_args") or {}
        trainer = settings.trainer
        loading = dict((self.model.get("loading") or {}).items())
        self.loading = ModelLoadingConfig(**loading)
        self.adapter = LoRA(**dict(self.model.adapter.items())) if self.model.get("adapter") else None
        devices = int(trainer.devices) if str(trainer.devices).isdigit() else 1  # "2" on the command line
        self.world = max(devices, 1) * int(trainer.num_nodes or 1)
        self.shards = self.world if self.setup.shards_weights else 1
        # DDP reduces gradients in buckets that are as large again
        self.buckets = self.setup.strategy == "ddp" and self.world > 1
        self.accumulates = self.setup.mixes or int(trainer.accumulate_grad_batches or 1) > 1
        self.half = self.setup.precision.startswith(("bf16", "16"))
        self.number = 2 if self.half or self.loading.dtype != "float32" else 4  # bytes of an activation


def plan(settings: Any) -> MemoryPlan:
    """Return what the run of a parsed recipe holds.

    Raises:
        UserError: a module that is none of ours, or a starting model that is not there.
    """
    recipe = Recipe(settings)
    if recipe.setup.split:
        raise UserError("plan does not count split tensors; set trainer.strategy.init_args.tensor_parallel_size to 1")
    makers = {"SFTModule": _plan_text, "RewardModule": _plan_rankings, "PPOModule": _plan_ppo}
    if recipe.setup.module not in makers:
        raise UserError(f"plan knows {', '.join(makers)}, not {recipe.setup.module}")
    return makers[recipe.setup.module](recipe)


def _plan_text(recipe: Recipe) -> MemoryPlan:
    rows, data = int(recipe.data["micro_batch_size"]), recipe.data
    width = int(data.get("seq_len") or data["max_prompt_length"] + data["max_completion_length"])
    sizes = f"{rows} rows of {width:,} tokens a backward pass"
    planned = _plan_training(recipe, rows, width, scalar=False, sizes=sizes)
    if "seq_len" not in data:  # which replies of a conversation are learnt is known from the rows alone
        planned.assumed.append("all tokens are targets of the loss; those that are not have no logits")
    return planned


def _plan_rankings(recipe: Recipe) -> MemoryPlan:
    rankings, data = int(recipe.data["micro_batch_size"]), recipe.data
    width = int(data["max_prompt_length"] + data["max_completion_length"])
    sizes = f"{rankings} rankings of {COMPLETIONS} completions a backward pass, {width:,} tokens each"
    planned = _plan_training(recipe, rankings * COMPLETIONS, width, scalar=True, sizes=sizes)
    planned.assumed.append(f"{COMPLETIONS} completions a ranking, each with its prompt")
    return planned


def _plan_training(recipe: Recipe, rows: int, width: int, scalar: bool, sizes: str) -> MemoryPlan:
    config = load_config(recipe.model.model, recipe.loading)
    width = min(width, max_positions(config) or width)
    size, kept = _training_memory(recipe, config, rows, width, width, scalar)
    planned = MemoryPlan(sizes, parameters={"model": size.parameters})
    planned.phases |= _step(
        recipe, _resident_memory(recipe, size), _gathered(recipe, size) | _kept(kept), "training step"
    )
    return planned


def _plan_ppo(recipe: Recipe) -> MemoryPlan:
    model, ppo, response = recipe.model, recipe.model.ppo, int(recipe.model.sampling.max_new_tokens)
    config = load_config(model.model, recipe.loading)
    width = min(int(recipe.data.get("max_prompt_length", 1024)) + response, max_positions(config) or 10**9)
    policy, kept = _training_memory(recipe, config, int(ppo.micro_batch_size), width, response + 1, scalar=False)
    planned = MemoryPlan(
        f"{ppo.micro_batch_size} episodes a backward pass, {ppo.forward_batch_size} a scoring pass, {width:,} tokens each",
        parameters={"policy": policy.parameters},
    )
    held, gathered = _resident_memory(recipe, policy), _gathered(recipe, policy)
    start, critic_kept = _critic_start(model), None
    if start is not None:
        own, critic_kept = _training_memory(
            recipe, _config_or(config, start, recipe, planned), int(ppo.micro_batch_size), width, width, scalar=True
        )
        planned.parameters["critic"] = own.parameters
        held = {name: held[name] + value for name, value in _resident_memory(recipe, own).items()}
        gathered = {name: value + _gathered(recipe, own)[name] for name, value in gathered.items()}
    frozen = _frozen(recipe, config, planned)
    held |= {name: value for name, value in frozen.items() if name not in _offloaded(recipe)}
    vocabulary = config.get_text_config().vocab_size
    begins, *done = _step(recipe, held, gathered | _kept(kept), "update").items()
    planned.phases |= [begins]
    if critic_kept is not None:  # a pass of its own, when the policy's has given back what it kept
        found = held["gradients"] if recipe.accumulates else _buckets(recipe, held) + policy.gradients // recipe.shards
        planned.phases["update, critic's pass"] = held | {"gradients": found} | gathered | _kept(critic_kept)
    planned.phases |= done
    held = {name: value for name, value in held.items() if name != "gradients"}  # a step clears them at once
    # under mixed precision weights are gathered in bfloat16
    whole = {"policy gathered": policy.parameters * recipe.number} if recipe.shards > 1 else {}
    if recipe.setup.device == "cpu" and recipe.number == 4 and recipe.shards == 1 and recipe.adapter is None:
        whole = {"packed weights": policy.parameters * 4}  # `lit_rlhf.generation.prepacked_linear`
    decoded = min(max(int(ppo.rollout_batch_size) // recipe.world, 1), 256)  # `CachedGenerator.batch_size`
    planned.phases["generation"] = (
        held
        | whole
        | {
            "keys and values": cache_bytes(config, decoded, width, recipe.number),
            "logits": decoded * vocabulary * (recipe.number + 8),  # beside them their running sum, in float64
        }
    )
    planned.phases["scoring"] = (
        held | frozen | {"logits": int(ppo.forward_batch_size) * (response + 1) * vocabulary * recipe.number}
    )
    return planned


def _training_memory(
    recipe: Recipe, config: Any, rows: int, width: int, keep: int, scalar: bool
) -> tuple[ParameterMemory, ActivationMemory]:
    loading, adapter = recipe.loading, recipe.adapter
    model = build_meta_model(config, loading, adapter, scalar)
    size = parameter_memory(model, loading, recipe.setup.optimizer, transformer_blocks(model))
    batch = PassShape(rows, width, keep, recipe.half)
    if recipe.half and recipe.shards > 1:  # weights are gathered in bfloat16, so autocast makes no copies of them
        return size, activation_memory(config, replace(loading, dtype="bfloat16"), adapter, scalar, batch)
    return size, activation_memory(config, loading, adapter, scalar, batch)


def _resident_memory(recipe: Recipe, size: ParameterMemory) -> dict[str, int]:
    shards, optimizer = recipe.shards, size.optimizer
    if recipe.setup.strategy == "deepspeed":
        optimizer //= recipe.world
    gradients = size.gradients * (2 if recipe.buckets else 1)
    return {"weights": size.weights // shards, "gradients": gradients // shards, "optimizer state": optimizer // shards}


def _step(recipe: Recipe, held: dict[str, int], passing: dict[str, int], name: str) -> dict[str, dict[str, int]]:
    """Return the phases of an optimizer step: one, or two where gradients grow as what a pass kept is given back.

    Backward passes before the last (accumulation, a pretraining mix) leave gradients that the last finds.
    """
    if recipe.accumulates:
        return {name: held | passing}
    return {
        f"{name}, backward begins": held | {"gradients": _buckets(recipe, held)} | passing,
        f"{name}, backward done": held,
    }


def _buckets(recipe: Recipe, held: dict[str, int]) -> int:
    """Return what DDP's buckets take, of the gradients; they stay from step to step."""
    return held["gradients"] // 2 if recipe.buckets else 0


def _gathered(recipe: Recipe, size: ParameterMemory) -> dict[str, int]:
    halved = 2 if recipe.half and recipe.loading.dtype == "float32" else 1
    return {"gathered weights": size.gathered // halved if recipe.shards > 1 else 0}


def _kept(kept: ActivationMemory) -> dict[str, int]:
    return {"activations": kept.activations, "logits and their gradient": kept.logits}


def _frozen(recipe: Recipe, config: Any, planned: MemoryPlan) -> dict[str, int]:
    """Reference and reward model, nothing but weights: the one sharded as the policy is, the other on every device."""
    model, frozen = recipe.model, {}
    if recipe.adapter is None or (model.get("reference") or model.model) != model.model:
        other = _config_or(config, model.get("reference") or model.model, recipe, planned)
        frozen["reference"] = _frozen_size(other, recipe.loading, scalar=False)
    if path := _reward_path(model):
        config = _config_or(config, path, recipe, planned)
        frozen["reward model"] = _frozen_size(config, _reward_options(model), scalar=True)
    planned.parameters |= {name: size.parameters for name, size in frozen.items()}
    held = {name: size.weights for name, size in frozen.items()}
    return {name: value // (recipe.shards if name == "reference" else 1) for name, value in held.items()}


def _offloaded(recipe: Recipe) -> list[str]:
    """Return which of them lie in host memory but for scoring; weights in 4 bits do not."""
    loading = {"reference": recipe.loading, "reward model": _reward_options(recipe.model)}
    offload = recipe.model.ppo.get("offload_frozen")
    return [name for name, each in loading.items() if offload and each.quantization is None]


def _reward_options(model: Any) -> ModelLoadingConfig:
    arguments = getattr(model.reward, "init_args", None) or {}
    return ModelLoadingConfig(**dict((arguments.get("loading") or {}).items()))


def _frozen_size(config: Any, loading: ModelLoadingConfig, scalar: bool) -> ParameterMemory:
    return parameter_memory(build_meta_model(config, loading, None, scalar), loading, "", [])


def _critic_start(model: Any) -> str | None:
    """Return the folder of a critic with weights of its own, or None where it has next to none, or there is no critic.

    An adapter on the policy's base, or a head on its trunk, is small beside them.
    """
    estimator, critic = model.get("advantages"), model.get("critic")
    if estimator is not None:
        module, _, name = estimator.class_path.rpartition(".")
        if not getattr(import_module(module), name).uses_critic:
            return None
    if critic is not None and not isinstance(critic, str):
        if critic.class_path.endswith(SHARED_CRITICS):
            return None
        critic = (critic.get("init_args") or {}).get("model")
    return critic or _reward_path(model) or str(model.model)


def _reward_path(model: Any) -> str | None:
    reward = model.get("reward")
    name = str(getattr(reward, "class_path", ""))
    return str(reward.init_args.model) if name.endswith("RewardModelScorer") else None


def _config_or(config: Any, path: str, recipe: Recipe, planned: MemoryPlan) -> Any:
    """Return the configuration of a folder, or the policy's where an earlier stage has still to write it."""
    try:
        return load_config(path, recipe.loading)
    except UserError:
        note = f"{path} is not there yet: taken to be of the policy's size"
        if note not in planned.assumed:
            planned.assumed.append(note)
        return config
