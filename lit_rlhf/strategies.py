"""What Lightning lacks for FSDP2: data-parallel sizes by default, sharding by block, gathering for a rollout."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices of all nodes; `recipes/strategy/fsdp.yaml` names it.

    Args:
        save_distributed_checkpoint: write a folder of shards, each rank its own, instead of one file that rank zero
            holds whole. `lit-rlhf export` reads both; a folder resumes under this strategy alone, on any number of
            ranks.
        tensor_parallel_size: how many ranks share out each layer's tensors. They compute the same rows, and count as
            one rank where rows are dealt.
        weights_only: read checkpoints as plain values alone. False is for files of trusted origin that hold Python
            objects, as a callback or an optimizer of one's own may put there.
        settings: passed on to `ModelParallelStrategy`.
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
        """Load as `weights_only` of this strategy says: Lightning 2.6.6 loses what `fit` was given on its way here."""
        return super().load_checkpoint(checkpoint_path, self.weights_only if weights_only is None else weights_only)

    def setup_environment(self) -> None:
        """Shard over everything: Lightning's default would split tensors over the devices of a node instead."""
        devices, split = self.num_nodes * self.num_processes, self._tensor_parallel_size
        if not isinstance(split, int) or split < 1 or devices % split:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size {split} does not divide {devices} devices; set it to a divisor"
            )
        self._data_parallel_size = devices // split
        super().setup_environment()


def data_group(strategy: Strategy) -> ProcessGroup | None:
    """Return the ranks that have rows of their own; None for all."""
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["data_parallel"].get_group()
    return None


def tensor_ranks(strategy: Strategy) -> int:
    """Return how many ranks split tensors among them, 1 where none do."""
    return strategy.device_mesh["tensor_parallel"].size() if isinstance(strategy, ModelParallelStrategy) else 1


def broadcast_in_tensor_group(figures: Tensor, strategy: Strategy) -> Tensor:
    """Return the figures of the first of the ranks that split tensors among them, on each of these.

    What a function or a server answers may differ from call to call, and ranks that go on with different numbers
    would drift apart.
    """
    if isinstance(strategy, ModelParallelStrategy) and tensor_ranks(strategy) > 1:
        figures = figures.to(strategy.root_device)
        torch.distributed.broadcast(figures, group=strategy.device_mesh["tensor_parallel"].get_group(), group_src=0)
    return figures


def requires_single_backward(strategy: Strategy) -> bool:
    """Whether all gradients of a step must come of the pass that the loss of `training_step` starts.

    DDP looks for weights without a gradient in that loss's graph, if it is told to, and holds a graph that it is told
    to be static against the first.
    """
    wrapper = strategy.model
    return bool(getattr(wrapper, "find_unused_parameters", False) or getattr(wrapper, "static_graph", False))


def meta_init_except_rank_zero(strategy: Strategy) -> AbstractContextManager[Any]:
    """Within the block, models that `shard_model` will shard are loaded with numbers on rank zero alone.

    On the other ranks they are on the meta device. Else every rank of a node would hold whole models at the same time.
    """
    sharded = isinstance(strategy, ModelParallelStrategy)
    return torch.device("meta") if sharded and not strategy.is_global_zero else nullcontext()


def shard_model(model: nn.Module, strategy: Strategy) -> None:
    """Shard `model` over the data-parallel mesh, one unit a transformer block; nothing under another strategy.

    Rank zero gives every other rank its shares (`meta_init_except_rank_zero`).

    Under bf16-mixed the float32 weights are gathered in bfloat16, as autocast would take them: half to send and half
    to hold, in a rollout above all. Gradients are reduced in float32.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = strategy.device_mesh["data_parallel"]
    half = strategy.precision_plugin.precision == "bf16-mixed"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    whole = model.state_dict() if strategy.is_global_zero else {}
    if tensor_ranks(strategy) > 1:
        split_tensors(model, strategy.device_mesh["tensor_parallel"])
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if strategy.world_size > 1:
        _share_out(model, whole, strategy)


def split_tensors(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the linear layers of every block over the mesh, by the plan that transformers has for this architecture.

    Embedding, norms and heads stay whole on every rank, which all compute the same with them.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    plan = {name: styles[style]() for name, style in tensor_plan(inner.config, mesh.size()).items()}
    parallelize_module(inner.base_model, mesh, plan, src_data_rank=None)  # each its own part: some hold no numbers yet


def tensor_plan(config: PretrainedConfig, ranks: int) -> dict[str, str]:
    """Return how each layer is split, "colwise" or "rowwise".

    Raises:
        UserError: transformers has no such plan for the model, or sizes that do not divide.
    """
    text, setting = config.get_text_config(), "trainer.strategy.tensor_parallel_size"
    plan = text.base_model_tp_plan or {}
    if not plan or set(plan.values()) - {"colwise", "rowwise"}:
        raise UserError(f"{setting}: there is no plan for splitting layers of {text.model_type}; set it to 1")
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(text, name, None) or ranks
        if size % ranks:
            raise UserError(f"{setting}: {ranks} does not divide {name} {size} of the model; set it to a divisor")
    return plan


def _share_out(model: nn.Module, whole: dict[str, Any], strategy: ModelParallelStrategy) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    if not strategy.is_global_zero:
        model.to_empty(device=strategy.root_device)  # shards, in place: weights that are tied stay so
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in model.buffers():  # those that are in no state dict too, such as frequencies of a rotary embedding
        torch.distributed.broadcast(buffer, src=0)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks: the longest `ModuleList` whose members are of one class."""
    lists = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    ]
    return max(lists, key=len, default=[])


def is_sharded(model: nn.Module) -> bool:
    """Return whether some of the weights lie on other ranks."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def full_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a sharded model, whole and on the CPU of rank zero, empty on the others.

    Every rank must call it. (Within `gathered` a state dict would be sharded again as it is made.)
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


@contextmanager
def unsharded_parameters(model: nn.Module) -> Iterator[None]:
    """Hold the whole weights on every rank within the block, so that generation needs no collective a token.

    Ranks may then stop at different lengths: with sharded weights that would hang.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        # `root.unshard()` alone leaves the nested blocks sharded
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all of them together, () on their device; over all ranks where they are sharded."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [torch.nn.utils.get_total_norm(each) for each in by_mesh.values()]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.stack(whole).norm()
