"""Weights from GPU to GPU, against stand-ins for the server and for vLLM's trainer side; and a server that sleeps."""

import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_rlhf.errors import UserError
from lit_rlhf.generation import CachedGenerator, IPCTransfer, NCCLTransfer, VLLMGenerator, VLLMLoRAGenerator
from lit_rlhf.generation.vllm_transfer import NativeTransfer, WeightStream, own_address
from lit_rlhf.models.fingerprint import live_model_fingerprint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import MergedWeight, add_lora, merged_state_dict
from tests.generation.test_vllm import GREEDY, assert_same, completions, generate, perturb_weights, refusal_of
from tests.helpers.ranks import on_ranks
from tests.helpers.services import Reply, Service
from tests.helpers.vllm_server import error_body, serve_vllm
from tests.helpers.vllm_transfer import PATIENCE, TrainerSide, install

NATIVE = {"nccl": NCCLTransfer, "ipc": IPCTransfer}


@pytest.fixture
def trained(llama: str, tokenizer: Any) -> Any:
    return load_causal_lm(llama, tokenizer, ModelLoadingConfig()).eval()


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[TrainerSide]:
    return install(monkeypatch, tmp_path)


def make(service: Service, transfer: NativeTransfer | None, folder: Path | None = None, **settings: Any) -> Any:
    shared = None if folder is None else str(folder)
    settings = {"retries": 1, "pause": 0.01, "timeout": 5.0, **settings}
    return VLLMGenerator(shared, service.url, transfer=transfer, **settings)


def draw_adapter(policy: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.3, generator=generator)


@pytest.mark.parametrize("backend", NATIVE)
def test_weights_are_sent_after_each_change_over_one_connection(backend, llama, trained, side):
    with serve_vllm(llama, backend=backend) as (service, server):
        vllm = make(service, NATIVE[backend]())
        for pushes in (1, 2):
            ours = generate(CachedGenerator(), trained, GREEDY)
            assert_same(generate(vllm, trained, GREEDY), ours)
            assert_same(generate(vllm, trained, GREEDY), ours)
            assert len(server.weights_paths) == side.created[0].sends == pushes and len(side.created) == 1
            perturb_weights(trained)
        server.restart()
        assert_same(generate(vllm, trained, GREEDY), generate(CachedGenerator(), trained, GREEDY))
        assert len(side.created) == 2, "a server that was started again is connected again"
    settings = side.created[0].settings
    assert settings.packed and settings.packed_buffer_size_bytes == 2**29
    if backend == "nccl":
        assert settings.master_address == "127.0.0.1" and settings.master_port > 0 and settings.world_size == 2
    else:
        pickled = [
            r.payload["update_info"]["ipc_handles_pickled"]
            for r in service.requests
            if "update_info" in (r.payload or {})
        ]
        assert pickled and all(isinstance(each, str) for each in pickled)


def test_what_is_sent_is_the_merged_policy_in_the_precision_of_the_server(model_folders, tokenizer, trained):
    add_lora(trained, LoRA(rank=4, alpha=8))
    draw_adapter(trained)
    expected = merged_state_dict(trained)
    for dtype in (torch.float32, torch.bfloat16):
        stream = WeightStream(trained, dtype)
        sent = dict(stream)
        assert [(name, weight.dtype, weight.shape) for name, weight in sent.items()] == [
            (each.name, each.dtype, torch.Size(each.shape)) for each in stream.metadata()
        ]
        assert sent.keys() == expected.keys()
        for name, weight in sent.items():
            assert torch.equal(weight, expected[name].to(dtype)), name
        assert not dict(stream), "once after a start"
        stream.restart()
        assert dict(stream).keys() == sent.keys()
    tied = load_causal_lm(model_folders["gpt2"], tokenizer, ModelLoadingConfig())
    names = [each.name for each in WeightStream(tied, torch.float32).metadata()]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names and len(set(names)) == len(names)


def test_a_sharded_policy_is_gathered_weight_by_weight(llama, tokenizer, trained, tmp_path):
    """Every rank sees the whole of each weight, and never holds more than the one that is sent and the next."""
    add_lora(trained, LoRA(rank=4, alpha=8))
    draw_adapter(trained)
    expected, fingerprint = merged_state_dict(trained), live_model_fingerprint(trained)

    def rank() -> Any:
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        for layer in trained.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(trained, mesh=mesh)
        stream, alive, most = WeightStream(trained, torch.float32), [], 0
        described = stream.metadata()
        for (name, weight), told in zip(stream, described, strict=True):
            assert (name, weight.shape) == (told.name, torch.Size(told.shape))
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
            alive = [each for each in alive if each() is not None] + [weakref.ref(weight)]
            most = max(most, len(alive))
            del weight
        return live_model_fingerprint(trained), most

    for found, most in on_ranks(rank, tmp_path):
        assert found == fingerprint and most <= 2


