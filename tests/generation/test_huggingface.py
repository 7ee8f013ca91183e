"""HuggingFaceGenerator: the same responses as CachedGenerator's, and both are those of transformers itself."""

import pytest
import torch

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, HuggingFaceGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_generators_sample_the_same_with_the_log_probs_of_a_forward_pass(name, model_folders, tokenizer):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    sampling = SamplingParams(max_new_tokens=12, temperature=1.3)
    uniforms = sampling_uniforms(len(PROMPTS), 12, 3)
    ours = CachedGenerator(batch_size=2).generate(model, PromptBatch.from_tokens(ids, mask), sampling, uniforms)
    theirs = HuggingFaceGenerator().generate(model, PromptBatch.from_tokens(ids, mask), sampling, uniforms)
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
def test_greedy_responses_are_those_of_transformers(name, model_folders, tokenizer):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    ours = CachedGenerator().generate(
        model, PromptBatch.from_tokens(ids, mask), SamplingParams(10, temperature=0.0), sampling_uniforms(5, 10, 0)
    )
    theirs = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(ours.response_ids[:, : theirs.shape[1]], theirs)
