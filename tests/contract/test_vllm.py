"""The vLLM engine against a real server (`make peers-vllm`), on a CPU in float32; without one these are skipped."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, GenerationOutput, Generator, VLLMGenerator, VLLMLoRAGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.models.export import write_untied_model
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.rollout.forward_passes import response_logprobs
from tests.helpers.real_vllm import MISSING, PYTHON, RealVLLM, run_vllm
from tests.helpers.vllm_models import CONFIGS, IDS, SIZE, write_model

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason=MISSING)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]
GREEDY = SamplingParams(10, temperature=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, str]:
    """A folder of random weights for each architecture."""
    return {name: write_model(name, tmp_path_factory.mktemp(name), tokenizer) for name in CONFIGS}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "vllm.log"


@pytest.fixture(scope="module")
def llama(folders: dict[str, str], log: Path) -> Iterator[RealVLLM]:
    """A server of the tied Llama for the tests that do no harm to it."""
    options = ("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--enable-lora")
    with run_vllm(folders["llama-tied"], log, *options, "--max-lora-rank", "8") as server:
        yield server


@pytest.fixture
def policy(folders: dict[str, str], tokenizer: Any) -> Any:
    return load_causal_lm(folders["llama-tied"], tokenizer, ModelLoadingConfig()).eval()


def make_generator(server: RealVLLM, folder: Path, kind: type[VLLMGenerator] = VLLMGenerator, **settings: Any) -> Any:
    return kind(str(folder), server.url, **{"retries": 1, "pause": 0.1, "timeout": 60.0, **settings})


def generate(
    generator: Generator,
    policy: Any,
    sampling: SamplingParams,
    num_samples: int = 1,
    seed: int = 3,
    matcher: Any = None,
) -> GenerationOutput:
    uniforms = sampling_uniforms(len(PROMPTS) * num_samples, sampling.max_new_tokens, seed)
    return generator.generate(policy, PromptBatch.from_tokens(*pad_left(PROMPTS, 0)), sampling, uniforms, matcher)


def assert_same(one: GenerationOutput, other: GenerationOutput) -> None:
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=0)


def logprob_errors(policy: Any, output: GenerationOutput, sampling: SamplingParams, num_samples: int) -> torch.Tensor:
    """The differences of a server's log-probs from the policy's, of all tokens."""
    ids, mask = (each.repeat_interleave(num_samples, 0) for each in pad_left(PROMPTS, 0))
    episodes = torch.cat([ids, output.response_ids], 1), torch.cat([mask, output.response_mask.long()], 1)
    with torch.no_grad():
        expected = response_logprobs(policy, *episodes, output.response_ids.shape[1], sampling)
    return (output.logprobs - expected).abs()[output.response_mask]


def perturb_weights(policy: Any, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(scale * weight.std().nan_to_num() * torch.randn(weight.shape, generator=generator))


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as problem:
        call()
    assert "\n" not in str(problem.value)
    return str(problem.value)


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 1e-4),
        ({"temperature": 1.7}, 1e-4),
        ({"temperature": 0.6, "top_k": 5, "top_p": 0.8}, 1e-2),  # a nucleus's edge is a matter of rounding
        ({"min_new_tokens": 4, "stop_token_ids": [7, 9]}, 1e-4),
    ],
    ids=lambda value: ",".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_samples_have_the_log_probs_of_the_requested_distribution(llama, policy, tmp_path, settings, limit):
    sampling = SamplingParams(8, **settings)
    vllm = make_generator(llama, tmp_path)
    output = generate(vllm, policy, sampling, num_samples=3)
    assert len({tuple(row) for row in output.response_ids.tolist()}) > 10
    errors = logprob_errors(policy, output, sampling, 3)
    assert errors.max() < limit and errors.median() < 1e-4
    assert int(output.response_mask.sum(1).min()) >= sampling.min_new_tokens
    assert_same(generate(vllm, policy, sampling, num_samples=3), output)  # the same seeds
    other = generate(vllm, policy, sampling, num_samples=3, seed=4)
    assert not torch.equal(other.response_ids, output.response_ids)


def test_frequencies_of_samples_are_the_policys_probabilities(llama, policy, tmp_path):
    output = generate(make_generator(llama, tmp_path), policy, SamplingParams(1), num_samples=100)
    logits = policy(torch.tensor([PROMPTS[0]])).logits[0, -1]
    observed = torch.bincount(output.response_ids[:100, 0], minlength=len(logits)) / 100
    assert (observed - torch.softmax(logits, 0)).abs().max() < 4 * 0.5 / 100**0.5


def test_responses_end_as_ours(llama, policy, tokenizer, tmp_path):
    plain = generate(CachedGenerator(), policy, GREEDY)
    rows = plain.response_ids.tolist()
    found = (token for row in rows for token in row[1:] if token > 3)
    token = next(token for token in found if sum(token in row for row in rows) < len(rows))
    row = next(row for row in rows if token in row[1:])
    end = row.index(token, 1) + 1
    words = tokenizer.decode(row[end - 2 : end])
    absent = [f"absent{n}" for n in range(5)]
    for settings in (
        {"stop_token_ids": [token]},
        {"stop_strings": [words]},
        {"stop_strings": [*absent, words]},  # the server gets four of them
        {"stop_strings": [words], "min_new_tokens": 9},
    ):
        sampling = SamplingParams(10, temperature=0.0, **settings)
        matcher = stop_string_matcher(tokenizer, sampling)
        theirs = generate(make_generator(llama, tmp_path), policy, sampling, matcher=matcher)
        assert_same(theirs, generate(CachedGenerator(), policy, sampling, matcher=matcher))
        assert theirs.finished.any() and not theirs.finished.all()


def test_several_greedy_samples_and_more_requests_than_the_server_runs_at_once(llama, policy, tmp_path):
    sampling = SamplingParams(6, temperature=0.0)
    vllm = make_generator(llama, tmp_path)
    assert_same(generate(vllm, policy, sampling, 3), generate(CachedGenerator(), policy, sampling, 3))
    output = generate(vllm, policy, SamplingParams(4), num_samples=20)
    assert output.response_ids.shape == (100, 4)


def test_prompt_and_response_that_the_server_would_cut_are_refused(llama, policy, tmp_path):
    vllm = make_generator(llama, tmp_path)
    message = error_of(lambda: generate(vllm, policy, SamplingParams(124)))
    assert "are 129 tokens, and it takes 128; start it with --max-model-len 129" in message
    assert generate(vllm, policy, SamplingParams(123)).response_ids.shape[1] == 123


def test_a_bad_request_is_reported_in_the_servers_words(llama, tmp_path):
    vllm = make_generator(llama, tmp_path)
    payload = {"model": "policy", "prompt": [5], "n": 1, "stop": ["a", "b", "c", "d", "e"]}
    message = error_of(lambda: list(vllm.server.complete([payload])))
    assert "status 400: " in message and "stop" in message
    message = error_of(lambda: list(vllm.server.complete([{"model": "other", "prompt": [5], "n": 1}])))
    assert "status 404: " in message and "--served-model-name policy" in message


def test_other_names_precisions_and_shapes_are_refused(llama, folders, tokenizer, policy, tmp_path):
    message = error_of(make_generator(llama, tmp_path, model="other").check_connection)
    assert "it serves policy" in message and "no 'other'" in message
    half = load_causal_lm(folders["llama-tied"], tokenizer, ModelLoadingConfig()).bfloat16()
    message = error_of(lambda: generate(make_generator(llama, tmp_path), half, GREEDY))
    assert "it serves in float32, and the policy computes in bfloat16; start it with --dtype bfloat16" in message
    other = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZE, "num_hidden_layers": 1}, **IDS))
    message = error_of(lambda: generate(make_generator(llama, tmp_path), other, GREEDY))
    assert "its model has layers 2, and the policy 1" in message


def test_adapters_of_every_version_are_loaded_and_unloaded(llama, policy, tmp_path):
    add_lora(policy, LoRA(rank=4, alpha=8))
    vllm = make_generator(llama, tmp_path, VLLMLoRAGenerator)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(3):
        ours = generate(CachedGenerator(), policy, GREEDY)
        assert_same(generate(vllm, policy, GREEDY), ours)
        seen.append(ours.response_ids.tolist())
        assert vllm.server.served_models() == ["policy", f"policy-{vllm.label}"]
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0.0, 0.3, generator=generator)
    assert seen[0] != seen[1] != seen[2]
    wide = add_and_return(load_again(policy), LoRA(rank=16, alpha=8))
    message = error_of(lambda: generate(make_generator(llama, tmp_path, VLLMLoRAGenerator), wide, GREEDY))
    assert "no adapters of rank 16; start it with --enable-lora --max-lora-rank 16" in message


def load_again(policy: Any) -> Any:
    return AutoModelForCausalLM.from_config(policy.config).eval()


def add_and_return(model: Any, lora: LoRA) -> Any:
    add_lora(model, lora)
    return model


def in_a_moment(seconds: float, act: Callable[[], Any]) -> None:
    threading.Timer(seconds, act).start()


LONG = SamplingParams(3000, temperature=1.0, min_new_tokens=3000)
FRAIL = ("--dtype", "float32", "--max-model-len", "4096")


@pytest.fixture(scope="module")
def frail(folders: dict[str, str], log: Path) -> Iterator[list[RealVLLM]]:
    """A server, the last of the list, that the tests below stop and damage, in their order."""
    servers = [RealVLLM(folders["llama-tied"], log, *FRAIL)]
    try:
        servers[0].wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


def test_weights_that_did_not_arrive_end_the_run(frail, policy, tmp_path, monkeypatch):
    vllm = make_generator(frail[-1], tmp_path)
    generate(vllm, policy, GREEDY)
    perturb_weights(policy, 0.02)
    with monkeypatch.context() as patch:
        patch.setattr(vllm.server, "reload_weights", lambda folder: None)
        message = error_of(lambda: generate(vllm, policy, GREEDY))
    assert "differ from the policy's by" in message and "does not hold these weights" in message
    policy.save_pretrained(tmp_path / "tied")  # as every push was once: its output layer is not read
    with monkeypatch.context() as patch:
        reload = vllm.server.reload_weights
        patch.setattr(vllm.server, "reload_weights", lambda folder: reload(tmp_path / "tied"))
        assert "does not hold these weights" in error_of(lambda: generate(vllm, policy, GREEDY))
    assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))


def test_the_prefix_cache_does_not_answer_with_earlier_weights(frail, policy, tmp_path):
    """Prompts of more than two of the server's blocks of 128 tokens."""
    vllm, seen = make_generator(frail[-1], tmp_path), []
    rows = torch.randint(4, 32, (3, 300), generator=torch.Generator().manual_seed(0))
    prompts, uniforms = PromptBatch.from_tokens(rows, torch.ones_like(rows)), sampling_uniforms(3, 8, 0)
    sampling = SamplingParams(8, temperature=0.0)
    for _ in range(2):
        ours = CachedGenerator().generate(policy, prompts, sampling, uniforms)
        for _ in range(2):
            assert_same(vllm.generate(policy, prompts, sampling, uniforms), ours)
        seen.append(ours.response_ids.tolist())
        perturb_weights(policy)
    assert seen[0] != seen[1]