def test_a_trainer_that_cannot_send_is_refused(monkeypatch, side):
    with pytest.raises(UserError, match="sends from a GPU, and there is none here; use -c generator/vllm"):
        NCCLTransfer().check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    NCCLTransfer().check()
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"IPCTransfer needs vLLM beside lit-rlhf, .* \(pip install vllm\)"):
        IPCTransfer().check()
    for settings in ({}, {"folder": "x", "transfer": NCCLTransfer()}):
        with pytest.raises(UserError, match="set one of folder and transfer"):
            VLLMGenerator(**settings)


def test_a_server_that_cannot_receive_is_refused(llama, trained, side, tmp_path):
    for backend, found in ((None, "from a folder only"), ("ipc", "by ipc")):
        with serve_vllm(llama, backend=backend) as (service, _):
            message = refusal_of(lambda: generate(make(service, NCCLTransfer()), trained, GREEDY))
        assert f'it takes weights {found}; start it with --weight-transfer-config \'{{"backend": "nccl"}}\'' in message
    add_lora(trained, LoRA(rank=4, alpha=8))
    with serve_vllm(llama) as (service, _):
        vllm = VLLMLoRAGenerator(None, service.url, transfer=NCCLTransfer(), timeout=5.0)
        assert "takes neither transfer nor sleep" in refusal_of(lambda: generate(vllm, trained, GREEDY))
    assert not side.created


def test_a_transfer_that_fails_ends_the_run_and_the_next_one_connects_again(llama, trained, side, monkeypatch):
    with serve_vllm(llama, backend="nccl") as (service, server):
        vllm = make(service, NCCLTransfer())
        with monkeypatch.context() as patch:
            patch.setattr(side, "failure", RuntimeError("NCCL error:\nunhandled system error"))
            message = refusal_of(lambda: generate(vllm, trained, GREEDY))
            assert "were not sent by nccl: NCCL error: unhandled system error; restart it, resume the run" in message
        message = refusal_of(lambda: generate(vllm, trained, GREEDY))  # an update is under way there for ever
        assert "it did not take the policy's weights (start_weight_update): status 500: a weight update is" in message
        assert server.version == "incomplete" and not completions(service)
        server.restart()
        assert_same(generate(vllm, trained, GREEDY), generate(CachedGenerator(), trained, GREEDY))
        assert len(side.created) == 3


REFUSED = "CUDA out of memory on the server"


def refuse(_: Any) -> Reply:
    """Fail when the trainer's side is already waiting for the server."""
    return Reply(error_body(REFUSED, 500), status=500, delay=0.5)


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("step", ["init_weight_transfer_engine", "start_weight_update", "update_weights"])
def test_a_step_that_the_server_refuses_ends_the_run_with_its_words(step, backend, llama, trained, side, monkeypatch):
    """By NCCL the trainer's side is in a broadcast at the time, or at the rendezvous."""
    with serve_vllm(llama, backend=backend) as (service, server):
        vllm, start = make(service, NATIVE[backend]()), time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(server, f"answer_{step}", refuse)
            message = refusal_of(lambda: generate(vllm, trained, GREEDY))
        assert f"it did not take the policy's weights ({step}): status 500: {REFUSED}" in message
        assert time.monotonic() - start < PATIENCE
        asked = [each.path.strip("/") for each in service.requests]
        assert step in asked and "finish_weight_update" not in asked, "after the failure nothing is asked"
        if backend == "nccl" and step == "update_weights":
            assert side.created[0].model_update_group.is_destroyed
        server.restart()
        assert_same(generate(vllm, trained, GREEDY), generate(CachedGenerator(), trained, GREEDY))
        assert len(side.created) == 2


def test_after_a_failure_in_another_thread_no_weight_is_yielded_and_the_rest_can_be_gathered(trained):
    stream = WeightStream(trained, torch.float32)
    names, sent = [each.name for each in stream.metadata()], iter(stream)
    assert next(sent)[0] == names[0]
    stream.problem = UserError("it failed")
    with pytest.raises(UserError, match="it failed"):
        next(sent)
    assert [name for name, _ in stream.iterator] == names[1:] and not stream.has_failed
    stream.restart()
    assert list(dict(stream)) == names


