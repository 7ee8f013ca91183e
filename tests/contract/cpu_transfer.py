"""NCCL and CUDA for vLLM's transfer of weights on a CPU: the package's own classes run, and only these are replaced.

A broadcast goes through the store of the rendezvous, and memory of a GPU that is shared is a mapped file. A server
loads this module as a plugin of vLLM, a trainer calls `install`. It imports nothing of lit-rlhf.
"""

import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

MEMORY = "CPU_TRANSFER_MEMORY"  # environment variable: the file


class StoreCommunicator:
    """`PyNcclCommunicator`."""

    def __init__(self, group: Any, device: Any) -> None:
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.group.rank == src:
            self.group.broadcast_obj(tensor.view(torch.uint8).numpy().tobytes(), src)
        else:
            received = bytearray(self.group.broadcast_obj(None, src))
            tensor.view(torch.uint8).copy_(torch.frombuffer(received, dtype=torch.uint8))

    def destroy(self) -> None:
        pass


class Stream:
    """`torch.cuda.Stream`."""

    def synchronize(self) -> None:
        pass


class TorchWithSharedMemory:
    """The module torch, whose tensors on a GPU are the mapped file."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *size: Any, device: Any = None, **settings: Any) -> torch.Tensor:
        return map_memory(size[0]) if device == "cuda" else torch.empty(*size, device=device, **settings)


def map_memory(size: int) -> torch.Tensor:
    return torch.from_file(os.environ[MEMORY], shared=True, size=size, dtype=torch.uint8)


def install() -> None:
    """Replace them."""
    import torch.multiprocessing.reductions as reductions
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    def rebuild(size: int, *_: Any) -> torch.Tensor:
        return map_memory(size)

    def reduce(tensor: torch.Tensor) -> Any:
        return None, (len(tensor), *[None] * 6)

    pynccl.PyNcclCommunicator = StoreCommunicator
    packed_tensor._get_streams = lambda _, count: (Stream(),) * count
    packed_tensor.torch = TorchWithSharedMemory()
    packed_tensor.reduce_tensor = reduce
    reductions.rebuild_cuda_tensor = rebuild
    cuda: Any = torch.cuda
    cuda.stream, cuda.current_stream, cuda.ipc_collect = lambda _: nullcontext(), Stream, lambda: None
    cuda.get_device_properties = lambda _: SimpleNamespace(uuid="GPU-0")
    accelerator: Any = torch.accelerator
    accelerator.current_device_index, accelerator.synchronize = lambda: 0, lambda *_: None
