"""VLLMGenerator against a fake server written after vLLM's documentation. No vLLM runs here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, GenerationOutput
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import stop_string_matcher
from lit_rlhf.generation.vllm import VLLMGenerator
from lit_rlhf.models.fingerprint import live_model_fingerprint
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.rollout.forward_passes import response_logprobs
from tests.helpers.services import Reply, Request, Service, serve
from tests.helpers.vllm_server import Choices, serve_modified, serve_vllm

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]
GREEDY = SamplingParams(10, temperature=0.0)


@pytest.fixture
def policy(llama: str, tokenizer: Any) -> Any:
    return load_causal_lm(llama, tokenizer, ModelLoadingConfig()).eval()


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def make_generator(service: Service, folder: Path, **settings: Any) -> VLLMGenerator:
    return VLLMGenerator(str(folder), service.url, **{"retries": 1, "pause": 0.01, "timeout": 5.0, **settings})


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


def payloads_to(service: Service, path: str) -> list[Any]:
    return [request.payload for request in service.requests if request.path == path]


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
    assert list((tmp_path / "shared").iterdir()) == [], "the weights were not removed"


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
            vllm.push_weights(policy, tmp_path / "again")
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
        first = payloads_to(service, "/v1/completions")
        resumed = generate(make_generator(service, tmp_path / "resumed"), policy, sampling, num_samples=2)
        second = payloads_to(service, "/v1/completions")[5:]
        assert sorted(map(json.dumps, second)) == sorted(map(json.dumps, first))
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


def test_raw_log_probs_of_a_server_are_passed_through(llama, policy, tmp_path):
    """Without --logprobs-mode processed_logprobs the temperature is missing; PPO logs the mismatch."""
    with serve_vllm(llama, processed_logprobs=False) as (service, _):
        output = generate(make_generator(service, tmp_path), policy, SamplingParams(4, temperature=2.0))
    ids, mask = pad_left(PROMPTS, 0)
    episodes = torch.cat([ids, output.response_ids], 1), torch.cat([mask, output.response_mask.long()], 1)
    raw = response_logprobs(policy, *episodes, 4, SamplingParams(4)) * output.response_mask
    torch.testing.assert_close(output.logprobs, raw, atol=2e-5, rtol=1e-5)


def test_the_key_comes_from_the_environment(llama, policy, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serve_vllm(llama) as (service, _):
        generate(make_generator(service, tmp_path, token_variable="MY_KEY"), policy, GREEDY)
        assert {request.headers["Authorization"] for request in service.requests} == {"Bearer s3cret"}
    with (
        serve(lambda *_: Reply(status=401)) as service,
        pytest.raises(UserError, match="MY_KEY, which is set") as error,
    ):
        make_generator(service, tmp_path, token_variable="MY_KEY").check_connection()
    assert "s3cret" not in str(error.value)


def refusal_message(service: Service, folder: Path, policy: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as error:
        generate(make_generator(service, folder, **settings), policy, SamplingParams(6), num_samples=2)
    message = str(error.value)
    assert message.startswith(f"vLLM at {service.url}") and "\n" not in message
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


def fail_at(path: str, *replies: Reply) -> Any:
    """Return a service that fails at one path only."""

    def answer(request: Request, before: int) -> Reply:
        if request.path == path:
            return replies[min(before, len(replies) - 1)]
        return Reply({"results": [None]})

    return answer


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("/v1/completions", Reply(status=404), "status 404; start it with --served-model-name policy, or set"),
        ("/v1/completions", Reply(status=400), "status 400; prompt and sampling.max_new_tokens must fit its"),
        ("/v1/completions", Reply(status=500), "status 500 (2 attempts); is the server up?"),
        ("/v1/completions", Reply({"choices": 3}), "malformed response: TypeError"),
        ("/collective_rpc", Reply(status=404), "(status 404); start it with VLLM_SERVER_DEV_MODE=1"),
        ("/collective_rpc", Reply(status=500), "(status 500 (2 attempts)); it must see the folder"),
    ],
)
def test_a_failing_server_is_named_with_a_hint(path, reply, message, policy, tmp_path):
    with serve(fail_at(path, reply)) as service:
        assert message in refusal_message(service, tmp_path, policy)


def test_a_server_that_is_down_or_serves_another_model_is_refused(llama, policy, tmp_path):
    with serve(fail_at("", Reply())) as service:
        pass
    assert "Connection refused (2 attempts)); it must see the folder" in refusal_message(service, tmp_path, policy)
    with pytest.raises(UserError, match=r"start the server .* or set model\.generator\.init_args\.url"):
        make_generator(service, tmp_path).check_connection()
    with serve_vllm(llama) as (service, _):
        make_generator(service, tmp_path).check_connection()
    with (
        serve_vllm(llama, name="other") as (service, _),
        pytest.raises(UserError, match="serves other and no 'policy'"),
    ):
        make_generator(service, tmp_path).check_connection()


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
