"""Exported folders in plain transformers, on six architectures."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import ModelLoadingConfig
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