def test_a_paused_server_is_reported_and_goes_on(frail, policy, tmp_path):
    vllm = make_generator(frail[-1], tmp_path)
    ours = generate(CachedGenerator(), policy, GREEDY)
    assert_same(generate(vllm, policy, GREEDY), ours)
    vllm.server._request("/pause?mode=keep", lambda said: said, {})
    start = time.monotonic()
    assert "it is paused; resume it" in error_of(lambda: generate(vllm, policy, GREEDY))
    assert time.monotonic() - start < 30
    vllm.server._request("/resume", lambda said: said, {})
    assert_same(generate(vllm, policy, GREEDY), ours)


def test_a_terminated_server_is_reported_and_a_restarted_one_gets_the_weights_again(frail, policy, tmp_path):
    server, vllm = frail[-1], make_generator(frail[-1], tmp_path)
    perturb_weights(policy)
    ours = generate(CachedGenerator(), policy, GREEDY)
    assert_same(generate(vllm, policy, GREEDY), ours)
    in_a_moment(3.0, lambda: os.kill(server.process.pid, signal.SIGTERM))
    start = time.monotonic()
    message = error_of(lambda: generate(vllm, policy, LONG, num_samples=16))
    assert "it has stopped" in message and time.monotonic() - start < 40, message
    server.kill()
    assert "it has stopped" in error_of(lambda: generate(vllm, policy, GREEDY))
    frail.append(server.restart())
    frail[-1].wait()
    assert_same(generate(vllm, policy, GREEDY), ours)  # the same generator


