"""What ends a response: end tokens, stop token ids, stop strings; the same in every generator."""

import pytest
import torch

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, HuggingFaceGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.generation.stopping import StoppingCriteria, stop_string_matcher, stop_token_ids
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4], [20, 21, 22, 23]]
GENERATORS = [CachedGenerator(), CachedGenerator(batch_size=3), HuggingFaceGenerator()]
FOR_EACH_GENERATOR = pytest.mark.parametrize(
    "generator", GENERATORS, ids=["cached", "cached in chunks", "transformers"]
)


@pytest.fixture
def model(model_folders, tokenizer):
    return load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig()).eval()


def generate(generator, model, tokenizer, sampling, num_samples=1, seed=2):
    """Return responses as lists of ids, and which of them finished."""
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    uniforms = sampling_uniforms(len(PROMPTS) * num_samples, sampling.max_new_tokens, seed)
    output = generator.generate(
        model, PromptBatch.from_tokens(ids, mask), sampling, uniforms, stop_string_matcher(tokenizer, sampling)
    )
    responses = [row[real].tolist() for row, real in zip(output.response_ids, output.response_mask)]
    assert (output.response_ids[~output.response_mask] == tokenizer.pad_token_id).all()
    assert (output.logprobs[~output.response_mask] == 0).all()
    return responses, output.finished.tolist()


@FOR_EACH_GENERATOR
def test_a_response_ends_with_the_first_stop_token(generator, model, tokenizer):
    full, _ = generate(HuggingFaceGenerator(), model, tokenizer, SamplingParams(14))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, full[0][3]]
    sampling = SamplingParams(14, stop_token_ids=[full[1][4], full[4][0]])
    responses, finished = generate(generator, model, tokenizer, sampling)
    stops = {tokenizer.eos_token_id, full[0][3], full[1][4], full[4][0]}
    for response, full_response, is_finished in zip(responses, full, finished):
        first = next((index for index, token in enumerate(full_response) if token in stops), None)
        assert response == (full_response if first is None else full_response[: first + 1])
        assert is_finished == (first is not None)
    assert finished[0] and finished[1] and responses[4] == full[4][:1]


@FOR_EACH_GENERATOR
def test_a_response_ends_with_the_token_that_completes_a_stop_string(generator, model, tokenizer):
    full, _ = generate(HuggingFaceGenerator(), model, tokenizer, SamplingParams(14))
    pair = tokenizer.decode(full[0][2:4])  # two words with the space between: no token of its own
    sampling = SamplingParams(14, stop_strings=[pair, "no such words"])
    responses, finished = generate(generator, model, tokenizer, sampling)
    assert responses[0] == full[0][:4] and finished[0]
    for response, full_response in zip(responses[1:], full[1:]):
        text = tokenizer.decode(full_response, skip_special_tokens=True)
        assert response == full_response or (pair in text and pair in tokenizer.decode(response))


@FOR_EACH_GENERATOR
def test_several_samples_are_those_of_repeated_prompts(generator, model, tokenizer):
    sampling = SamplingParams(9, 1.2)
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    uniforms = sampling_uniforms(15, 9, 4)
    samples = generator.generate(model, PromptBatch.from_tokens(ids, mask), sampling, uniforms)
    repeated = HuggingFaceGenerator().generate(
        model, PromptBatch.from_tokens(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)), sampling, uniforms
    )
    assert torch.equal(samples.response_ids, repeated.response_ids)
    assert torch.equal(samples.response_mask, repeated.response_mask)
    torch.testing.assert_close(samples.logprobs, repeated.logprobs, atol=1e-5, rtol=1e-5)
    assert not torch.equal(samples.response_ids[0], samples.response_ids[1])


@FOR_EACH_GENERATOR
def test_filtered_sampling_is_the_same_in_every_generator(generator, model, tokenizer):
    sampling = SamplingParams(10, 0.9, top_k=8, top_p=0.9, min_new_tokens=6)
    responses, _ = generate(generator, model, tokenizer, sampling)
    assert responses == generate(HuggingFaceGenerator(), model, tokenizer, sampling)[0]
    assert min(map(len, responses)) >= 6


@FOR_EACH_GENERATOR
def test_the_models_own_generation_config_has_no_effect(generator, model, tokenizer):
    expected, _ = generate(generator, model, tokenizer, SamplingParams(10))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert generate(generator, model, tokenizer, SamplingParams(10))[0] == expected
    assert model.generation_config.repetition_penalty == 5.0, "it was not restored"


def test_the_end_tokens_of_a_chat_model_survive_loading(model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    model.save_pretrained(tmp_path)
    again = load_causal_lm(str(tmp_path), tokenizer, ModelLoadingConfig())
    assert stop_token_ids(again, SamplingParams(stop_token_ids=[7])).tolist() == sorted({tokenizer.eos_token_id, 7, 9})
    model.generation_config.eos_token_id = [11, 12]  # of another tokenizer
    model.save_pretrained(tmp_path)
    again = load_causal_lm(str(tmp_path), tokenizer, ModelLoadingConfig())
    assert stop_token_ids(again, SamplingParams()).tolist() == [tokenizer.eos_token_id]


def test_unknown_stop_tokens_and_strings_without_a_tokenizer_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="stop_token_ids: 999 is not in the model's vocabulary of"):
        stop_token_ids(model, SamplingParams(stop_token_ids=[999]))
    with pytest.raises(UserError, match="no tokenizer here to find them with"):
        StoppingCriteria(model, SamplingParams(stop_strings=["x"]))


def test_a_stop_string_is_found_across_special_tokens(tokenizer):
    matcher = stop_string_matcher(tokenizer, SamplingParams(stop_strings=["w1 w2"]))
    to_id = tokenizer.convert_tokens_to_ids
    assert matcher is not None
    rows = [
        [to_id("w1"), tokenizer.pad_token_id, to_id("w2")],
        [to_id("w2"), to_id("w1"), to_id("w1")],
        [to_id("w0"), to_id("w1"), to_id("w2")],
    ]
    assert matcher(torch.tensor(rows)).tolist() == [True, False, True]
