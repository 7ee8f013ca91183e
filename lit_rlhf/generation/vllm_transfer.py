"""The policy's weights to a vLLM server from GPU to GPU, by vLLM's own transfer (`vllm.distributed.weight_transfer`).

The trainer's side of that transfer is the package's: vLLM must be installed beside lit-rlhf, in the version of the
server. Here is what it sends, one weight at a time, and what it asks of the server over HTTP.
"""

import base64
import math
import pickle
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.distributed import broadcast_object, is_distributed, is_rank_zero
from lit_rlhf.errors import RankError, UserError
from lit_rlhf.generation.vllm_responses import Payload
from lit_rlhf.generation.vllm_server import ServerSettings, VLLMServer
from lit_rlhf.http import JSONClient
from lit_rlhf.models.lora import MergedWeight, iter_merged_weights

PACKAGE = "vllm.distributed.weight_transfer"
BUFFER_BYTES = 2**29  # sent at a time; on the trainer and on the server, beside the weights


class WeightDescription(NamedTuple):
    """A weight as vLLM's `ParamMeta` describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightStream:
    """The policy's weights, adapters merged, in the precision of the server: vLLM's `WeightSource`.

    A weight that is sharded over ranks is gathered when it is due, and dropped when it was sent, so no rank holds a
    second copy of the model. All ranks must iterate over it together.

    Args:
        model: the policy.
        dtype: of the server.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.restart()

    def restart(self) -> None:
        """Begin anew: the weights have changed."""
        self.iterator = self._iterate()
        self.has_failed = False  # while a weight was gathered; how far it came is not known
        self.problem: UserError | None = None  # set by another thread: raised in place of the next weight

    def metadata(self) -> list[WeightDescription]:
        """Return name, dtype and full shape of each weight; nothing is gathered."""
        found = ((each.name, each.plain()) for each in self._weights())
        return [WeightDescription(name, self._sent_dtype(plain), tuple(plain.shape)) for name, plain in found]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor of each weight, once after `restart`."""
        for each in self.iterator:  # not `yield from`, with which nothing would be left to `finish`
            yield each
            if self.problem is not None:
                raise self.problem

    def finish(self) -> None:
        """Gather what is left: other ranks wait for it in their gathers."""
        for _ in self.iterator:
            pass

    def _iterate(self) -> Iterator[tuple[str, Tensor]]:
        try:
            for each in self._weights():
                with torch.no_grad(), torch.autocast(self.model.device.type, enabled=False):
                    weight = each.compute()
                    weight = weight.to(self._sent_dtype(weight))
                yield each.name, weight
        except Exception:
            self.has_failed = True
            raise

    def _weights(self) -> Iterator[MergedWeight]:
        """Yield each weight once: an output layer that is tied to the embedding is so on the server."""
        seen: set[int] = set()
        for each in iter_merged_weights(self.model):
            if id(each.value) not in seen:
                seen.add(id(each.value))
                yield each

    def _sent_dtype(self, weight: Tensor) -> torch.dtype:
        return self.dtype if weight.is_floating_point() else weight.dtype


class WeightSyncClient:
    """What vLLM's trainer side asks of the server: its `VLLMWeightSyncClient`, with our errors.

    Args:
        server: the server.
        on_failure: called with the first error, from the thread of the request; may raise it. After it nothing more is
            asked.
    """

    def __init__(self, server: VLLMServer, on_failure: Callable[[UserError], None]) -> None:
        self.server, self.on_failure = server, on_failure
        self.update = server.transfer_client("update_weights")
        self.error: UserError | None = None  # the first

    def init_weight_transfer_engine(self, init_info: Payload) -> None:
        """Have it connect."""
        self._control("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Have it prepare for weights."""
        self._control("start_weight_update")

    def update_weights(self, update_info: Payload) -> None:
        """Have it receive weights; it answers when it has them."""
        handles = update_info.get("ipc_handles")
        if handles is not None:  # which JSON cannot hold; the server must be told to read pickles
            update_info = {name: value for name, value in update_info.items() if name != "ipc_handles"}
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self._control("update_weights", {"update_info": update_info}, self.update)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have it compute with them."""
        self._control("finish_weight_update")

    def break_off(self, error: UserError) -> None:
        """End a request to receive weights that were not sent, for this reason; else the process would not end."""
        self.error = self.error or error
        self.update.break_off("the weights were not sent")

    def _control(self, step: str, payload: Payload | None = None, client: JSONClient | None = None) -> None:
        if self.error is not None:
            return
        try:
            self.server.control_transfer(step, payload, client)
        except UserError as error:
            if self.error is None:  # else it was broken off
                self.error = error
                self.on_failure(error)


class NativeTransfer(ABC):
    """Hands weights over from GPU to GPU by vLLM's own transfer; all ranks of the trainer take part."""

    backend: ClassVar[str]  # of the server's --weight-transfer-config
    init_class: ClassVar[tuple[str, str]]  # module and name of the package's settings

    def __init__(self) -> None:
        self.engine: Any = None  # the package's trainer side, once it is connected
        self.stream: WeightStream | None = None
        self.client: WeightSyncClient | None = None

    def check(self) -> None:
        """Refuse a trainer that cannot send."""
        if find_spec("vllm") is None:
            raise UserError(
                f"model.generator: {type(self).__name__} needs vLLM beside lit-rlhf, in the version of the server "
                "(pip install vllm); -c generator/vllm needs none"
            )
        if not torch.cuda.is_available():
            raise UserError(
                f"model.generator: {type(self).__name__} sends from a GPU, and there is none here; use "
                "-c generator/vllm"
            )

    def check_server(self, server: VLLMServer, settings: ServerSettings) -> None:
        """Refuse a server that cannot receive."""
        if settings.transfer_backend != self.backend:
            found = settings.transfer_backend
            option = f'--weight-transfer-config \'{{"backend": "{self.backend}"}}\''
            raise server.error(
                f"it takes weights {'from a folder only' if found is None else f'by {found}'}; start it with {option}"
            )

    @abstractmethod
    def settings(self, server: VLLMServer, buffer_bytes: int) -> dict[str, Any]:
        """Return the package's settings of this trainer, without its rank; the server is asked by rank zero alone."""

    def forget(self) -> None:
        """Drop the connection: the server was started again."""
        self.engine = None

    def push(self, server: VLLMServer, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Send the weights, connecting first if need be; every rank must call it.

        Args:
            server: the server.
            model: the policy.
            dtype: of the server.

        Raises:
            UserError: it failed on rank zero; see `join_other_ranks`.
        """
        stream = self.stream = self.stream or WeightStream(model, dtype)
        stream.model, stream.dtype = model, dtype
        stream.restart()
        if self.engine is None:
            self.client = WeightSyncClient(server, self.handle_failure)
        assert self.client is not None
        try:
            if self.engine is None:
                self.engine = self.connect(server, stream, self.client)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)  # the weights are read on streams of the package's own
            self.engine.send_weights()
        except (UserError, RuntimeError, ValueError, OSError) as error:
            self.engine = None
            if not is_rank_zero():
                raise
            text = f"the policy's weights were not sent by {self.backend}: {' '.join(str(error).split())}"
            problem = error if isinstance(error, UserError) else server.error(f"{text}; restart it, resume the run")
            self.client.break_off(problem)
            self.join_other_ranks(self.client.error or problem)
        message = broadcast_object(None if self.client.error is None else str(self.client.error))
        if message is not None:
            self.engine = None
            raise UserError(message)

    def connect(self, server: VLLMServer, stream: WeightStream, client: WeightSyncClient) -> Any:
        """Return the package's trainer side; on rank zero it is connected to the server's workers."""
        rank = dist.get_rank() if is_distributed() else 0
        sizes = [math.prod(weight.shape) * weight.dtype.itemsize for weight in stream.metadata()]
        module, name = self.init_class
        settings = self.settings(server, max(BUFFER_BYTES, *sizes))
        init_info = getattr(import_module(f"{PACKAGE}.{module}"), name)(**settings, rank=rank)
        factory: Any = import_module(PACKAGE)
        return factory.WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=stream)

    @abstractmethod
    def handle_failure(self, error: UserError) -> None:
        """A request to the server has failed, in any thread of rank zero; see `WeightSyncClient`."""

    @abstractmethod
    def join_other_ranks(self, error: UserError) -> None:
        """Rank zero has failed: go where the other ranks wait, or raise the error, which ends them."""


class NCCLTransfer(NativeTransfer):
    """Weights from rank zero's GPU to the server's GPUs by NCCL, on one machine or over a network.

    A server needs `--weight-transfer-config '{"backend": "nccl"}'`.

    Args:
        address: of this machine, by which the server reaches it; by default that by which the server is reached.
        port: where the server's workers connect to once; 0 for any.
    """

    backend = "nccl"
    init_class = ("nccl_engine", "NCCLTrainerInitInfo")

    def __init__(self, address: str | None = None, port: int = 0) -> None:
        super().__init__()
        self.address, self.port = address, port

    def settings(self, server: VLLMServer, buffer_bytes: int) -> dict[str, Any]:
        """See `NativeTransfer.settings`; only rank zero connects."""
        return {
            "master_address": self.address or own_address(server.url),
            "master_port": self.port or free_port(),
            "world_size": 1 + (server.world_size() if is_rank_zero() else 0),
            "packed_buffer_size_bytes": buffer_bytes,
        }

    def handle_failure(self, error: UserError) -> None:
        """End the broadcasts that nobody receives, which would wait for ever in CUDA, and raise the error."""
        assert self.stream is not None
        self.stream.problem = error  # first: nothing may be broadcast while the group is destroyed
        engine = self.engine  # None while it connects, and once `push` has dropped it in its own thread
        if engine is not None:
            engine.model_update_group.destroy()
        raise error

    def join_other_ranks(self, error: UserError) -> None:
        """Gather the weights that the other ranks are gathering; if that is what has failed, raise the error."""
        assert self.stream is not None
        if self.stream.has_failed:
            raise RankError(str(error)) from error
        self.stream.finish()


class IPCTransfer(NativeTransfer):
    """Weights to a server on the same GPU, which reads them from the trainer's memory.

    A server needs `--weight-transfer-config '{"backend": "ipc"}'`, and `VLLM_ALLOW_INSECURE_SERIALIZATION=1`: what
    tells it the memory is a pickle, so whoever reaches its port can run programs there.
    """

    backend = "ipc"
    init_class = ("ipc_engine", "IPCTrainerInitInfo")

    def settings(self, server: VLLMServer, buffer_bytes: int) -> dict[str, Any]:
        """See `NativeTransfer.settings`; packed, for without it all weights would be copied at once."""
        return {"packed": True, "packed_buffer_size_bytes": buffer_bytes}

    def handle_failure(self, error: UserError) -> None:
        """Go on without the server: the other ranks wait for this one, within the package, at each buffer."""

    def join_other_ranks(self, error: UserError) -> None:
        """Raise the error: the other ranks wait within the package."""
        raise RankError(str(error)) from error


def own_address(url: str) -> str:
    """Return the address of this machine on the way to a server; nothing is sent."""
    parts = urlsplit(url)
    family, kind, protocol, _, target = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])
