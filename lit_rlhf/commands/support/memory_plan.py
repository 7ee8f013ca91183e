"""Memory per device in each phase of a run, from its parsed recipe: models, batches, strategy, precision."""

from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from lit_rlhf.commands.support.compatibility import IN_PROCESS_GENERATORS, Setup, read_setup
from lit_rlhf.commands.support.planned_models import load_planned_model
from lit_rlhf.errors import UserError
from lit_rlhf.generation.cached import DECODE_BATCH_SIZE
from lit_rlhf.models.loading import max_positions
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.memory_estimate import (
    ActivationMemory,
    ParameterMemory,
    PassShape,
    activation_memory,
    build_meta_model,
    kv_cache_bytes,
    parameter_memory,
)
from lit_rlhf.strategies import transformer_blocks

SHARED_CRITICS = ("SharedBackboneCritic", "LoRACritic")
COMPLETIONS = 4  # assumed per ranking: the data is not read


@dataclass
class MemoryPlan:
    """Memory of a run on one device, in bytes.

    Args:
        sizes: the batch sizes that the plan is for, as text.
        phases: phase -> part -> bytes.
        parameters: model -> number of parameters.
        assumptions: what the plan assumes because it cannot be known, as text.
    """

    sizes: str
    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())


class MemorySettings:
    """The settings of a parsed recipe that decide how much memory a run needs."""

    def __init__(self, settings: Any) -> None:
        self.setup: Setup = read_setup(settings)
        self.model = settings.model.init_args
        self.data = (settings.data or {}).get("init_args") or {}
        trainer = settings.trainer
        loading = dict((self.model.get("loading") or {}).items())
        self.loading = ModelLoadingConfig(**loading)
        self.adapter = LoRA(**dict(self.model.adapter.items())) if self.model.get("adapter") else None
        devices = int(trainer.devices) if str(trainer.devices).isdigit() else 1  # a string on the command line
        self.world_size = max(devices, 1) * int(trainer.num_nodes or 1)
        self.shards = self.world_size if self.setup.shards_weights else 1
        # DDP reduces gradients in buckets of the same total size
        self.ddp_buckets = self.setup.strategy == "ddp" and self.world_size > 1
        self.accumulates = self.setup.pretraining_mix or int(trainer.accumulate_grad_batches or 1) > 1
        self.mixed = self.setup.precision.startswith(("bf16", "16"))
        self.element_size = 2 if self.mixed or self.loading.dtype != "float32" else 4  # bytes per activation


def plan_memory(settings: Any) -> MemoryPlan:
    """Return the memory that the run of a parsed recipe needs.

    Raises:
        UserError: the module is not one of this library, or a starting model is missing.
    """
    recipe = MemorySettings(settings)
    if recipe.setup.tensor_parallel:
        raise UserError(
            "plan does not support tensor parallelism; set trainer.strategy.init_args.tensor_parallel_size to 1"
        )
    planners = {"SFTModule": _plan_sft, "RewardModule": _plan_reward_model, "PPOModule": _plan_ppo}
    if recipe.setup.module not in planners:
        raise UserError(f"plan supports {', '.join(planners)}, not {recipe.setup.module}")
    return planners[recipe.setup.module](recipe)


def _plan_sft(recipe: MemorySettings) -> MemoryPlan:
    rows, data = int(recipe.data["micro_batch_size"]), recipe.data
    width = int(data.get("seq_len") or data["max_prompt_length"] + data["max_completion_length"])
    sizes = f"{rows} rows of {width:,} tokens per backward pass"
    planned = _plan_training(recipe, rows, width, scalar=False, sizes=sizes)
    if "seq_len" not in data:  # which tokens of a conversation are targets depends on the data
        planned.assumptions.append("all tokens are targets of the loss; tokens that are not have no logits")
    return planned


def _plan_reward_model(recipe: MemorySettings) -> MemoryPlan:
    rankings, data = int(recipe.data["micro_batch_size"]), recipe.data
    width = int(data["max_prompt_length"] + data["max_completion_length"])
    sizes = f"{rankings} rankings of {COMPLETIONS} completions per backward pass, {width:,} tokens each"
    planned = _plan_training(recipe, rankings * COMPLETIONS, width, scalar=True, sizes=sizes)
    planned.assumptions.append(f"{COMPLETIONS} completions per ranking, each with its prompt")
    return planned


