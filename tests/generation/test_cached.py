"""CachedGenerator: its samples do not depend on the batch, compiled or not; which decoder decodes which model."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, GenerationOutput, HuggingFaceGenerator
from lit_rlhf.generation.kv_cache import (
    CompiledCacheBatch,
    DecodeBatch,
    DynamicCacheBatch,
    StaticCacheBatch,
    StaticCacheDecoder,
)
from lit_rlhf.generation.llama_decoder import LlamaDecodeBatch
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.rollout.forward_passes import map_in_chunks, response_logprobs

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
NOT_LLAMA = ["gpt2", "gpt_neox", "opt", "gemma"]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scoring_in_chunks_equals_sampling(name, model_folders, tokenizer):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    output = CachedGenerator().generate(
        model, PromptBatch.from_tokens(ids, mask), SamplingParams(9, temperature=0.7), sampling_uniforms(5, 9, 1)
    )
    all_ids = torch.cat([ids, output.response_ids], 1)
    all_mask = torch.cat([mask, output.response_mask.long()], 1)
    logprobs = map_in_chunks(
        lambda i, m, w: response_logprobs(model, i, m, w, SamplingParams(9, 0.7)), all_ids, all_mask, 9, batch_size=2
    )
    torch.testing.assert_close(logprobs * output.response_mask, output.logprobs, atol=2e-5, rtol=1e-5)


def test_a_response_does_not_depend_on_its_batch(model_folders, tokenizer):
    model = load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    uniforms = sampling_uniforms(5, 16, 7)
    together = CachedGenerator().generate(model, PromptBatch.from_tokens(ids, mask), SamplingParams(16), uniforms)
    for row in range(5):
        alone = CachedGenerator().generate(
            model,
            PromptBatch.from_tokens(ids[row : row + 1], mask[row : row + 1]),
            SamplingParams(16),
            uniforms[row : row + 1],
        )
        assert torch.equal(alone.response_ids[0], together.response_ids[row])


def start_batch(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, num_samples: int, max_new_tokens: int
) -> DecodeBatch:
    """Start a batch of the decoder that the generator chooses."""
    decoder = CachedGenerator().make_decoder(model, ids.shape[1] + max_new_tokens)
    return decoder.start(ids, mask, num_samples, max_new_tokens)


def test_sliding_windows_decode_from_a_dynamic_cache_and_other_models_from_a_static_one(model_folders, tokenizer):
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    for name in ARCHITECTURES:
        model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
        kind = StaticCacheBatch if name in NOT_LLAMA else LlamaDecodeBatch
        assert isinstance(start_batch(model, ids, mask, 1, 4), kind), name
    sliding = make_sliding_window_model(len(tokenizer))
    assert isinstance(start_batch(sliding, ids, mask, 1, 1), LlamaDecodeBatch), "the window covers every sequence"
    assert isinstance(start_batch(sliding, ids, mask, 1, 12), DynamicCacheBatch)
    uniforms = sampling_uniforms(10, 12, 3)
    ours = CachedGenerator(batch_size=4).generate(
        sliding, PromptBatch.from_tokens(ids, mask), SamplingParams(12), uniforms
    )
    theirs = HuggingFaceGenerator().generate(sliding, PromptBatch.from_tokens(ids, mask), SamplingParams(12), uniforms)
    assert torch.equal(ours.response_ids, theirs.response_ids)


def make_sliding_window_model(vocab_size: int) -> MistralForCausalLM:
    torch.manual_seed(0)
    size = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return MistralForCausalLM(MistralConfig(**size, **heads, sliding_window=6)).eval()


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_that_leave_do_not_change_the_others(name, num_samples, model_folders, tokenizer):
    """Rows leave at different steps and the last ones fill the holes; the rest equals a forward pass without cache."""
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    check_compaction(model, tokenizer, num_samples, start_batch)


def check_compaction(model, tokenizer, num_samples, start):
    prompts = PROMPTS * (2 // num_samples)
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)
    batch = start(model, ids, mask, num_samples, 6)
    tokens = torch.randint(2, 20, (10, 6), generator=torch.Generator().manual_seed(3))
    rows, logits = torch.arange(10), batch.prefill()
    remaining = set(range(10))
    for step, leaving in enumerate([[0, 9], [], [1, 2, 3], [4], [5, 6]]):
        remaining -= set(leaving)
        active = ~torch.isin(rows, torch.tensor(leaving, dtype=torch.long))
        rows = rows[batch.compact(active)]
        assert set(rows.tolist()) == remaining and len(rows) == len(remaining)
        logits = batch.step(tokens[rows, step])
        for row, row_logits in zip(rows.tolist(), logits):
            sequence = torch.tensor([prompts[row // num_samples] + tokens[row, : step + 1].tolist()])
            torch.testing.assert_close(row_logits, model(sequence).logits[0, -1], atol=1e-5, rtol=1e-5)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.Graph]:
    """Compiled graphs; run by PyTorch itself after its own passes, because a full compilation takes a minute."""
    compiled: list[torch.fx.Graph] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(graph.graph)
        return aot_eager(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, **how, backend=backend))
    torch.compiler.reset()
    return compiled


def generate(
    generator: CachedGenerator,
    model: PreTrainedModel,
    prompts: list[list[int]],
    num_samples: int,
    sampling: SamplingParams,
) -> GenerationOutput:
    uniforms = sampling_uniforms(len(prompts) * num_samples, sampling.max_new_tokens, 3)
    return generator.generate(model, PromptBatch.from_tokens(*pad_left(prompts, 0)), sampling, uniforms)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_compiled_step_samples_the_same_from_one_graph(name, model_folders, tokenizer, graphs):
    """For all numbers of prompts, samples and remaining rows, all lengths, and weights changed or replaced."""
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    plain, compiled = CachedGenerator(batch_size=8), CachedGenerator(batch_size=8, compile=True)
    lengths: list[list[int]] = []

    def compare(prompts: list[list[int]], num_samples: int, max_new_tokens: int, temperature: float = 1.0) -> None:
        sampling = SamplingParams(max_new_tokens, temperature)
        ours, expected = (generate(each, model, prompts, num_samples, sampling) for each in (compiled, plain))
        assert torch.equal(ours.response_ids, expected.response_ids)
        assert torch.equal(ours.response_mask, expected.response_mask)
        torch.testing.assert_close(ours.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
        lengths.append(expected.response_mask.sum(1).tolist())

    compare(PROMPTS[:1], 1, 5)  # a single row throughout
    compare(PROMPTS[:3], 1, 8)
    compare(PROMPTS[:3] * 4, 1, 12)  # two batches of different width
    compare(PROMPTS[:1], 1, 4)
    compare(PROMPTS[1:3], 4, 6, temperature=0.0)
    compare([[7] * 16] * 4, 2, 16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    compare(PROMPTS[:3], 2, 9)
    model.load_state_dict({name: weight * 0.9 for name, weight in model.state_dict().items()}, assign=True)
    model.tie_weights()
    compare(PROMPTS[:3], 2, 7)
    assert any(len(set(each)) > 1 for each in lengths), "no row left before the others"
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_rows_that_leave_a_compiled_batch_do_not_change_the_others(name, model_folders, tokenizer, graphs):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    generator = CachedGenerator(compile=True)

    def start(model, ids, mask, num_samples, max_new_tokens):
        decoder = generator.make_decoder(model, ids.shape[1] + max_new_tokens)
        assert type(decoder) is StaticCacheDecoder
        batch = decoder.start(ids, mask, num_samples, max_new_tokens)
        assert type(batch) is CompiledCacheBatch
        return batch

    with torch.no_grad():
        for num_samples in (1, 2):
            check_compaction(model, tokenizer, num_samples, start)
    assert len(graphs) == 1


def test_one_generator_compiles_one_step_per_decoder(model_folders, tokenizer, graphs):
    """Alternating models of both decoders, as policy and reference of different architectures would."""
    models = [load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval() for name in ("llama", "gpt2")]
    generator = CachedGenerator(compile=True)
    for _ in range(2):
        for model in models:
            ours, expected = (
                generate(each, model, PROMPTS, 1, SamplingParams(6)) for each in (generator, CachedGenerator())
            )
            assert torch.equal(ours.response_ids, expected.response_ids)
    assert len(graphs) == 2 and len(generator.compiled) == 2


def test_a_model_without_a_static_cache_is_not_compiled_and_a_warning_says_why(tokenizer, graphs):
    model = make_sliding_window_model(len(tokenizer))
    with pytest.warns(UserWarning, match=r"generator\.compile: decoding is not compiled: .* slides over 6 tokens"):
        ours = generate(CachedGenerator(compile=True), model, PROMPTS, 1, SamplingParams(12))
    expected = generate(CachedGenerator(), model, PROMPTS, 1, SamplingParams(12))
    assert torch.equal(ours.response_ids, expected.response_ids)
    assert not graphs