def test_a_reload_that_fails_is_reported_in_the_servers_words_and_not_repeated(frail, policy, tmp_path):
    vllm = make_generator(frail[-1], tmp_path)
    generate(vllm, policy, GREEDY)
    narrow = LlamaConfig(**{**SIZE, "intermediate_size": 96}, **IDS, num_key_value_heads=1)
    target = tmp_path / "0123456789abcdef-01234567"
    write_untied_model(AutoModelForCausalLM.from_config(narrow), target)
    start = frail[-1].log.read_text().count("/collective_rpc")
    message = error_of(lambda: vllm.server.reload_weights(target))
    assert "it did not read the policy's weights: status 500: " in message and "restart it" in message
    assert frail[-1].log.read_text().count("/collective_rpc") - start <= 1
    # whatever such a server answers, no wrong rollout comes of it
    perturb_weights(policy, 0.1)
    survives(vllm, policy)


def test_a_server_whose_worker_is_killed_is_reported(frail, policy, tmp_path):
    vllm = make_generator(frail[-1], tmp_path)
    if not survives(vllm, policy):
        frail[-1].kill()
        frail.append(frail[-1].restart())
        frail[-1].wait()
        generate(vllm, policy, GREEDY)
    for pid in frail[-1].workers():
        in_a_moment(3.0, lambda pid=pid: os.kill(pid, signal.SIGKILL))
    start = time.monotonic()
    message = error_of(lambda: generate(vllm, policy, LONG, num_samples=16))
    assert ("its engine has died" in message or "it has stopped" in message) and time.monotonic() - start < 40, message