def test_nothing_is_broadcast_once_the_group_is_destroyed(llama, trained, side, monkeypatch):
    compute = MergedWeight.compute

    def compute_slowly(weight: MergedWeight) -> torch.Tensor:
        time.sleep(0.1)
        return compute(weight)

    with serve_vllm(llama, backend="nccl") as (service, server):
        monkeypatch.setattr(MergedWeight, "compute", compute_slowly)
        monkeypatch.setattr(server, "answer_update_weights", lambda _: Reply(error_body(REFUSED, 500), status=500))
        assert REFUSED in refusal_of(lambda: generate(make(service, NCCLTransfer()), trained, GREEDY))
    group = side.created[0].model_update_group
    assert group.is_destroyed and group.late <= 1, "that for which the weight was taken before"


def push_on_ranks(transfer: NativeTransfer, service: Service, policy: Any, folder: Path) -> list[str]:
    """Push a sharded policy from two ranks; return the error of each."""

    def rank() -> str:
        dist.init_process_group("gloo", timeout=timedelta(seconds=20))
        for layer in policy.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        try:
            transfer.push(make(service, transfer).server, policy, torch.float32)
        except (UserError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    return on_ranks(rank, folder)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_server_that_refuses_weights_ends_all_ranks_with_its_words(
    backend, llama, trained, side, tmp_path, monkeypatch
):
    """No rank is left in a gather of the policy's weights, or in a barrier of the package."""
    with serve_vllm(llama, backend=backend) as (service, server):
        monkeypatch.setattr(server, "answer_update_weights", refuse)
        messages = push_on_ranks(NATIVE[backend](), service, trained, tmp_path)
    assert len(set(messages)) == 1 and messages[0].startswith("UserError: ") and REFUSED in messages[0]


def test_a_gather_that_fails_on_rank_zero_ends_it_in_place_of_a_broadcast(llama, trained, side, tmp_path, monkeypatch):
    """The other rank is still in the gather, so it would take part in no broadcast."""
    compute = MergedWeight.compute

    def fail(weight: MergedWeight) -> torch.Tensor:
        if dist.get_rank() == 0 and weight.name == "model.layers.1.mlp.up_proj.weight":
            raise torch.OutOfMemoryError("CUDA out of memory here")
        return compute(weight)

    monkeypatch.setattr(MergedWeight, "compute", fail)
    with serve_vllm(llama, backend="nccl") as (service, _):
        first, second = push_on_ranks(NCCLTransfer(), service, trained, tmp_path)
    assert first.startswith("RankError") and "were not sent by nccl: CUDA out of memory here" in first
    assert second.startswith("RuntimeError"), "its gather ends with rank zero"


def test_own_address_is_that_on_the_way_to_the_server():
    assert own_address("http://127.0.0.1:8000/v1") == "127.0.0.1"


@pytest.mark.parametrize("way", ["folder", "ipc"])
def test_a_server_that_sleeps_during_the_update_gets_the_weights_before_each_rollout(
    way, llama, trained, side, tmp_path
):
    backend = None if way == "folder" else way
    with serve_vllm(llama, enable_sleep_mode=True, backend=backend) as (service, server):
        transfer, folder = (None, tmp_path / "shared") if backend is None else (IPCTransfer(), None)
        vllm = make(service, transfer, folder, sleep=True)
        for pushes in (1, 2, 3):
            assert_same(generate(vllm, trained, GREEDY), generate(CachedGenerator(), trained, GREEDY))
            assert server.asleep == {"weights", "kv_cache"} and len(server.weights_paths) == pushes
            if pushes == 1:
                perturb_weights(trained)
        paths = [request.path.split("?")[-1] for request in service.requests]
        order = [
            each for each in paths if each.startswith(("tags=", "level=")) or each.endswith("finish_weight_update")
        ]
        assert backend is None or len(side.created) == 1, "it is known, and stays connected"
        push = [] if backend is None else ["/finish_weight_update"]
        first, later = [*push, "tags=kv_cache", "level=2"], ["tags=weights", *push, "tags=kv_cache", "level=2"]
        assert order == first + later + later
        resumed = make(service, None if backend is None else IPCTransfer(), folder, sleep=True)
        assert_same(generate(resumed, trained, GREEDY), generate(CachedGenerator(), trained, GREEDY))
        message = refusal_of(lambda: generate(make(service, None, tmp_path / "other"), trained, GREEDY))
        assert "it is paused; resume it (POST /resume, or POST /wake_up if it sleeps)" in message
        server.restart()
        assert_same(generate(vllm, trained, GREEDY), generate(CachedGenerator(), trained, GREEDY))
    with serve_vllm(llama) as (service, _):
        message = refusal_of(lambda: generate(make(service, None, tmp_path, sleep=True), trained, GREEDY))
        assert "it cannot sleep; start it with --enable-sleep-mode" in message
