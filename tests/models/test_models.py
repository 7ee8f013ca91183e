"""Loading, the scalar head, adapters and export, on six architectures, against plain transformers."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left, pad_right
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter, add_lora, has_adapter
from lit_rlhf.models.scalar_model import load_scalar_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
ROWS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_policy_gives_the_same_logits_in_plain_transformers(name, model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig())
    export_model(model, tokenizer, tmp_path)
    ids, mask = pad_right(ROWS, 0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits, model.eval()(ids, attention_mask=mask).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_reward_model_gives_the_same_scores_in_plain_transformers(name, model_folders, tokenizer, tmp_path):
    model = load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_right(ROWS, tokenizer.pad_token_id)
    raw = model.score(ids, mask)
    model.center(0.25, 2.0)
    export_model(model, tokenizer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits.squeeze(1), raw, atol=1e-5, rtol=1e-5)
    again = load_scalar_model(str(tmp_path), tokenizer, ModelLoadingConfig()).eval()
    assert again.is_centered and not again.head_is_new
    torch.testing.assert_close(again.score(ids, mask), (raw - 0.25) / 2.0, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_depend_on_neither_padding_nor_batch(name, model_folders, tokenizer):
    model = load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    alone = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in ROWS])
    for pad in (pad_left, pad_right):
        ids, mask = pad(ROWS, tokenizer.pad_token_id)
        torch.testing.assert_close(model.score(ids, mask), alone, atol=1e-5, rtol=1e-5)
        junk = torch.where(mask.bool(), ids, 9)  # what stands in the padding must not matter either
        torch.testing.assert_close(model.score(junk, mask), alone, atol=1e-5, rtol=1e-5)


def test_a_fresh_head_is_drawn_with_deviation_one_over_root_d_plus_one(model_folders, tokenizer):
    heads = torch.cat(
        [
            load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig(), seed).model.score.weight
            for seed in range(40)
        ]
    )
    expected = 1 / math.sqrt(33)
    assert abs(heads.std() - expected) < 4 * expected / math.sqrt(2 * heads.numel())
    again = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig(), 3).model.score.weight
    assert torch.equal(again, heads[3:4])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_merges_exactly(name, model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig())
    ids, mask = pad_right(ROWS, 0)
    before = model.eval()(ids, attention_mask=mask).logits
    add_lora(model, LoRA(rank=2))
    torch.testing.assert_close(model.eval()(ids, attention_mask=mask).logits, before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trained) < 0.5 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0, 0.1)
    after = model(ids, attention_mask=mask).logits
    assert (after - before).abs().max() > 1e-2
    with active_adapter(model, None):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, before)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, after)
    export_model(model, tokenizer, tmp_path)
    assert has_adapter(model), "the live model keeps its adapter"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits, after, atol=1e-4, rtol=1e-4)


def test_the_score_head_is_trained_beside_the_adapter(model_folders, tokenizer):
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig())
    add_lora(model.model, LoRA(rank=2))
    assert model.model.score.weight.requires_grad
    assert not model.model.model.embed_tokens.weight.requires_grad


def test_dropout_goes_to_the_residual_stream_alone(model_folders, tokenizer):
    config = load_causal_lm(model_folders["gpt2"], tokenizer, ModelLoadingConfig(), dropout=0.2).config
    assert (config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (0.2, 0.0, 0.0)
    with pytest.raises(UserError, match="llama has no residual dropout"):
        load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig(), dropout=0.2)


def test_padding_must_differ_from_the_end_token(model_folders, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folders["gpt2"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    shared = AutoTokenizer.from_pretrained(tmp_path)
    shared.pad_token = shared.eos_token
    shared.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"set model\.loading\.pad_token"):
        load_tokenizer(str(tmp_path), ModelLoadingConfig())
    loading = ModelLoadingConfig(pad_token="<|pad|>")
    mended = load_tokenizer(str(tmp_path), loading)
    assert mended.pad_token_id == len(tokenizer) != mended.eos_token_id
    grown = load_causal_lm(str(tmp_path), mended, loading)
    assert grown.get_input_embeddings().num_embeddings == len(tokenizer) + 1 == grown.config.vocab_size
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(grown.eval()(ids).logits[..., :-1], model.eval()(ids).logits)


def test_a_vocabulary_that_is_too_small_is_refused(model_folders, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model.save_pretrained(tmp_path)
    bigger = AutoTokenizer.from_pretrained(model_folders["llama"])
    bigger.add_tokens(["new", "newer"])
    bigger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="34 tokens, but a vocabulary of 32"):
        load_causal_lm(str(tmp_path), load_tokenizer(str(tmp_path), ModelLoadingConfig()), ModelLoadingConfig())


def test_a_missing_folder_is_named_with_its_nearest_neighbour(model_folders):
    with pytest.raises(UserError, match=r"no folder.*did you mean"):
        load_tokenizer(model_folders["llama"] + "x", ModelLoadingConfig())
