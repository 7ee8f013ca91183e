"""Captured decode steps, with a stand-in for CUDA graphs on the CPU: same responses, no wait for the device."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, GenerationOutput, cached, kv_cache
from lit_rlhf.generation.cuda_graph import CapturedStep, can_capture_steps
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23], [7, 9]] * 2


class RecordedGraph:
    """Repeats operators on the very tensors of the recorded call, without any Python of the step, as a CUDA graph."""

    made: list["RecordedGraph"] = []

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.num_replays = 0
        RecordedGraph.made.append(self)

    def replay(self) -> None:
        self.num_replays += 1
        if self.num_replays == 1:
            return  # was run while it was recorded; CUDA only records
        with _disable_current_modes():
            for function, args, kwargs, result in self.calls:
                repeated = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(repeated)):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, result))
        return result


@contextlib.contextmanager
def record(graph: RecordedGraph) -> Iterator[None]:
    with Recorder(graph):
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """All models capture their steps; the graphs."""
    RecordedGraph.made = []
    for module in (cached, kv_cache):
        monkeypatch.setattr(module, "can_capture_steps", lambda model: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    return RecordedGraph.made


def generate(model: Any, sampling: SamplingParams, num_samples: int = 1, batch_size: int = 256) -> GenerationOutput:
    uniforms = sampling_uniforms(len(PROMPTS) * num_samples, sampling.max_new_tokens, 3)
    prompts = PromptBatch.from_tokens(*pad_left(PROMPTS, 0))
    return CachedGenerator(batch_size).generate(model, prompts, sampling, uniforms)


def load(name: str, model_folders: Any, tokenizer: Any) -> Any:
    return load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()


SETTINGS = {
    "plain": (SamplingParams(70), 1, 256),
    "samples in batches": (SamplingParams(40, temperature=1.5), 3, 9),
    "a smallest length": (SamplingParams(50, min_new_tokens=21), 1, 256),
    "filtered": (SamplingParams(40, top_k=30, top_p=0.9), 1, 256),
    "greedy": (SamplingParams(20, temperature=0.0), 1, 256),
    "a stop token": (SamplingParams(40, stop_token_ids=[5, 9, 12, 30]), 2, 256),
    "one token": (SamplingParams(1), 1, 256),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_captured_steps_sample_the_same(setting, model_folders, tokenizer, monkeypatch, request):
    """Rows that finish between two looks, batches made smaller, wider columns, an end token that is not yet allowed."""
    sampling, num_samples, batch_size = SETTINGS[setting]
    model = load("gpt2", model_folders, tokenizer)
    expected = generate(model, sampling, num_samples, batch_size)
    monkeypatch.setattr(kv_cache, "_WIDTH_STEP", 16)
    graphs = request.getfixturevalue("graphs")
    output = generate(model, sampling, num_samples, batch_size)
    for value, reference in zip(output, expected):
        torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)
    assert sum(graph.num_replays for graph in graphs) > 5 or sampling.max_new_tokens == 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_captured_step_of_each_architecture_waits_for_nothing(name, model_folders, tokenizer, request):
    model = load(name, model_folders, tokenizer)
    sampling = SamplingParams(40, min_new_tokens=40)
    expected = generate(model, sampling)
    graphs = request.getfixturevalue("graphs")
    output = generate(model, sampling)
    assert torch.equal(output.response_ids, expected.response_ids)
    torch.testing.assert_close(output.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1, "rows and columns were the same throughout"
    assert graphs[0].num_replays == 40 - 3, "all but the prefill, the first step, and the last, which may end"
    assert not [call[0] for call in graphs[0].calls if waits_for_device(*call)]


def waits_for_device(function: Any, args: Any, kwargs: Any, result: Any) -> bool:
    """Whether the host must know a value, or copies between devices."""
    name = function.name()
    if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"):
        # a number that the host itself made a tensor of is at hand
        return not (name == "aten::_local_scalar_dense" and args[0].ndim == 0 and args[0].device.type == "cpu")
    if name.startswith(("aten::index.", "aten::index_put")):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return name == "aten::_to_copy" and kwargs.get("device") not in (None, torch.device("cpu"))


def count_dispatches(model: Any, length: int) -> Counter[str]:
    """Count what the host dispatches during a rollout; a replay counts as one."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[function.name()] += 1
            return function(*args, **(kwargs or {}))

    replays = sum(graph.num_replays for graph in RecordedGraph.made)
    with Count():
        generate(model, SamplingParams(length, stop_token_ids=[]))
    counts["replay"] = sum(graph.num_replays for graph in RecordedGraph.made) - replays
    return counts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_host_looks_every_sixteen_steps_and_launches_one_graph_a_token(name, model_folders, tokenizer, request):
    model = load(name, model_folders, tokenizer)
    model.config.eos_token_id = model.generation_config.eos_token_id = len(tokenizer) - 1
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(
            torch.zeros(len(head.weight)).index_fill_(0, torch.tensor(len(tokenizer) - 1), -99)
        )
    eager = count_dispatches(model, 97) - count_dispatches(model, 49)
    assert eager.total() / 48 > 100
    request.getfixturevalue("graphs")
    captured = count_dispatches(model, 97) - count_dispatches(model, 49)
    assert captured["replay"] == 48 and captured["aten::isin.Tensor_Tensor"] == 48 / 16
    assert captured.total() / 48 < 4


def test_a_step_that_cannot_be_captured_is_run_every_time(monkeypatch):
    @contextlib.contextmanager
    def refuse(graph: RecordedGraph) -> Iterator[None]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    ran: list[int] = []
    step = CapturedStep(ran.append)
    with pytest.warns(UserWarning, match="decoding without CUDA graphs: operation not permitted when stream is captu"):
        for index in range(4):
            step(index)
    assert ran == [0, 1, 2, 3]


def test_only_a_model_on_a_gpu_without_hooks_is_captured(model_folders, tokenizer):
    model = load("gpt2", model_folders, tokenizer)
    assert not can_capture_steps(model)
    on_gpu = type("OnGPU", (), {"device": torch.device("cuda"), "modules": model.modules})()
    assert can_capture_steps(on_gpu)
    handle = model.transformer.h[0].register_forward_pre_hook(lambda *_: None)
    assert not can_capture_steps(on_gpu)
    handle.remove()
    model.transformer.h[1].attn._hf_hook = object()
    assert not can_capture_steps(on_gpu)
