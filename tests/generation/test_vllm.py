"""VLLMGenerator against a stand-in that is held to a real server's answers; `tests/contract` has a real one."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, GenerationOutput
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.generation.vllm import VLLMGenerator, VLLMLoRAGenerator
from lit_rlhf.http import JSONClient
from lit_rlhf.models.fingerprint import live_model_fingerprint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.rollout.forward_passes import response_logprobs
from tests.helpers.ranks import on_ranks
from tests.helpers.services import Reply, Request, Service, serve
from tests.helpers.vllm_server import Choices, FakeVLLM, serve_modified, serve_vllm

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]
GREEDY = SamplingParams(10, temperature=0.0)


@pytest.fixture
def policy(llama: str, tokenizer: Any) -> Any:
    return load_causal_lm(llama, tokenizer, ModelLoadingConfig()).eval()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def make_generator(
    service: Service, folder: Path, kind: type[VLLMGenerator] = VLLMGenerator, **settings: Any
) -> VLLMGenerator:
    return kind(str(folder), service.url, **{"retries": 1, "pause": 0.01, "timeout": 5.0, **settings})


def generate(
    generator: Any, policy: Any, sampling: SamplingParams, num_samples: int = 1, seed: int = 3, matcher: Any = None
) -> GenerationOutput:
    uniforms = sampling_uniforms(len(PROMPTS) * num_samples, sampling.max_new_tokens, seed)
    return generator.generate(policy, PromptBatch.from_tokens(*pad_left(PROMPTS, 0)), sampling, uniforms, matcher)


def assert_same(one: GenerationOutput, other: GenerationOutput) -> None:
    for name in ("response_ids", "response_mask", "finished"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.response_mask.dtype == one.finished.dtype == torch.bool and one.response_ids.dtype == torch.int64
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=1e-5)


def perturb_weights(policy: Any, scale: float = 0.5) -> None:
    """Change the weights by enough to change greedy responses."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(scale * weight.std() * torch.randn(weight.shape, generator=generator))


def completions(service: Service) -> list[Any]:
    """The requests for responses, without those that probe weights."""
    sent = [request.payload for request in service.requests if request.path == "/v1/completions"]
    return [payload for payload in sent if "prompt_logprobs" not in payload]


def unsalted(payloads: list[Any]) -> list[str]:
    """Requests that can be compared: the salt is of one push."""
    return sorted(json.dumps({**payload, "cache_salt": ""}) for payload in payloads)


def test_greedy_responses_follow_every_change_of_the_weights(llama, policy, tmp_path):
    with serve_vllm(llama) as (service, server):
        vllm = make_generator(service, tmp_path / "shared")
        responses = []
        for num_syncs in (1, 2, 3):
            ours = generate(CachedGenerator(), policy, GREEDY)
            assert_same(generate(vllm, policy, GREEDY), ours)
            assert_same(generate(vllm, policy, GREEDY), ours)  # another batch of the same weights
            assert len(server.weights_paths) == num_syncs
            responses.append(ours.response_ids.tolist())
            perturb_weights(policy)
        assert responses[0] != responses[1] != responses[2]
        assert len(set(server.weights_paths)) == 3, "a path is never used for other weights"
    left = [path.name for path in (tmp_path / "shared").iterdir()]
    assert left == [vllm.label], "the last weights stay, for a server that reads them again, and no others"


def test_the_fingerprint_covers_every_change_of_the_policy_and_none_of_attached_adapters(policy):
    start = live_model_fingerprint(policy)
    weight = policy.model.layers[0].mlp.up_proj.weight
    assert live_model_fingerprint(policy) == start
    weight.data.view(-1).numpy()[3] += 1e-7  # as a custom kernel writes: PyTorch counts no new version
    assert live_model_fingerprint(policy) != start
    add_lora(policy, LoRA(rank=2, alpha=4))
    with_adapter = live_model_fingerprint(policy)
    names = dict(policy.named_parameters())
    own = next(name for name in names if "lora_B" in name)
    names[own].data.add_(1.0)
    assert live_model_fingerprint(policy) != with_adapter
    names[own].data.sub_(1.0)
    add_lora(policy, LoRA(rank=2, alpha=4), "critic")
    assert live_model_fingerprint(policy) == with_adapter


