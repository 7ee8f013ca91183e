"""What Lightning lacks for FSDP2: data-parallel sizes by default, sharding by block, gathering for a rollout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all devices of all nodes; `recipes/strategy/fsdp.yaml` names it.

    Args:
        save_distributed_checkpoint: write a folder of shards instead of one file. One file can be exported at once.
        settings: passed on to `ModelParallelStrategy`.
    """

    def __init__(self, save_distributed_checkpoint: bool = False, **settings: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **settings)

    def setup_environment(self) -> None:
        """Shard over everything: Lightning's default would split tensors over the devices of a node instead."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()


def shard_model(model: nn.Module, strategy: Strategy) -> None:
    """Shard `model` over the data-parallel mesh, one unit a transformer block; nothing under another strategy."""
    if not isinstance(strategy, ModelParallelStrategy):
        return
    from torch.distributed.fsdp import fully_shard

    mesh = strategy.device_mesh["data_parallel"]
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


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


def whole_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state dict of a sharded model, whole and on the CPU of rank zero, empty on the others.

    Every rank must call it. (Within `gathered` a state dict would be sharded again as it is made.)
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, torch.Tensor], get_model_state_dict(model, options=options))


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
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
