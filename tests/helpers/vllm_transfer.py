"""A stand-in for the trainer side of vLLM's transfer of weights: a file takes the place of NCCL and of a GPU's memory.

It makes the calls of the package's own classes in their order, which `tests/contract/test_vllm_transfer.py` checks
against the package: the settings' fields, the client's four methods, metadata before iteration, all ranks in step.
"""

import importlib.machinery
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from lit_rlhf.generation.vllm_transfer import PACKAGE


@dataclass(kw_only=True)
class NCCLSettings:
    """`NCCLTrainerInitInfo`."""

    rank: int
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int
    packed_num_buffers: int = 2
    backend: ClassVar[str] = "nccl"


@dataclass(kw_only=True)
class IPCSettings:
    """`IPCTrainerInitInfo`."""

    rank: int
    packed: bool
    packed_buffer_size_bytes: int
    backend: ClassVar[str] = "ipc"


class TrainerSide:
    """Rank zero sends; the others iterate over the weights."""

    created: ClassVar[list["TrainerSide"]] = []
    failure: ClassVar[Exception | None] = None  # raised while weights are sent
    folder: ClassVar[Path]

    def __init__(self, settings: Any, client: Any, source: Any) -> None:
        self.settings, self.client, self.source, self.sends = settings, client, source, 0
        self.created.append(self)
        if settings.rank == 0:
            info = {"packed": settings.packed}
            if settings.backend == "nccl":
                info |= {"master_address": settings.master_address, "master_port": settings.master_port}
                info |= {"rank_offset": 1, "world_size": settings.world_size}
            client.init_weight_transfer_engine(info)

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any) -> "TrainerSide":
        return cls(init_info, client, source)

    def send_weights(self) -> None:
        self.sends += 1
        expected = self.source.metadata()
        if self.settings.rank != 0:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        weights: dict[str, torch.Tensor] = {}
        for (name, weight), told in zip(self.source, expected, strict=True):
            assert (name, weight.dtype, tuple(weight.shape)) == (told.name, told.dtype, told.shape)
            weights[name] = weight.contiguous().clone()
            if self.failure is not None:
                raise self.failure
        file = self.folder / f"sent-{len(self.created)}-{self.sends}.safetensors"
        save_file(weights, file)
        shapes = [list(each.shape) for each in expected]
        info: dict[str, Any] = {"names": [each.name for each in expected], "shapes": shapes, "file": str(file)}
        if self.settings.backend == "ipc":
            info["ipc_handles"] = {"GPU-0": (1, b"2")}
        self.client.update_weights(info)
        self.client.finish_weight_update()


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> type[TrainerSide]:
    """Put the stand-in in the place of the package; files go to a folder."""
    package: Any = ModuleType(PACKAGE)
    package.WeightTransferTrainerFactory = TrainerSide
    nccl: Any = ModuleType(f"{PACKAGE}.nccl_engine")
    nccl.NCCLTrainerInitInfo = NCCLSettings
    ipc: Any = ModuleType(f"{PACKAGE}.ipc_engine")
    ipc.IPCTrainerInitInfo = IPCSettings
    root = ModuleType("vllm")
    root.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    for module in (root, ModuleType("vllm.distributed"), package, nccl, ipc):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(TrainerSide, "created", [])
    monkeypatch.setattr(TrainerSide, "folder", folder, raising=False)
    return TrainerSide
