"""A stand-in for the trainer side of vLLM's transfer of weights: a file takes the place of NCCL and of a GPU's memory.

It makes the calls of the package's own classes in their order, which `tests/contract/test_vllm_transfer.py` checks
against the package: the settings' fields, the client's four methods, metadata before iteration, all ranks in step.
"""

import importlib.machinery
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed import DistStoreError

from lit_rlhf.distributed import all_gather_object
from lit_rlhf.generation.vllm_transfer import PACKAGE

PATIENCE = 10.0  # seconds, in place of for ever


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


class Group:
    """The communicator: what is broadcast arrives when the server has read and removed the file."""

    def __init__(self) -> None:
        self.is_destroyed, self.late = False, 0

    def broadcast(self) -> None:
        """Count those that come too late: memory of the communicator is then freed, or is about to be."""
        self.late += self.is_destroyed

    def wait(self, file: Path) -> None:
        """Wait until the broadcasts have ended, as a stream of CUDA is waited for."""
        last = time.monotonic() + PATIENCE
        while file.exists() and not self.is_destroyed:
            if time.monotonic() > last:
                raise RuntimeError("nobody receives the weights: a GPU would wait for ever")
            time.sleep(0.01)

    def destroy(self) -> None:
        """End the broadcasts; no error is raised where they are waited for."""
        self.is_destroyed = True


class TrainerSide:
    """Rank zero sends; the others iterate over the weights."""

    created: ClassVar[list["TrainerSide"]] = []
    failure: ClassVar[Exception | None] = None  # raised while weights are sent
    folder: ClassVar[Path]

    def __init__(self, settings: Any, client: Any, source: Any) -> None:
        self.settings, self.client, self.source, self.sends = settings, client, source, 0
        self.model_update_group: Group | None = None
        self.created.append(self)
        if settings.rank == 0:
            info = {"packed": settings.packed}
            if settings.backend == "nccl":
                info |= {"master_address": settings.master_address, "master_port": settings.master_port}
                info |= {"rank_offset": 1, "world_size": settings.world_size}
                self.connect(info)
            else:
                client.init_weight_transfer_engine(info)

    def connect(self, info: dict[str, Any]) -> None:
        """Open the endpoint while the server connects to it in another thread."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self.client.init_weight_transfer_engine, info)
            if wait([future]) and future.exception() is not None:
                raise DistStoreError("Timed out after 301 seconds waiting for clients. 1/2 clients joined.")
            self.model_update_group = Group()

    @classmethod
    def trainer_init(cls, init_info: Any, *, client: Any, source: Any) -> "TrainerSide":
        return cls(init_info, client, source)

    def send_weights(self) -> None:
        self.sends += 1
        send = self.send_by_nccl if self.settings.backend == "nccl" else self.send_by_ipc
        send(self.folder / f"sent-{len(self.created)}-{self.sends}.safetensors")

    def send_by_nccl(self, file: Path) -> None:
        """The server is asked in another thread, and answers when all is broadcast."""
        if self.settings.rank != 0:
            self.collect()
            return
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self.client.update_weights, self.describe(file))
        try:
            weights = self.collect()
            assert self.model_update_group is not None
            if not self.model_update_group.is_destroyed:
                publish(weights, file)
                self.model_update_group.wait(file)
            future.result()
        finally:
            pool.shutdown(wait=False)
        self.client.finish_weight_update()

    def send_by_ipc(self, file: Path) -> None:
        """All ranks tell each other where their memory is, and wait for the server."""
        is_sender = self.settings.rank == 0
        if is_sender:
            self.client.start_weight_update()
        weights = self.collect()
        all_gather_object("handle")
        barrier()
        if is_sender:
            publish(weights, file)
            self.client.update_weights(self.describe(file) | {"ipc_handles": {"GPU-0": (1, b"2")}})
        barrier()
        if is_sender:
            self.client.finish_weight_update()
        barrier()

    def describe(self, file: Path) -> dict[str, Any]:
        """Return what the server is told of the weights."""
        expected = self.source.metadata()
        shapes = [list(each.shape) for each in expected]
        return {"names": [each.name for each in expected], "shapes": shapes, "file": str(file)}

    def collect(self) -> dict[str, torch.Tensor]:
        """Return the weights; all ranks iterate over them together."""
        weights: dict[str, torch.Tensor] = {}
        for (name, weight), told in zip(self.source, self.source.metadata(), strict=True):
            assert (name, weight.dtype, tuple(weight.shape)) == (told.name, told.dtype, told.shape)
            weights[name] = weight.contiguous().clone()
            if self.model_update_group is not None:
                self.model_update_group.broadcast()
            if self.failure is not None and self.settings.rank == 0:
                raise self.failure
        return weights


def publish(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write a file that is there as a whole or not at all."""
    save_file(weights, file.with_suffix(".part"))
    file.with_suffix(".part").rename(file)


def barrier() -> None:
    """Wait for all ranks."""
    all_gather_object(None)


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
