"""Llama's blocks without the model around them: the same logits, whatever is on their layers, and who is left alone."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.kv_cache import make_decode_batch
from lit_rlhf.generation.llama_decoder import LlamaDecodeBatch, _round_up, fast_decode_unsupported_reason
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.rollout import direct_rows

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def shares_keys(**settings: object) -> LlamaForCausalLM:
    """Six heads, of which three share keys; norms that are not 1."""
    torch.manual_seed(0)
    shape = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, **settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.mul_(5)
    return model


def assert_like_a_plain_pass(model: LlamaForCausalLM, atol: float = 1e-5) -> None:
    ids, mask = pad_left(PROMPTS, 0)
    batch = make_decode_batch(model, ids, mask, 2, 4, build_fast_decoder(model))
    assert isinstance(batch, LlamaDecodeBatch)
    tokens = torch.randint(2, 30, (6, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = [batch.prefill(), *(batch.step(column) for column in tokens.T)]
        for row in range(6):
            prompt = PROMPTS[row // 2]
            logits = model(torch.tensor([prompt + tokens[row].tolist()])).logits[0, len(prompt) - 1 :]
            mine = torch.stack([step[row] for step in found])
            torch.testing.assert_close(
                log_softmax(mine.float(), -1), log_softmax(logits.float(), -1), atol=atol, rtol=0
            )


def test_heads_that_share_keys():
    assert_like_a_plain_pass(shares_keys())


@pytest.mark.parametrize("tokens", [1, 10, 1000])
def test_prompts_in_any_number_of_passes(tokens, monkeypatch):
    monkeypatch.setitem(direct_rows._PREFILL_TOKENS, "cpu", tokens)
    assert_like_a_plain_pass(shares_keys())


def test_rotations_that_are_scaled():
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 100.0}
    assert_like_a_plain_pass(shares_keys(rope_parameters=scaled, max_position_embeddings=32))


def test_half_precision_rounds_as_the_model_does():
    assert_like_a_plain_pass(shares_keys().to(torch.bfloat16), atol=0.1)


def test_adapters_and_hooks_on_layers_count():
    model = shares_keys()
    add_lora(model, LoRA(rank=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + torch.arange(40) / 10)
    assert_like_a_plain_pass(model)


@pytest.mark.parametrize("where", ["projection", "feed-forward"])
def test_a_hook_within_a_block_counts(where):
    model = shares_keys()
    block = model.model.layers[1]
    module = block.self_attn.k_proj if where == "projection" else block.mlp
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_like_a_plain_pass(model)


def test_autocast_counts():
    with torch.autocast("cpu", torch.bfloat16):
        assert_like_a_plain_pass(shares_keys(), atol=0.1)
        assert isinstance(build_fast_decoder(shares_keys()).decode.layers[0].o_proj, torch.nn.Linear)


def test_a_rollout_is_of_the_weights_as_they_are():
    """And what it returns may be trained with, though it was drawn in inference mode."""
    model, generator = shares_keys(), CachedGenerator()
    ids, mask = pad_left([[5, 6, 7], [8, 9, 4]], 0)
    for _ in range(2):
        found = generator.generate(
            model, PromptBatch.from_tokens(ids, mask), SamplingParams(6), sampling_uniforms(2, 6, 0)
        )
        assert not any(tensor.is_inference() for tensor in found)
        logits = model(torch.cat([ids, found.response_ids], 1)).logits[:, 2:-1]
        logprobs = log_softmax(logits, -1).gather(2, found.response_ids[..., None])[..., 0]
        drawn = found.response_mask
        torch.testing.assert_close(found.logprobs[drawn], logprobs[drawn], atol=1e-4, rtol=1e-4)
        (logprobs[drawn] * found.logprobs[drawn]).sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.8)


def test_layers_of_others_are_not_called_in_inference_mode():
    """They may prepare their weights in the first pass, and keep them for training."""
    modes: dict[bool, list[bool]] = {True: [], False: []}

    class Theirs(torch.nn.Linear):
        """As bitsandbytes' are."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes[known].append(torch.is_inference_mode_enabled())
            assert not torch.is_grad_enabled()
            return super().forward(x)

    for known in (True, False):
        model = shares_keys()
        Theirs.__module__ = "peft.layers" if known else "bitsandbytes.layers"
        model.model.layers[0].mlp.down_proj.__class__ = Theirs
        ids, mask = pad_left(PROMPTS, 0)
        CachedGenerator().generate(
            model, PromptBatch.from_tokens(ids, mask), SamplingParams(4), sampling_uniforms(3, 4, 0)
        )
    assert all(modes[True]) and modes[True] and modes[False] and not any(modes[False])


