"""FSDP2 and tensor parallelism: default mesh sizes, sharding per block, unsharded weights for a rollout."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.checkpoint_files import ContainsObjects, is_sharded_checkpoint, read_weight_names
from lit_rlhf.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices of all nodes, as in `recipes/strategy/fsdp.yaml`.

    Args:
        save_distributed_checkpoint: Write a folder of shards, one per rank, instead of one file that rank zero gathers
            in memory. `lit-rlhf export` reads both; a folder can be resumed under this strategy only, on any number of
            ranks.
        tensor_parallel_size: Number of ranks over which each layer's tensors are split. They compute the same rows, and
            count as one data-parallel rank.
        weights_only: Load checkpoints without unpickling objects. False is for files of trusted origin that hold Python
            objects, such as those of a custom callback or optimizer.
        settings: Passed on to `ModelParallelStrategy`.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        weights_only: bool = True,
        tensor_parallel_size: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            tensor_parallel_size=tensor_parallel_size,
            **settings,
        )
        self.weights_only = weights_only

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load with this strategy's `weights_only`: Lightning 2.6.6 does not pass on the argument of `fit`.

        Raises:
            UserError: A checkpoint of an adapter lacks a weight that is trained.
        """
        path = Path(self.broadcast(checkpoint_path))
        weights_only = self.weights_only if weights_only is None else weights_only
        assert self.lightning_module is not None
        if self.lightning_module.strict_loading:
            return super().load_checkpoint(path, weights_only)
        try:
            missing = trainable_names(self.lightning_module) - read_weight_names(path)
        except ContainsObjects:  # which `weights_only` allows; they are not read twice
            missing = set()
        if missing:
            raise UserError(f"ckpt_path: the checkpoint lacks the weight {min(missing)!r} that this recipe trains")
        with _partial_loading() if is_sharded_checkpoint(path) else nullcontext():
            return super().load_checkpoint(path, weights_only)

    def setup_environment(self) -> None:
        """Shard over all devices; Lightning's default is tensor parallelism within a node."""
        devices, split = self.num_nodes * self.num_processes, self._tensor_parallel_size
        if not isinstance(split, int) or split < 1 or devices % split:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size {split} does not divide {devices} devices; set it to a divisor"
            )
        self._data_parallel_size = devices // split
        super().setup_environment()


@contextmanager
def _partial_loading() -> Iterator[None]:
    """Within the context, Lightning loads what a folder of shards holds; the frozen base of an adapter is not in it.

    It asks PyTorch for every weight of the module, whatever `strict_loading` says.
    """
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import load

    lightning: Any = import_module("lightning.fabric.strategies.model_parallel")

    def load_partially(state: dict[str, Any], path: Path) -> None:
        load(state, checkpoint_id=path, planner=DefaultLoadPlanner(allow_partial_load=True))

    original = lightning._distributed_checkpoint_load
    lightning._distributed_checkpoint_load = load_partially
    try:
        yield
    finally:
        lightning._distributed_checkpoint_load = original


def data_parallel_group(strategy: Strategy) -> ProcessGroup | None:
    """Return the process group of data-parallel ranks; None for all ranks."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["data_parallel"].get_group()
    return None


def tensor_parallel_size(strategy: Strategy) -> int:
    """Return the number of ranks that each layer's tensors are split over."""
    return strategy.device_mesh["tensor_parallel"].size() if isinstance(strategy, ModelParallelStrategy) else 1


def broadcast_in_tensor_group(values: Tensor, strategy: Strategy) -> Tensor:
    """Broadcast values from the first rank of each tensor-parallel group, so that its ranks stay identical.

    A function or a server may return something else on every call.

    Args:
        values: Any shape.
        strategy: Of the Trainer.

    Returns:
        The same shape, on the strategy's device if there is a tensor-parallel group.
    """
    if isinstance(strategy, ModelParallelStrategy) and tensor_parallel_size(strategy) > 1:
        values = values.to(strategy.root_device)
        torch.distributed.broadcast(values, group=strategy.device_mesh["tensor_parallel"].get_group(), group_src=0)
    return values


def requires_single_backward(strategy: Strategy) -> bool:
    """Whether all gradients of a step must come from the backward pass of the loss that `training_step` returns.

    DDP with `find_unused_parameters` searches that loss's graph, and with `static_graph` compares it to the first.
    """
    wrapper = strategy.model
    return bool(getattr(wrapper, "find_unused_parameters", False) or getattr(wrapper, "static_graph", False))


