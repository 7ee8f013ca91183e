"""Attention per sequence: how it is called, and that without sequence lengths it is sdpa."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, GPTJConfig, LlamaConfig, LlamaForCausalLM

from lit_rlhf.generation.llama_decoder import fast_decode_unsupported_reason
from lit_rlhf.packing import packing_unsupported_reason, varlen_inputs, varlen_unsupported_reason
from lit_rlhf.packing.attention_masks import VARLEN_SDPA

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def small(**shape: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, **shape)).double().eval()


MODEL = small()


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_logits_match_separate_rows(lengths):
    ids = torch.randint(40, (1, sum(lengths)))
    with torch.no_grad():
        packed = MODEL(ids, use_cache=False, **varlen_inputs(MODEL, tuple(lengths), ids.device)).logits
        separate = torch.cat([MODEL(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert_close(packed, separate, rtol=1e-6, atol=1e-6)  # the norms of transformers round to float32


def test_attention_is_called_once_per_sequence_without_a_mask(monkeypatch):
    model, calls = small(), []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, attn_mask=None, **kwargs):
        calls.append((query.shape[2], key.shape[2], attn_mask, kwargs["is_causal"]))
        return sdpa(query, key, value, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    ids = torch.randint(40, (1, 9))
    model(ids, use_cache=False, **varlen_inputs(model, (4, 1, 4), ids.device))
    assert calls == [(4, 4, None, True), (1, 1, None, False), (4, 4, None, True)] * 2


def test_a_layer_that_drops_the_sequence_lengths_raises(monkeypatch):
    model, ids = small(), torch.randint(40, (1, 9))
    inputs = varlen_inputs(model, (4, 5), ids.device)
    del inputs["sequence_lengths"]
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        model(ids, use_cache=False, **inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"])
def test_without_sequence_lengths_it_is_sdpa(name, model_folders):
    plain, other = (AutoModelForCausalLM.from_pretrained(model_folders[name]).eval() for _ in range(2))
    varlen_inputs(other, (1,), torch.device("cpu"))
    assert other.config._attn_implementation == VARLEN_SDPA
    ids, mask = torch.randint(2, 30, (3, 8)), torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = mask[1, :3] = 0
    with torch.no_grad():
        assert torch.equal(
            plain(ids, attention_mask=mask).logits[mask > 0], other(ids, attention_mask=mask).logits[mask > 0]
        )
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask.flip(1), "pad_token_id": 0}
        assert torch.equal(plain.generate(ids, **options), other.generate(ids, **options))
    # a callback's samples are decoded by the same code as before
    assert fast_decode_unsupported_reason(other) == fast_decode_unsupported_reason(plain)
    assert packing_unsupported_reason(other.config, 8) is None


def test_the_attention_implementation_is_not_saved_with_the_model(tmp_path):
    model = small()
    varlen_inputs(model, (1,), torch.device("cpu"))
    model.save_pretrained(tmp_path)
    assert VARLEN_SDPA not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_unsupported_attention_is_refused(model_folders):
    config = AutoConfig.from_pretrained(model_folders["llama"])
    assert varlen_unsupported_reason(config, 10**6, "sdpa") is None
    assert "set model.loading.attn_implementation to 'sdpa'" in varlen_unsupported_reason(config, 8, "eager")
    assert packing_unsupported_reason(GPTJConfig(), 8, "sdpa") is None
    assert "gptj has an attention of its own" in varlen_unsupported_reason(GPTJConfig(), 8, "sdpa")
