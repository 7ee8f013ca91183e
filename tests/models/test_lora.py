"""LoRA adapters on six architectures: a new one changes nothing, a trained one is merged in an export."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter, add_lora, has_adapter
from lit_rlhf.models.scalar_model import load_scalar_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
ROWS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_adapter_changes_nothing_and_a_trained_one_merges_exactly(name, model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig())
    ids, mask = pad_right(ROWS, 0)
    before = model.eval()(ids, attention_mask=mask).logits
    add_lora(model, LoRA(rank=2))
    torch.testing.assert_close(model.eval()(ids, attention_mask=mask).logits, before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 0.5 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in trainable:
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


def test_the_score_head_is_trained_with_the_adapter(model_folders, tokenizer):
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig())
    add_lora(model.model, LoRA(rank=2))
    assert model.model.score.weight.requires_grad
    assert not model.model.model.embed_tokens.weight.requires_grad