def _plan_training(recipe: MemorySettings, rows: int, width: int, scalar: bool, sizes: str) -> MemoryPlan:
    config, note = load_planned_model(recipe.model.model, recipe.loading)
    width = min(width, max_positions(config) or width)
    model, activations = _training_memory(recipe, config, rows, width, width, scalar)
    planned = MemoryPlan(sizes, parameters={"model": model.parameters}, assumptions=[note] if note else [])
    transient = _gathered_memory(recipe, model) | _activation_parts(activations)
    planned.phases |= _step_phases(recipe, _resident_memory(recipe, model), transient, "training step")
    return planned


def _plan_ppo(recipe: MemorySettings) -> MemoryPlan:
    model, ppo, response = recipe.model, recipe.model.ppo, int(recipe.model.sampling.max_new_tokens)
    config, note = load_planned_model(model.model, recipe.loading)
    width = min(int(recipe.data.get("max_prompt_length", 1024)) + response, max_positions(config) or 10**9)
    micro_batch = int(ppo.micro_batch_size)
    policy, activations = _training_memory(recipe, config, micro_batch, width, response + 1, scalar=False)
    planned = MemoryPlan(
        f"{ppo.micro_batch_size} episodes per backward pass, {ppo.forward_batch_size} per scoring pass, "
        f"{width:,} tokens each",
        parameters={"policy": policy.parameters},
        assumptions=[note] if note else [],
    )
    resident, gathered = _resident_memory(recipe, policy), _gathered_memory(recipe, policy)
    critic_path, critic_activations = _critic_path(model), None
    if critic_path is not None:
        critic_config = _load_config_or(config, critic_path, recipe, planned)
        critic, critic_activations = _training_memory(recipe, critic_config, micro_batch, width, width, scalar=True)
        planned.parameters["critic"] = critic.parameters
        resident = _add(resident, _resident_memory(recipe, critic))
        gathered = _add(gathered, _gathered_memory(recipe, critic))
    frozen = _frozen_memory(recipe, config, planned)
    resident |= {name: value for name, value in frozen.items() if name not in _offloaded_models(recipe)}
    vocabulary = config.get_text_config().vocab_size
    first, *rest = _step_phases(recipe, resident, gathered | _activation_parts(activations), "update").items()
    planned.phases |= [first]
    if critic_activations is not None:  # the critic's pass runs after the policy's backward has freed its activations
        gradients = (
            resident["gradients"]
            if recipe.accumulates
            else _bucket_bytes(recipe, resident) + policy.gradients // recipe.shards
        )
        planned.phases["update, critic's pass"] = (
            resident | {"gradients": gradients} | gathered | _activation_parts(critic_activations)
        )
    planned.phases |= rest
    rollout = {name: value for name, value in resident.items() if name != "gradients"}  # cleared at each step
    # under mixed precision weights are gathered in bfloat16
    extra = {"policy gathered": policy.parameters * recipe.element_size} if recipe.shards > 1 else {}
    is_single = recipe.loading.dtype == "float32" and recipe.loading.quantization is None
    if recipe.setup.device == "cpu" and recipe.shards == 1 and is_single:
        extra = {"prepacked weights": policy.parameters * recipe.element_size}  # of `llama_decoder`
    if recipe.setup.generator in IN_PROCESS_GENERATORS:
        decode_rows = min(max(int(ppo.rollout_batch_size) // recipe.world_size, 1), _decode_batch_size(model))
        extra |= {
            "KV cache": kv_cache_bytes(config, decode_rows, width, recipe.element_size),
            "logits": decode_rows * vocabulary * (recipe.element_size + 8),  # and their cumulative sum in float64
        }
        planned.phases["generation"] = rollout | extra
    else:
        planned.assumptions.append("responses are generated by a server on another device")
    scoring_logits = int(ppo.forward_batch_size) * (response + 1) * vocabulary * recipe.element_size
    planned.phases["scoring"] = rollout | frozen | {"logits": scoring_logits}
    return planned


def _decode_batch_size(model: Any) -> int:
    """Return the largest number of responses that the generator of this process decodes at once."""
    arguments = (model.get("generator") or {}).get("init_args") or {}
    return int(arguments.get("batch_size") or DECODE_BATCH_SIZE)


def _add(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Return the sums of two dictionaries with the same keys."""
    return {name: value + other[name] for name, value in one.items()}


def _training_memory(
    recipe: MemorySettings, config: Any, rows: int, width: int, num_logits: int, scalar: bool
) -> tuple[ParameterMemory, ActivationMemory]:
    loading, adapter = recipe.loading, recipe.adapter
    model = build_meta_model(config, loading, adapter, scalar)
    parameters = parameter_memory(model, loading, recipe.setup.optimizer, transformer_blocks(model))
    shape = PassShape(rows, width, num_logits, recipe.mixed)
    if recipe.mixed and recipe.shards > 1:  # weights are gathered in bfloat16, so autocast makes no copies of them
        loading = replace(loading, dtype="bfloat16")
    return parameters, activation_memory(config, loading, adapter, scalar, shape)


def _resident_memory(recipe: MemorySettings, model: ParameterMemory) -> dict[str, int]:
    """Return what a trained model holds from step to step."""
    shards, optimizer = recipe.shards, model.optimizer
    if recipe.setup.strategy == "deepspeed":
        optimizer //= recipe.world_size
    gradients = model.gradients * (2 if recipe.ddp_buckets else 1)
    return {
        "weights": model.weights // shards,
        "gradients": gradients // shards,
        "optimizer state": optimizer // shards,
    }


def _step_phases(
    recipe: MemorySettings, resident: dict[str, int], transient: dict[str, int], name: str
) -> dict[str, dict[str, int]]:
    """Return the phases of an optimizer step: two, as gradients grow while activations are freed.

    Under accumulation or a pretraining mix it is one: the last backward pass finds the gradients of earlier ones.
    """
    if recipe.accumulates:
        return {name: resident | transient}
    return {
        f"{name}, backward begins": resident | {"gradients": _bucket_bytes(recipe, resident)} | transient,
        f"{name}, backward done": resident,
    }


def _bucket_bytes(recipe: MemorySettings, resident: dict[str, int]) -> int:
    """Return the part of the gradients that is DDP's buckets, which stay allocated from step to step."""
    return resident["gradients"] // 2 if recipe.ddp_buckets else 0


def _gathered_memory(recipe: MemorySettings, model: ParameterMemory) -> dict[str, int]:
    divisor = 2 if recipe.mixed and recipe.loading.dtype == "float32" else 1
    return {"gathered weights": model.unsharded // divisor if recipe.shards > 1 else 0}


def _activation_parts(memory: ActivationMemory) -> dict[str, int]:
    return {"activations": memory.activations, "logits and their gradient": memory.logits}


def _frozen_memory(recipe: MemorySettings, config: Any, planned: MemoryPlan) -> dict[str, int]:
    """Return the weights of the reference, sharded as the policy is, and of the reward model, full on every device."""
    model, frozen = recipe.model, {}
    if recipe.adapter is None or (model.get("reference") or model.model) != model.model:
        reference = _load_config_or(config, model.get("reference") or model.model, recipe, planned)
        frozen["reference"] = _frozen_parameters(reference, recipe.loading, scalar=False)
    if path := _reward_model_path(model):
        config = _load_config_or(config, path, recipe, planned)
        frozen["reward model"] = _frozen_parameters(config, _reward_loading(model), scalar=True)
    planned.parameters |= {name: memory.parameters for name, memory in frozen.items()}
    weights = {name: memory.weights for name, memory in frozen.items()}
    return {name: value // (recipe.shards if name == "reference" else 1) for name, value in weights.items()}


def _offloaded_models(recipe: MemorySettings) -> list[str]:
    """Return which frozen models are in host memory except while scoring; 4-bit weights cannot be offloaded."""
    loading = {"reference": recipe.loading, "reward model": _reward_loading(recipe.model)}
    offload = recipe.model.ppo.get("offload_frozen")
    return [name for name, each in loading.items() if offload and each.quantization is None]


def _reward_loading(model: Any) -> ModelLoadingConfig:
    arguments = model.reward.get("init_args") or {}
    return ModelLoadingConfig(**dict((arguments.get("loading") or {}).items()))


def _frozen_parameters(config: Any, loading: ModelLoadingConfig, scalar: bool) -> ParameterMemory:
    return parameter_memory(build_meta_model(config, loading, None, scalar), loading, "", [])


def _critic_path(model: Any) -> str | None:
    """Return the model that a critic with weights of its own starts from, or None if there is no such critic.

    An adapter on the policy's base, or a head on its backbone, is small in comparison.
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
    return critic or _reward_model_path(model) or str(model.model)


def _reward_model_path(model: Any) -> str | None:
    return str(model.reward.init_args.model) if model.reward.class_path.endswith("RewardModelScorer") else None


def _load_config_or(config: Any, path: str, recipe: MemorySettings, planned: MemoryPlan) -> Any:
    """Return the configuration of a model, or the policy's if none can be found for it."""
    try:
        found, note = load_planned_model(path, recipe.loading)
    except UserError:
        found, note = config, f"{path} does not exist yet: assumed to be of the policy's size"
    if note and note not in planned.assumptions:
        planned.assumptions.append(note)
    return found
