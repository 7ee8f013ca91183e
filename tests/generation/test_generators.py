"""Engines: the same draws from the same noise, greedy text equal to transformers' own, exact probabilities."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, HuggingFaceGenerator
from lit_rlhf.generation.kv_cache import DecodeBatch, DynamicCacheBatch, StaticCacheBatch, make_decode_batch
from lit_rlhf.generation.llama_decoder import LlamaDecodeBatch
from lit_rlhf.generation.sampling import SamplingParams, sample_tokens, sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.rollout.forward_passes import map_in_chunks, response_logprobs

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
NO_ENDS = torch.zeros(0, dtype=torch.long)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engines_draw_the_same_and_report_the_log_probs_of_a_plain_forward(name, model_folders, tokenizer):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.3)
    noise = sampling_uniforms(len(PROMPTS), 12, 3)
    ours = CachedGenerator(batch_size=2).generate(model, PromptBatch.from_tokens(ids, mask), sampling, noise)
    theirs = HuggingFaceGenerator().generate(model, PromptBatch.from_tokens(ids, mask), sampling, noise)
    assert torch.equal(ours.response_ids, theirs.response_ids)
    assert torch.equal(ours.response_mask, theirs.response_mask)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=2e-5, rtol=1e-5)
    assert ours.finished.any() or name != "llama"
    for row, prompt in enumerate(PROMPTS):  # one row at a time, without any padding
        response = ours.response_ids[row][ours.response_mask[row]]
        logits = model(torch.tensor([prompt + response.tolist()])).logits[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits / 1.3, -1).gather(1, response[:, None]).squeeze(1)
        torch.testing.assert_close(ours.logprobs[row][ours.response_mask[row]].double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_text_is_that_of_transformers(name, model_folders, tokenizer):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    ours = CachedGenerator().generate(
        model, PromptBatch.from_tokens(ids, mask), SamplingParams(10, temperature=0.0), sampling_uniforms(5, 10, 0)
    )
    theirs = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(ours.response_ids[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scoring_in_chunks_equals_sampling(name, model_folders, tokenizer):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    rollout = CachedGenerator().generate(
        model, PromptBatch.from_tokens(ids, mask), SamplingParams(9, temperature=0.7), sampling_uniforms(5, 9, 1)
    )
    all_ids = torch.cat([ids, rollout.response_ids], 1)
    all_mask = torch.cat([mask, rollout.response_mask.long()], 1)
    again = map_in_chunks(
        lambda i, m, w: response_logprobs(model, i, m, w, SamplingParams(9, 0.7)), all_ids, all_mask, 9, batch_size=2
    )
    torch.testing.assert_close(again * rollout.response_mask, rollout.logprobs, atol=2e-5, rtol=1e-5)


def test_a_response_does_not_depend_on_its_batch(model_folders, tokenizer):
    model = load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    noise = sampling_uniforms(5, 16, 7)
    together = CachedGenerator().generate(model, PromptBatch.from_tokens(ids, mask), SamplingParams(16), noise)
    for row in range(5):
        alone = CachedGenerator().generate(
            model,
            PromptBatch.from_tokens(ids[row : row + 1], mask[row : row + 1]),
            SamplingParams(16),
            noise[row : row + 1],
        )
        assert torch.equal(alone.response_ids[0], together.response_ids[row])


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]]).expand(60_000, -1)
    tokens, logprobs = sample_tokens(
        logits, sampling_uniforms(60_000, 1, 0).squeeze(1), SamplingParams(temperature=0.5), 0, NO_ENDS
    )
    expected = torch.softmax(logits[0].double() / 0.5, -1)
    observed = torch.bincount(tokens, minlength=5) / 60_000
    assert observed[2] == 0
    assert (observed - expected).abs().max() < 4 * 0.5 / 60_000**0.5
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-6, rtol=1e-6)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10_000))
def test_never_a_token_of_probability_zero(uniform, seed):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed))
    logits[0, ::2] = -torch.inf
    token, _ = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), SamplingParams(), 0, NO_ENDS)
    assert int(token) % 2 == 1


@given(st.integers(1, 200), st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_the_first_token_whose_cumulative_probability_exceeds_the_uniform(size, seed, uniform):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 3
    token, logprob = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), SamplingParams(), 0, NO_ENDS)
    probabilities = torch.softmax(logits[0].double(), -1)
    cumulative = probabilities.cumsum(-1)
    assert float(cumulative[token]) > uniform - 1e-6
    assert float(cumulative[token] - probabilities[token]) < uniform + 1e-6
    assert float(logprob) == pytest.approx(float(probabilities[token].log()), abs=2e-6)


@pytest.mark.parametrize(("size", "last"), [(64, 63), (130, 129), (130, 5)])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_the_only_possible_token_is_drawn_at_every_uniform(size, last, uniform):
    logits = torch.full((2, size), -torch.inf)
    logits[:, last] = 3.0
    tokens, logprobs = sample_tokens(
        logits, torch.full((2,), uniform, dtype=torch.float64), SamplingParams(), 0, NO_ENDS
    )
    assert tokens.tolist() == [last, last] and logprobs.tolist() == [0.0, 0.0]


def chosen_rows(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, samples: int, length: int
) -> DecodeBatch:
    """What the engine decodes, as it chooses."""
    return make_decode_batch(
        model, ids, mask, samples, length, CachedGenerator()._build_fast_decoder(model, ids.shape[1] + length)
    )


def test_models_that_slide_or_keep_a_state_decode_from_a_growing_cache(model_folders, tokenizer):
    """And every other one from memory that is set aside once."""
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    for name in ARCHITECTURES:
        model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
        kind = LlamaDecodeBatch if name in ("llama", "qwen2") else StaticCacheBatch
        assert isinstance(chosen_rows(model, ids, mask, 1, 4), kind), name
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(**small, **heads, sliding_window=6)).eval()
    assert isinstance(chosen_rows(sliding, ids, mask, 1, 1), LlamaDecodeBatch), "the window is never left"
    assert isinstance(chosen_rows(sliding, ids, mask, 1, 12), DynamicCacheBatch)
    noise = sampling_uniforms(10, 12, 3)
    ours = CachedGenerator(batch_size=4).generate(
        sliding, PromptBatch.from_tokens(ids, mask), SamplingParams(12), noise
    )
    theirs = HuggingFaceGenerator().generate(sliding, PromptBatch.from_tokens(ids, mask), SamplingParams(12), noise)
    assert torch.equal(ours.response_ids, theirs.response_ids)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_that_end_leave_no_trace(name, samples, model_folders, tokenizer):
    """Rows end at different steps and the last ones take their places; what remains is a plain forward pass."""
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    prompts = PROMPTS * (2 // samples)
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)
    batch = chosen_rows(model, ids, mask, samples, 6)
    tokens = torch.randint(2, 20, (10, 6), generator=torch.Generator().manual_seed(3))
    rows, logits = torch.arange(10), batch.prefill()
    left = set(range(10))
    for step, gone in enumerate([[0, 9], [], [1, 2, 3], [4], [5, 6]]):
        left -= set(gone)
        going = ~torch.isin(rows, torch.tensor(gone, dtype=torch.long))
        rows = rows[batch.compact(going)]
        assert set(rows.tolist()) == left and len(rows) == len(left)
        logits = batch.step(tokens[rows, step])
        for row, mine in zip(rows.tolist(), logits):
            whole = torch.tensor([prompts[row // samples] + tokens[row, : step + 1].tolist()])
            torch.testing.assert_close(mine, model(whole).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_noise_depends_on_the_place_alone():
    assert torch.equal(sampling_uniforms(4, 3, 1, 2, 0), sampling_uniforms(4, 3, 1, 2, 0))
    assert torch.equal(sampling_uniforms(4, 3, 1, 2, 0)[:2], sampling_uniforms(8, 3, 1, 2, 0)[:2])
    for other in [(2, 2, 0), (1, 3, 0), (1, 2, 1)]:
        assert not torch.equal(sampling_uniforms(4, 3, 1, 2, 0), sampling_uniforms(4, 3, *other))