def survives(vllm: Any, policy: Any) -> bool:
    """Whether a complete push repairs the server; then its responses are the policy's."""
    try:
        output = generate(vllm, policy, GREEDY)
    except UserError:
        return False
    assert_same(output, generate(CachedGenerator(), policy, GREEDY))
    return True


def test_a_server_that_sleeps_gets_the_weights_before_each_rollout(llama, policy, tmp_path, monkeypatch):
    """On a CPU it keeps its memory, and no request is answered while it sleeps; --enable-sleep-mode needs a GPU."""
    vllm = make_generator(llama, tmp_path, sleep=True)
    monkeypatch.setattr(vllm, "check_options", lambda _: None)
    try:
        for _ in range(2):
            assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
            assert vllm.server.is_sleeping()
            assert "POST /wake_up if it sleeps" in error_of(
                lambda: generate(make_generator(llama, tmp_path), policy, GREEDY)
            )
            perturb_weights(policy)
    finally:
        vllm.server.wake_up("weights")
        vllm.server.wake_up("kv_cache")
    assert_same(generate(make_generator(llama, tmp_path), policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))


def test_responses_are_waited_for_in_another_thread(llama, policy, tmp_path):
    """And are those of the weights at their start, whatever the policy has become since."""
    vllm, sampling = make_generator(llama, tmp_path), SamplingParams(10)
    expected = generate(vllm, policy, sampling, num_samples=2)
    uniforms = sampling_uniforms(len(PROMPTS) * 2, 10, 3)
    vllm.start(policy, PromptBatch.from_tokens(*pad_left(PROMPTS, 0)), sampling, uniforms)
    perturb_weights(policy)
    other = generate(vllm, policy, sampling, num_samples=2)
    assert_same(vllm.finish(), expected)
    assert not torch.equal(other.response_ids, expected.response_ids) and vllm.finish() is None


@pytest.mark.parametrize("name", CONFIGS)
def test_responses_follow_every_change_of_the_weights(name, folders, log, tokenizer, tmp_path):
    policy = load_causal_lm(folders[name], tokenizer, ModelLoadingConfig()).eval()
    with run_vllm(folders[name], log, "--dtype", "float32", "--max-model-len", "128") as server:
        vllm = make_generator(server, tmp_path)
        vllm.check_connection()
        seen = []
        for _ in range(3):
            ours = generate(CachedGenerator(), policy, GREEDY)
            assert_same(generate(vllm, policy, GREEDY), ours)
            sampling = SamplingParams(8)
            assert logprob_errors(policy, generate(vllm, policy, sampling), sampling, 1).max() < 1e-4
            seen.append(ours.logprobs)
            perturb_weights(policy)
        assert not torch.allclose(seen[0], seen[1]) and not torch.allclose(seen[1], seen[2])
        assert [path.name for path in tmp_path.iterdir()] == [vllm.label], "the last weights stay, and no others"