def test_adapters_are_merged_into_the_weights_that_are_synced(llama, policy, tmp_path):
    add_lora(policy, LoRA(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0.0, 0.3, generator=generator)
    with serve_vllm(llama) as (service, server):
        vllm = make_generator(service, tmp_path)
        assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
        exact = {name: weight.clone() for name, weight in server.model.state_dict().items()}
        with torch.autocast("cpu", torch.bfloat16):  # as a run in mixed precision calls it
            vllm.push_weights(policy, "0123456789abcdef-01234567")
        for name, weight in server.model.state_dict().items():
            assert torch.equal(weight, exact[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.7},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.8},
        {"min_new_tokens": 4, "stop_token_ids": [7, 9]},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_samples_have_the_log_probs_of_the_requested_distribution(llama, policy, tmp_path, settings):
    sampling = SamplingParams(8, **settings)
    with serve_vllm(llama) as (service, _):
        output = generate(make_generator(service, tmp_path), policy, sampling, num_samples=3)
    assert len(output.response_ids) == 15 and len({tuple(row) for row in output.response_ids.tolist()}) > 10
    ids, mask = (each.repeat_interleave(3, 0) for each in pad_left(PROMPTS, 0))
    episodes = torch.cat([ids, output.response_ids], 1), torch.cat([mask, output.response_mask.long()], 1)
    expected = response_logprobs(policy, *episodes, 8, sampling) * output.response_mask
    torch.testing.assert_close(output.logprobs, expected, atol=2e-5, rtol=1e-5)
    assert int(output.response_mask.sum(1).min()) >= sampling.min_new_tokens
    assert 0 < int(output.finished.sum()) < 15


def test_frequencies_of_samples_are_the_policys_probabilities(llama, policy, tmp_path):
    with serve_vllm(llama) as (service, _):
        output = generate(make_generator(service, tmp_path), policy, SamplingParams(1), num_samples=400)
    logits = policy(torch.tensor([PROMPTS[0]])).logits[0, -1]
    observed = torch.bincount(output.response_ids[:400, 0], minlength=len(logits)) / 400
    assert (observed - torch.softmax(logits, 0)).abs().max() < 4 * 0.5 / 400**0.5


def test_a_response_ends_where_cached_generator_ends_it(llama, policy, tokenizer, tmp_path):
    plain = generate(CachedGenerator(), policy, SamplingParams(10, temperature=0.0))
    row = next(row for row in plain.response_ids.tolist() if len(set(row)) > 3)
    words = tokenizer.decode(row[1:3])
    for settings in (
        {"stop_token_ids": [row[2]]},
        {"stop_strings": [words]},
        {"stop_strings": [words], "min_new_tokens": 9},
    ):
        sampling = SamplingParams(10, temperature=0.0, **settings)
        matcher = stop_string_matcher(tokenizer, sampling)
        with serve_vllm(llama) as (service, _):
            theirs = generate(make_generator(service, tmp_path), policy, sampling, matcher=matcher)
        ours = generate(CachedGenerator(), policy, sampling, matcher=matcher)
        assert_same(theirs, ours)
        assert ours.finished.any() and not ours.finished.all()
        assert int(ours.response_mask.sum()) < int(plain.response_mask.sum()), settings


def test_a_stop_string_that_only_the_server_finds_ends_the_response(llama, policy, tokenizer, tmp_path):
    """Tokenizers decode edges differently; a response that the server stopped at a requested string is finished."""
    sampling = SamplingParams(6, stop_strings=["nowhere"])

    def stop_early(choices: Choices) -> None:
        first = choices[0]
        first.update(token_ids=[5, 6], finish_reason="stop", stop_reason="nowhere")
        first["logprobs"] = {"token_logprobs": [-1.0, -2.0]}

    with serve_modified(llama, stop_early) as service:
        output = generate(
            make_generator(service, tmp_path), policy, sampling, matcher=stop_string_matcher(tokenizer, sampling)
        )
    assert output.finished.all() and output.response_ids[0].tolist() == [5, 6, 0, 0, 0, 0]
    assert output.logprobs[0].tolist() == [-1.0, -2.0, 0.0, 0.0, 0.0, 0.0]


def test_a_stop_string_that_the_server_misses_ends_the_response(llama, policy, tokenizer, tmp_path):
    sampling = SamplingParams(6, stop_strings=["w3 w4"])
    ids = tokenizer.encode("w1 w3 w4 w5 w6 w7")

    def miss_stop_string(choices: Choices) -> None:
        choices[0].update(token_ids=ids, finish_reason="length", stop_reason=None)
        choices[0]["logprobs"] = {"token_logprobs": [-1.0] * 6}

    with serve_modified(llama, miss_stop_string) as service:
        output = generate(
            make_generator(service, tmp_path), policy, sampling, matcher=stop_string_matcher(tokenizer, sampling)
        )
    assert output.finished.all() and output.response_ids[0].tolist() == [*ids[:3], 0, 0, 0]
    assert output.logprobs.sum(1).tolist() == [-3.0] * 5


def test_the_end_token_is_the_policys_and_not_the_servers(llama, policy, tmp_path):
    token = int(generate(CachedGenerator(), policy, GREEDY).response_ids[:, 2].mode().values)
    policy.config.eos_token_id = policy.generation_config.eos_token_id = token
    with serve_vllm(llama) as (service, _):
        theirs = generate(make_generator(service, tmp_path), policy, GREEDY)
    assert_same(theirs, generate(CachedGenerator(), policy, GREEDY))
    assert theirs.finished.any()


def test_requests_depend_on_the_row_index_alone(llama, policy, tmp_path):
    sampling = SamplingParams(6, temperature=0.9, top_p=0.95, stop_token_ids=[7])
    with serve_vllm(llama) as (service, _):
        expected = generate(make_generator(service, tmp_path), policy, sampling, num_samples=2)
        first = completions(service)
        resumed = generate(make_generator(service, tmp_path / "resumed"), policy, sampling, num_samples=2)
        second = completions(service)[5:]
        assert unsalted(second) == unsalted(first)
        ids, mask = pad_left(PROMPTS, 0)
        uniforms = sampling_uniforms(10, 6, 3).view(5, 2, 6)[1::2].flatten(0, 1)  # rows of the second of two ranks
        second_rank = make_generator(service, tmp_path / "rank").generate(
            policy, PromptBatch.from_tokens(ids[1::2], mask[1::2]), sampling, uniforms
        )
        uniforms = sampling_uniforms(10, 6, 3)[::2]  # the first sample of each prompt, alone
        alone = make_generator(service, tmp_path / "alone").generate(
            policy, PromptBatch.from_tokens(ids, mask), sampling, uniforms
        )
    assert_same(expected, resumed)
    assert torch.equal(alone.response_ids, expected.response_ids[::2])
    rows = torch.tensor([2, 3, 6, 7])
    assert torch.equal(second_rank.response_ids, expected.response_ids[rows])
    assert len({payload["seed"] for payload in first}) == 5
    payload = next(payload for payload in first if payload["prompt"] == PROMPTS[2])
    settings = {"n": 2, "max_tokens": 6, "min_tokens": 0, "temperature": 0.9, "top_p": 0.95, "top_k": -1, "logprobs": 0}
    assert settings.items() <= payload.items()
    assert payload["stop_token_ids"] == [1, 7] and payload["ignore_eos"] and payload["return_token_ids"]


def test_the_key_comes_from_the_environment(llama, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serve_vllm(llama) as (service, _):
        generate(make_generator(service, tmp_path, api_key_env="MY_KEY"), policy, GREEDY)
        assert {request.headers["Authorization"] for request in service.requests} == {"Bearer s3cret"}
    with (
        serve(lambda *_: Reply(status=401)) as service,
        pytest.raises(UserError, match="MY_KEY, which is set") as error,
    ):
        make_generator(service, tmp_path, api_key_env="MY_KEY").check_connection()
    assert "s3cret" not in str(error.value)


def refusal_of(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def refusal_message(service: Service, folder: Path, policy: Any, **settings: Any) -> str:
    vllm = make_generator(service, folder, **settings)
    message = refusal_of(lambda: generate(vllm, policy, SamplingParams(6), num_samples=2))
    assert message.startswith(f"vLLM at {service.url}")
    return message


def set_fields(**fields: Any) -> Any:
    return lambda choices: choices[1].update(fields)


WRONG_CHOICES = {
    "1 samples in place of 2; is it a vLLM server": lambda choices: choices[:1],
    "no token ids; it needs a vLLM that knows return_token_ids": set_fields(token_ids=None),
    "token 32, and the policy has 32; start it from the policy's own folder": set_fields(
        token_ids=[32], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"
    ),
    "1 tokens without a finite log-prob each": set_fields(token_ids=[5], logprobs=None),
    "2 tokens without a finite log-prob each": set_fields(token_ids=[5, 6], logprobs={"token_logprobs": [-1.0, None]}),
    "2 of 6 tokens; raise its --max-model-len": set_fields(
        token_ids=[5, 6], logprobs={"token_logprobs": [-1.0, -1.0]}, finish_reason="length"
    ),
    "0 tokens that end with None for the reason 'stop'": set_fields(
        token_ids=[], logprobs={"token_logprobs": []}, finish_reason="stop"
    ),
    "1 tokens that end with 5 for the reason 'stop'": set_fields(
        token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop", stop_reason=None
    ),
    "1 tokens that end with 1 for the reason 'abort'; is it paused": set_fields(
        token_ids=[1], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort"
    ),
    "7 tokens that end with": set_fields(
        token_ids=[5] * 7, logprobs={"token_logprobs": [-1.0] * 7}, finish_reason="length"
    ),
    "another prompt than the one that was sent": set_fields(prompt_token_ids=[1, 5, 6, 7]),
}


@pytest.mark.parametrize("message", WRONG_CHOICES)
def test_a_response_that_does_not_match_its_request_ends_the_run(message, llama, policy, tmp_path):
    with serve_modified(llama, WRONG_CHOICES[message]) as service:
        assert f"answered with {message}" in refusal_message(service, tmp_path, policy)


@contextmanager
def failing_at(path: str, llama: str, reply: Reply, later: int = 0) -> Iterator[Service]:
    """Run a stand-in that fails at one path, from a later request there on."""
    server, counts = FakeVLLM(llama), itertools.count()

    def answer(request: Request, before: int) -> Reply:
        if request.path == path and next(counts) >= later:
            return reply
        return server.answer(request, before)

    with serve(answer) as service:
        yield service


WORDS = {"error": {"message": "no such thing,\nsays the server"}}


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        (
            "/v1/completions",
            Reply(WORDS, status=404),
            "status 404: no such thing, says the server; start it with --served-model-name policy, or set",
        ),
        ("/v1/completions", Reply(WORDS, status=400), "status 400: no such thing, says the server; its log says more"),
        ("/v1/completions", Reply(WORDS, status=500), "status 500 (2 attempts): no such thing, says the server; its"),
        ("/v1/completions", Reply({"choices": 3}), "malformed response: TypeError"),
        ("/weight_info", Reply({"detail": "Not Found"}, status=404), "start vLLM 0.32 or newer with VLLM_SERVER_DEV"),
        ("/collective_rpc", Reply(WORDS, status=500), "status 500: no such thing, says the server; it must see the"),
        ("/v1/models", Reply(status=500), "start the server as docs/vllm.md says"),
    ],
)
def test_a_failing_server_is_named_with_its_words_and_a_hint(path, reply, message, llama, policy, tmp_path):
    with failing_at(path, llama, reply, later=int(path in ("/v1/completions", "/collective_rpc"))) as service:
        assert message in refusal_message(service, tmp_path, policy)
        reloads = [each for each in service.requests if (each.payload or {}).get("method") == "reload_weights"]
        assert path != "/collective_rpc" or len(reloads) == 1, "it is not asked again"


def test_a_server_that_is_down_or_serves_another_model_is_refused(llama, policy, tmp_path):
    with serve(lambda *_: Reply()) as service:
        pass
    assert "it has stopped (" in refusal_message(service, tmp_path, policy)
    with pytest.raises(UserError, match=r"start the server .* or set model\.generator\.init_args\.url"):
        make_generator(service, tmp_path).check_connection()
    with serve_vllm(llama) as (service, _):
        make_generator(service, tmp_path).check_connection()
    with (
        serve_vllm(llama, name="other") as (service, _),
        pytest.raises(UserError, match="serves other and no 'policy'"),
    ):
        make_generator(service, tmp_path).check_connection()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "its log-probs are 'raw_logprobs', before temperature and truncation"),
        ({"enable_chunked_prefill": True}, "over 2,048 tokens together; start it with --no-enable-chunked-prefill"),
        ({"dtype": "torch.bfloat16"}, "it serves in bfloat16, and the policy computes in float32; start it with"),
        ({"vocab_size": 33}, "its model has vocab_size 33, and the policy 32; start it from the folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_server_that_was_started_with_other_options_is_refused(settings, message, llama, policy, tmp_path):
    with serve_vllm(llama, **settings) as (service, server):
        assert message in refusal_message(service, tmp_path, policy)
        assert not server.weights_paths
    with serve_vllm(llama, device="cuda", enable_chunked_prefill=True) as (service, _):
        generate(make_generator(service, tmp_path), policy, GREEDY)


def test_another_precision_is_taken_where_it_is_asked_for(llama, policy, tmp_path):
    with serve_vllm(llama, dtype="torch.bfloat16") as (service, _):
        generate(make_generator(service, tmp_path, dtype="bfloat16"), policy, GREEDY)
    with pytest.raises(UserError, match="dtype is 'int8'; take one of float32, float16, bfloat16"):
        VLLMGenerator(str(tmp_path), dtype="int8")


def test_responses_that_the_server_would_cut_are_refused(llama, policy, tmp_path):
    with serve_vllm(llama, max_model_len=12) as (service, _):
        generate(make_generator(service, tmp_path), policy, SamplingParams(7))
        with pytest.raises(UserError, match="are 13 tokens, and it takes 12; start it with --max-model-len 13 or more"):
            generate(make_generator(service, tmp_path), policy, SamplingParams(8))


def test_weights_that_did_not_arrive_end_the_run(llama, policy, tmp_path, monkeypatch):
    """As of a server that answers 200 and keeps its output layer, or all weights."""
    with serve_vllm(llama) as (service, server):
        vllm = make_generator(service, tmp_path)
        generate(vllm, policy, GREEDY)
        perturb_weights(policy, 0.02)
        with monkeypatch.context() as patch:
            patch.setattr(server, "reload", lambda _: Reply({"results": [None]}))
            with pytest.raises(UserError, match="its log-probs of a prompt differ from the policy's by"):
                generate(vllm, policy, GREEDY)
        assert server.version == "incomplete"
        assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
        server.model.lm_head.weight.data.mul_(1.05)
        with pytest.raises(UserError, match="does not hold these weights"):
            generate(make_generator(service, tmp_path), policy, GREEDY)  # a run that begins, on a server with a label


def test_a_tied_output_layer_arrives(model_folders, tokenizer, tmp_path):
    policy = load_causal_lm(model_folders["gpt2"], tokenizer, ModelLoadingConfig()).eval()
    assert policy.config.tie_word_embeddings
    with serve_vllm(model_folders["gpt2"]) as (service, _):
        vllm = make_generator(service, tmp_path)
        for _ in range(2):
            assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
            perturb_weights(policy)


def test_a_restarted_server_gets_the_weights_again(llama, policy, tmp_path, monkeypatch):
    perturb_weights(policy)
    ours = generate(CachedGenerator(), policy, GREEDY)
    with serve_vllm(llama) as (service, server):
        vllm = make_generator(service, tmp_path)
        assert_same(generate(vllm, policy, GREEDY), ours)
        server.restart()
        assert_same(generate(vllm, policy, GREEDY), ours)
        assert len(server.weights_paths) == 2
        # within a rollout: the responses are requested once more
        before, answer = len(completions(service)), server.answer_v1_completions

        def restart_once(payload: Any) -> Reply:
            if "prompt_logprobs" not in payload:
                monkeypatch.undo()
                server.restart()
            return answer(payload)

        monkeypatch.setattr(server, "answer_v1_completions", restart_once)
        assert_same(generate(vllm, policy, GREEDY), ours)
        assert len(completions(service)) - before == 10 and len(server.weights_paths) == 3

        def restart_always(payload: Any) -> Reply:
            if "prompt_logprobs" not in payload:
                server.restart()
            return answer(payload)

        monkeypatch.setattr(server, "answer_v1_completions", restart_always)
        with pytest.raises(UserError, match="replaced during the rollout, twice"):
            generate(vllm, policy, GREEDY)


def test_an_adapter_that_a_restarted_server_lost_during_a_rollout_is_handed_over_again(
    llama, policy, tmp_path, monkeypatch
):
    """It answers 404: the model of the requests is the adapter."""
    add_lora(policy, LoRA(rank=4, alpha=8))
    with serve_vllm(llama) as (service, server):
        vllm, answer = make_generator(service, tmp_path, VLLMLoRAGenerator), server.answer_v1_completions
        restarts = []

        def restart_once(payload: Any) -> Reply:
            if "prompt_logprobs" not in payload and not restarts:
                restarts.append(server.restart())
            return answer(payload)

        monkeypatch.setattr(server, "answer_v1_completions", restart_once)
        assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
        assert len(server.weights_paths) == 2

        def refuse(_: Any) -> Reply:
            return Reply({"error": {"message": "no such model"}}, status=404)

        monkeypatch.setattr(server, "answer_v1_completions", refuse)
        assert "no such model" in refusal_of(lambda: generate(vllm, policy, GREEDY)), "it holds the adapter"

        def stop(payload: Any) -> Reply:
            monkeypatch.setattr(server, "answer_v1_models", refuse)
            return refuse(payload)

        monkeypatch.setattr(server, "answer_v1_completions", stop)
        assert "no such model; start it with --served-model-name" in refusal_of(lambda: generate(vllm, policy, GREEDY))


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("/health", Reply(status=503), "its engine has died"),
        ("/health", Reply(hang_up=True), "it has stopped ("),
        ("/is_paused", Reply({"is_paused": True}), "it is paused; resume it"),
    ],
)
def test_a_server_that_answers_no_more_is_reported_in_time(path, reply, message, llama, policy, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.generation.vllm_server.HEALTH_INTERVAL", 0.05)
    server = FakeVLLM(llama)

    def answer(request: Request, before: int) -> Reply:
        if request.path == path:
            return reply
        found = server.answer(request, before)
        is_response = request.path == "/v1/completions" and "prompt_logprobs" not in request.payload
        return found._replace(delay=3.0 if is_response else 0.0)

    with serve(answer) as service:
        start = time.monotonic()
        vllm = make_generator(service, tmp_path)
        assert message in refusal_of(lambda: generate(vllm, policy, GREEDY))
        assert time.monotonic() - start < 2


def start_rollout(vllm: VLLMGenerator, policy: Any) -> None:
    arguments = PromptBatch.from_tokens(*pad_left(PROMPTS, 0)), GREEDY, sampling_uniforms(len(PROMPTS), 10, 3)
    vllm.start(policy, *arguments)


def test_responses_that_are_not_there_in_time_stay_pending(llama, policy, tmp_path):
    ours, server, may_answer = generate(CachedGenerator(), policy, GREEDY), FakeVLLM(llama), threading.Event()

    def answer(request: Request, before: int) -> Reply:
        found = server.answer(request, before)
        if request.path == "/v1/completions" and "prompt_logprobs" not in request.payload:
            may_answer.wait(20)
        return found

    with serve(answer) as service:
        vllm = make_generator(service, tmp_path, timeout=60.0)
        assert vllm.ready_output(0.1) is None, "nothing was started"
        start_rollout(vllm, policy)
        start = time.monotonic()
        assert vllm.ready_output(timeout=0.2) is None
        assert 0.1 < time.monotonic() - start < 10
        may_answer.set()
        found = vllm.ready_output(timeout=60.0)
        assert_same(found, ours)
        assert vllm.finish() is found and vllm.finish() is None
        assert len(completions(service)) == len(PROMPTS), "they are requested once"


def test_responses_of_all_ranks_are_in_time_or_of_none(llama, policy, tmp_path):
    """Rank zero has its responses, and the second rank's come later."""
    server, may_answer = FakeVLLM(llama), threading.Event()

    def answer(request: Request, before: int) -> Reply:
        if request.path == "/go":
            may_answer.set()
            return Reply()
        found = server.answer(request, before)
        if request.path == "/v1/completions" and request.payload["prompt"] == PROMPTS[1]:
            may_answer.wait(20)
        return found

    with serve(answer) as service:

        def rank() -> Any:
            dist.init_process_group("gloo")
            vllm, number = make_generator(service, tmp_path, timeout=60.0), dist.get_rank()
            prompt = PromptBatch.from_tokens(*pad_left([PROMPTS[number]], 0))
            vllm.start(policy, prompt, GREEDY, sampling_uniforms(1, 10, 3))
            early, has_own = vllm.ready_output(timeout=(60.0, 0.2)[number]), not vllm.pending.thread.is_alive()
            JSONClient(f"{service.url}/go").request({}, lambda *_: None)
            late = vllm.ready_output()
            return early is None, has_own, late.response_ids.shape == (1, 10)

        assert on_ranks(rank, tmp_path) == [(True, True, True), (True, False, True)]


def test_several_greedy_samples_are_one_request(llama, policy, tmp_path):
    sampling = SamplingParams(6, temperature=0.0)
    with serve_vllm(llama) as (service, _):
        output = generate(make_generator(service, tmp_path), policy, sampling, num_samples=3)
        assert len(completions(service)) == 5
    assert_same(output, generate(CachedGenerator(), policy, sampling, num_samples=3))


def test_more_stop_strings_than_the_server_takes(llama, policy, tokenizer, tmp_path):
    plain = generate(CachedGenerator(), policy, SamplingParams(10, temperature=0.0))
    row = next(row for row in plain.response_ids.tolist() if len(set(row)) > 3)
    stops = [*(f"absent{n}" for n in range(4)), tokenizer.decode(row[1:3])]
    sampling = SamplingParams(10, temperature=0.0, stop_strings=stops)
    matcher = stop_string_matcher(tokenizer, sampling)
    with serve_vllm(llama) as (service, _):
        theirs = generate(make_generator(service, tmp_path), policy, sampling, matcher=matcher)
        assert all(payload["stop"] == stops[:4] for payload in completions(service))
    assert_same(theirs, generate(CachedGenerator(), policy, sampling, matcher=matcher))
    assert theirs.finished.any()


def test_every_version_of_an_adapter_is_loaded_and_earlier_ones_are_unloaded(llama, policy, tmp_path):
    add_lora(policy, LoRA(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(0)
    with serve_vllm(llama) as (service, server):
        vllm = make_generator(service, tmp_path, VLLMLoRAGenerator)
        for count in (1, 2):
            assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
            assert [*server.adapters] == [f"policy-{vllm.label}"] and len(server.weights_paths) == count
            assert [path.name for path in tmp_path.iterdir()] == [vllm.label]
            for name, weight in policy.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_(0.0, 0.3, generator=generator)
        server.restart()
        assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
        server.restart()
        server.model.lm_head.weight.data.mul_(1.5)
        with pytest.raises(UserError, match="does not hold these weights"):  # another base
            generate(make_generator(service, tmp_path, VLLMLoRAGenerator), policy, GREEDY)
        assert not server.adapters


@pytest.mark.parametrize("kind", [VLLMGenerator, VLLMLoRAGenerator])
def test_the_same_adapter_of_another_scale_is_handed_over(kind, llama, tokenizer, tmp_path):
    """A resumed run with another adapter.alpha: the weights are those that the server has."""
    with serve_vllm(llama) as (service, server):
        for alpha, pushes in ((8, 1), (8.0, 1), (16, 2)):
            policy = load_causal_lm(llama, tokenizer, ModelLoadingConfig()).eval()
            add_lora(policy, LoRA(rank=4, alpha=alpha))
            generator = torch.Generator().manual_seed(0)
            for name, weight in policy.named_parameters():
                if ".lora_" in name:
                    weight.data.normal_(0.0, 0.1, generator=generator)
            vllm = make_generator(service, tmp_path, kind)
            assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
            assert len(server.weights_paths) == pushes, "the same scale is not handed over again"


def test_adapters_that_the_server_does_not_take_are_refused(llama, policy, tmp_path):
    with serve_vllm(llama) as (service, _):
        vllm = make_generator(service, tmp_path, VLLMLoRAGenerator)
        assert "needs model.adapter" in refusal_of(lambda: generate(vllm, policy, GREEDY))
        add_lora(policy, LoRA(rank=16, alpha=8))
        assert "no adapters of rank 16; start it with --enable-lora" in refusal_of(
            lambda: generate(vllm, policy, GREEDY)
        )


def test_after_a_failed_sync_the_weights_are_synced_again(llama, policy, tmp_path):
    with serve_vllm(llama) as (service, server):
        vllm = make_generator(service, tmp_path)
        generate(vllm, policy, GREEDY)
        start = {name: weight.clone() for name, weight in policy.state_dict().items()}
        perturb_weights(policy)
        folder, vllm.folder = vllm.folder, tmp_path / "a-file"
        vllm.folder.write_text("")
        with pytest.raises(UserError, match="cannot write to"):
            generate(vllm, policy, GREEDY)
        vllm.folder = folder
        policy.load_state_dict(start)  # the weights that it had before; unknown since the failure
        assert_same(generate(vllm, policy, GREEDY), generate(CachedGenerator(), policy, GREEDY))
        assert len(server.weights_paths) == 2


def test_a_temperature_that_vllm_would_raise_is_refused(tmp_path):
    vllm = VLLMGenerator(str(tmp_path))
    with pytest.raises(UserError, match=r"temperature 0.001 would become 0.01 .*; set it to 0.01 or more"):
        vllm.check(SamplingParams(temperature=0.001), "recompute")
    vllm.check(SamplingParams(temperature=0.01), "recompute")