def test_few_sizes_of_steps():
    """A CPU makes code for each, half a megabyte a product."""
    rounded = [_round_up(rows) for rows in range(1, 257)]
    assert all(0 <= size - rows < max(4, rows / 8) for rows, size in enumerate(rounded, 1))
    assert len(set(rounded)) <= 32


@pytest.mark.parametrize("what", ["attention", "rotation", "hook", "class"])
def test_what_it_does_not_know_is_left_to_the_model(what):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0, "original_max_position_embeddings": 8}
    model = shares_keys(**{"rope_parameters": dynamic} if what == "rotation" else {})
    assert what == "rotation" or fast_decode_unsupported_reason(model) is None
    if what == "attention":
        model.set_attn_implementation("eager")
    if what == "hook":
        model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)
    if what == "class":
        model.__class__ = type("Sharded", (LlamaForCausalLM,), {})
    assert fast_decode_unsupported_reason(model)
    assert CachedGenerator()._build_fast_decoder(model, 8) is None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.Graph]:
    """Graphs that were compiled; run by PyTorch itself behind its own passes, for a compiler takes a minute."""
    made: list[torch.fx.Graph] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        made.append(graph.graph)
        return aot_eager(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, **how, backend=backend))
    torch.compiler.reset()
    return made


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_compiled_step_draws_the_same_from_one_graph(name, model_folders, tokenizer, graphs):
    """At every number of prompts, samples, lengths and rows left, and with weights that were changed or replaced."""
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    plain, compiled = CachedGenerator(batch_size=8), CachedGenerator(batch_size=8, compile=True)

    def compare(prompts: list[list[int]], samples: int, length: int, temperature: float = 1.0) -> None:
        ids, mask = pad_left(prompts, tokenizer.pad_token_id)
        noise = sampling_uniforms(len(prompts) * samples, length, 3)
        mine, theirs = (
            g.generate(model, PromptBatch.from_tokens(ids, mask), SamplingParams(length, temperature), noise)
            for g in (compiled, plain)
        )
        assert torch.equal(mine.response_ids, theirs.response_ids)
        torch.testing.assert_close(mine.logprobs, theirs.logprobs, atol=1e-5, rtol=1e-5)

    compare(PROMPTS, 1, 8)
    compare(PROMPTS * 4, 1, 12)
    compare(PROMPTS[:1], 1, 5)  # a single row all along
    compare(PROMPTS[1:], 4, 6, temperature=0.0)
    compare([[7] * 16] * 4, 2, 16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    compare(PROMPTS, 2, 9)
    model.load_state_dict({name: weight * 0.9 for name, weight in model.state_dict().items()}, assign=True)
    compare(PROMPTS, 2, 7)
    assert len(graphs) == 1


def test_a_model_that_is_not_compiled_runs_and_says_so(model_folders, tokenizer, graphs):
    model = load_causal_lm(model_folders["gpt2"], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    noise = sampling_uniforms(3, 5, 0)
    with pytest.warns(UserWarning, match="generator.compile: .*GPT2LMHeadModel is none of"):
        mine = CachedGenerator(compile=True).generate(
            model, PromptBatch.from_tokens(ids, mask), SamplingParams(5), noise
        )
    assert torch.equal(
        mine.response_ids,
        CachedGenerator().generate(model, PromptBatch.from_tokens(ids, mask), SamplingParams(5), noise).response_ids,
    )
    assert not graphs
