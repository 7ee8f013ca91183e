"""Where responses end: several end tokens, stop ids, stop strings; the same in every engine."""

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
ENGINES = [CachedGenerator(), CachedGenerator(batch_size=3), HuggingFaceGenerator()]
ENGINE = pytest.mark.parametrize("engine", ENGINES, ids=["cached", "cached in parts", "transformers"])


@pytest.fixture
def model(model_folders, tokenizer):
    return load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig()).eval()


def roll(engine, model, tokenizer, sampling, samples=1, seed=2):
    """Responses as lists of ids, with whether they ended."""
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    noise = sampling_uniforms(len(PROMPTS) * samples, sampling.max_new_tokens, seed)
    rollout = engine.generate(
        model, PromptBatch.from_tokens(ids, mask), sampling, noise, stop_string_matcher(tokenizer, sampling)
    )
    rows = [row[real].tolist() for row, real in zip(rollout.response_ids, rollout.response_mask)]
    assert (rollout.response_ids[~rollout.response_mask] == tokenizer.pad_token_id).all()
    assert (rollout.logprobs[~rollout.response_mask] == 0).all()
    return rows, rollout.ended.tolist()


@ENGINE
def test_a_response_ends_at_any_end_token_and_it_is_part_of_it(engine, model, tokenizer):
    free, _ = roll(HuggingFaceGenerator(), model, tokenizer, SamplingParams(14))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, free[0][3]]
    rows, ended = roll(engine, model, tokenizer, SamplingParams(14, stop_token_ids=[free[1][4], free[4][0]]))
    stops = {tokenizer.eos_token_id, free[0][3], free[1][4], free[4][0]}
    for row, whole, end in zip(rows, free, ended):
        first = next((place for place, token in enumerate(whole) if token in stops), None)
        assert row == (whole if first is None else whole[: first + 1])
        assert end == (first is not None)
    assert ended[0] and ended[1] and rows[4] == free[4][:1]


@ENGINE
def test_a_response_ends_with_the_token_that_completes_a_stop_string(engine, model, tokenizer):
    free, _ = roll(HuggingFaceGenerator(), model, tokenizer, SamplingParams(14))
    pair = tokenizer.decode(free[0][2:4])  # two words with the space between: no token of its own
    rows, ended = roll(engine, model, tokenizer, SamplingParams(14, stop_strings=[pair, "no such words"]))
    assert rows[0] == free[0][:4] and ended[0]
    for row, whole in zip(rows[1:], free[1:]):
        text = tokenizer.decode(whole, skip_special_tokens=True)
        assert row == whole or (pair in text and pair in tokenizer.decode(row))


@ENGINE
def test_several_samples_are_those_of_repeated_prompts(engine, model, tokenizer):
    sampling = SamplingParams(9, 1.2)
    ids, mask = pad_left(PROMPTS, tokenizer.pad_token_id)
    noise = sampling_uniforms(15, 9, 4)
    one = engine.generate(model, PromptBatch.from_tokens(ids, mask), sampling, noise)
    repeated = HuggingFaceGenerator().generate(
        model, PromptBatch.from_tokens(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)), sampling, noise
    )
    assert torch.equal(one.response_ids, repeated.response_ids)
    assert torch.equal(one.response_mask, repeated.response_mask)
    torch.testing.assert_close(one.logprobs, repeated.logprobs, atol=1e-5, rtol=1e-5)
    assert not torch.equal(one.response_ids[0], one.response_ids[1])


@ENGINE
def test_truncated_sampling_draws_alike(engine, model, tokenizer):
    sampling = SamplingParams(10, 0.9, top_k=8, top_p=0.9, min_new_tokens=6)
    rows, _ = roll(engine, model, tokenizer, sampling)
    assert rows == roll(HuggingFaceGenerator(), model, tokenizer, sampling)[0]
    assert min(map(len, rows)) >= 6


@ENGINE
def test_what_a_model_suggests_for_its_generation_plays_no_part(engine, model, tokenizer):
    free, _ = roll(engine, model, tokenizer, SamplingParams(10))
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert roll(engine, model, tokenizer, SamplingParams(10))[0] == free
    assert model.generation_config.repetition_penalty == 5.0, "and it stays as it is"


def test_the_end_tokens_of_a_chat_model_survive_loading(model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig())
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 9]
    model.save_pretrained(tmp_path)
    again = load_causal_lm(str(tmp_path), tokenizer, ModelLoadingConfig())
    assert stop_token_ids(again, SamplingParams(stop_token_ids=[7])).tolist() == sorted({tokenizer.eos_token_id, 7, 9})
    model.generation_config.eos_token_id = [11, 12]  # not this tokenizer's: left behind by another
    model.save_pretrained(tmp_path)
    again = load_causal_lm(str(tmp_path), tokenizer, ModelLoadingConfig())
    assert stop_token_ids(again, SamplingParams()).tolist() == [tokenizer.eos_token_id]


def test_what_cannot_end_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="stop_ids: 999 is not in the model's vocabulary of"):
        stop_token_ids(model, SamplingParams(stop_token_ids=[999]))
    with pytest.raises(UserError, match="nothing here knows their tokens"):
        StoppingCriteria(model, SamplingParams(stop_strings=["x"]))


def test_a_stop_string_is_found_behind_special_tokens(tokenizer):
    ends = stop_string_matcher(tokenizer, SamplingParams(stop_strings=["w1 w2"]))
    words = tokenizer.convert_tokens_to_ids
    assert ends is not None
    rows = [
        [words("w1"), tokenizer.pad_token_id, words("w2")],
        [words("w2"), words("w1"), words("w1")],
        [words("w0"), words("w1"), words("w2")],
    ]
    assert ends(torch.tensor(rows)).tolist() == [True, False, True]