def meta_init_except_rank_zero(strategy: Strategy) -> AbstractContextManager[Any]:
    """Within the context, load models for `shard_model` on the meta device, except on rank zero.

    Otherwise every rank of a node would hold a full model in memory at the same time.
    """
    sharded = isinstance(strategy, ModelParallelStrategy)
    return torch.device("meta") if sharded and not strategy.is_global_zero else nullcontext()


def shard_model(model: nn.Module, strategy: Strategy) -> None:
    """Shard `model` over the data-parallel mesh, one FSDP2 unit per transformer block; no-op under other strategies.

    The weights come from rank zero (`meta_init_except_rank_zero`).

    Under bf16-mixed the float32 weights are all-gathered in bfloat16, as autocast would convert them: half the traffic
    and memory. Gradients are reduced in float32.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = strategy.device_mesh["data_parallel"]
    bf16_mixed = strategy.precision_plugin.precision == "bf16-mixed"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16_mixed else MixedPrecisionPolicy()
    state_dict = model.state_dict() if strategy.is_global_zero else {}
    if tensor_parallel_size(strategy) > 1:
        parallelize_tensors(model, strategy.device_mesh["tensor_parallel"])
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if strategy.world_size > 1:
        _broadcast_weights(model, state_dict, strategy)


def parallelize_tensors(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the linear layers of every block over the mesh, by transformers' tensor-parallel plan of the architecture.

    Embedding, norms and heads are replicated.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    plan = {name: styles[style]() for name, style in tensor_parallel_plan(inner.config, mesh.size()).items()}
    parallelize_module(inner.base_model, mesh, plan, src_data_rank=None)  # no broadcast: some are on meta


def tensor_parallel_plan(config: PretrainedConfig, num_ranks: int) -> dict[str, str]:
    """Return the parallel style of each layer name pattern, "colwise" or "rowwise".

    Raises:
        UserError: Transformers has no plan for the model, or a size is not divisible by the number of ranks.
    """
    text, setting = config.get_text_config(), "trainer.strategy.tensor_parallel_size"
    plan = text.base_model_tp_plan or {}
    if not plan or set(plan.values()) - {"colwise", "rowwise"}:
        raise UserError(f"{setting}: there is no plan for splitting layers of {text.model_type}; set it to 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(text, name, None) or num_ranks
        if size % num_ranks:
            raise UserError(f"{setting}: {num_ranks} does not divide {name} {size} of the model; set it to a divisor")
    return plan


def _broadcast_weights(model: nn.Module, state_dict: dict[str, Any], strategy: ModelParallelStrategy) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if not strategy.is_global_zero:
        model.to_empty(device=strategy.root_device)  # in place, so that tied weights stay tied
    set_model_state_dict(model, state_dict, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():  # also non-persistent ones, such as the frequencies of a rotary embedding
        torch.distributed.broadcast(buffer, src=0)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: the longest `ModuleList` whose members have one class."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    return max(lists, key=len, default=[])


def fsdp_units(model: nn.Module) -> list[Any]:
    """Return the FSDP2 units of a model, the model itself included; none without sharding."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether some of the weights are on other ranks."""
    return bool(fsdp_units(model))


def trainable_names(module: nn.Module) -> set[str]:
    """Return the names of the trainable weights: with an adapter, the only ones in a checkpoint."""
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def sharded_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return all trainable parameters by name: those that the optimizer steps, each rank's shards with FSDP2.

    A forward pass without a backward pass (validation, a rollout) leaves FSDP2's outermost unit unsharded. Until it is
    sharded again, `parameters()` returns temporary tensors in place of its parameters, which have no gradient, and a
    change of the shards has no effect on the next forward pass. So call this before gradients are read or weights are
    written, but not between a forward pass and its backward pass.
    """
    for unit in fsdp_units(module):
        unit.reshard()
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gather the full state dict of a sharded model on the CPU of rank zero; empty on other ranks.

    Every rank must call it, and not within `unsharded_parameters`, where `state_dict` reshards.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


@contextmanager
def unsharded_parameters(model: nn.Module) -> Iterator[None]:
    """Within the context, every rank holds the full weights, so that generation needs no collective per token.

    Ranks can then stop at different lengths, where with sharded weights they would hang.
    """
    units = fsdp_units(model)
    for unit in units:
        # `unshard` of the root leaves nested units sharded
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Compute the 2-norm over all gradients, 0-d on their device; over all ranks if they are sharded."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(group) for group in by_mesh.values()]
    full = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return full[0] if len(full) == 1 else torch.stack(full).norm()
