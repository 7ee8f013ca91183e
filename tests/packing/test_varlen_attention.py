"""Attention per sequence: how it is called, when by the kernel, and that without sequences it is sdpa."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, GPTJConfig, LlamaConfig, LlamaForCausalLM

from lit_rlhf.generation.llama_decoder import fast_decode_unsupported_reason
from lit_rlhf.models.loading import compile_blocks
from lit_rlhf.packing import packing_unsupported_reason, varlen_inputs, varlen_unsupported_reason
from lit_rlhf.packing.attention_masks import VARLEN_SDPA
from lit_rlhf.packing.varlen_attention import can_use_varlen_kernel
from tests.helpers.varlen_kernel import varlen_attn

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def small(**shape: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**HEADS | SMALL | shape)).double().eval()


MODEL = small()


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_logits_match_separate_rows(lengths):
    ids = torch.randint(40, (1, sum(lengths)))
    with torch.no_grad():
        packed = MODEL(ids, use_cache=False, **varlen_inputs(MODEL, tuple(lengths), ids.device)).logits
        separate = torch.cat([MODEL(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert_close(packed, separate, rtol=1e-6, atol=1e-6)  # the norms of transformers round to float32


def test_the_kernel_is_called_once_per_layer_with_the_same_result(varlen_kernel, monkeypatch):
    calls, kernel = [], torch.nn.attention.varlen.varlen_attn
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda *a, **k: calls.append(a) or kernel(*a, **k))
    test_logits_match_separate_rows()
    calls.clear()
    ids = torch.randint(40, (1, 9))
    MODEL(ids, use_cache=False, **varlen_inputs(MODEL, (4, 1, 4), ids.device))
    assert len(calls) == 2 and [each.shape for each in calls[0][:3]] == [(9, 4, 4), (9, 2, 4), (9, 2, 4)]
    assert calls[0][3].tolist() == calls[0][4].tolist() == [0, 4, 5, 9] and calls[0][5:] == (4, 4)


@torch.library.custom_op("lit_rlhf_tests::varlen_attn", mutates_args=())
def varlen_operator(
    query: Tensor, key: Tensor, value: Tensor, queries: Tensor, keys: Tensor, max_q: int, max_k: int, scale: float
) -> Tensor:
    window = {"scale": scale, "window_size": (-1, 0), "enable_gqa": True}
    return varlen_attn(query, key, value, queries, keys, max_q, max_k, **window)


varlen_operator.register_fake(lambda query, *_: torch.empty_like(query))


def test_compiled_blocks_are_not_compiled_anew_for_other_sequences(varlen_kernel, monkeypatch):
    """As PyTorch's, the kernel is an operator here. Neither lengths nor their number are constants of the code."""
    monkeypatch.setattr(
        torch.nn.attention.varlen, "varlen_attn", lambda *args, scale, **_: varlen_operator(*args, scale)
    )
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch.compiler.reset()
    model, counts = small(), []
    compile_blocks(model)
    for lengths in ((4, 5), (3, 1, 6), (7, 7, 2, 5)):
        ids = torch.randint(40, (1, sum(lengths)))
        inputs = varlen_inputs(model, lengths, ids.device)
        compiled = model(ids, use_cache=False, **inputs).logits
        assert_close(compiled, MODEL(ids, use_cache=False, **inputs).logits, rtol=1e-6, atol=1e-6)
        counts.append(counter.frame_count)
    assert 0 < counts[0] == counts[-1]


def test_dropout_is_left_to_attention_per_sequence(varlen_kernel, monkeypatch):
    """The kernel has none."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", None)
    model, ids = small(attention_dropout=0.5).train(), torch.randint(40, (1, 9))
    inputs = varlen_inputs(model, (4, 5), ids.device)
    assert not torch.equal(model(ids, **inputs).logits, model(ids, **inputs).logits)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is said to be an H200."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return torch.device("cuda")


def test_the_kernel_is_chosen_on_a_gpu_in_half_precision(gpu, monkeypatch):
    model = small(num_attention_heads=2, num_key_value_heads=1).bfloat16()
    assert can_use_varlen_kernel(model, gpu) and can_use_varlen_kernel(model.half(), gpu)
    assert not can_use_varlen_kernel(model, torch.device("cpu"))
    assert not can_use_varlen_kernel(model.float(), gpu)
    for enabled in ([True], [False]):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _, enabled=enabled: enabled[0])
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
        assert can_use_varlen_kernel(model.float(), gpu) is enabled[0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    assert not can_use_varlen_kernel(model.half(), gpu)


def test_the_kernel_is_not_chosen_for_heads_that_it_does_not_compute(gpu):
    assert not can_use_varlen_kernel(small().bfloat16(), gpu), "heads of 4"
    assert not can_use_varlen_kernel(small(head_dim=264).bfloat16(), gpu)
    assert can_use_varlen_kernel(small(head_dim=256).bfloat16(), gpu)
    config = DeepseekV3Config(**SMALL, num_attention_heads=2, num_key_value_heads=2, first_k_dense_replace=2)
    assert not can_use_varlen_kernel(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), gpu)
    gptj = GPTJConfig(vocab_size=40, n_embd=128, n_layer=1, n_head=2, rotary_dim=8)
    assert not can_use_varlen_kernel(AutoModelForCausalLM.from_config(gptj, dtype=torch.half), gpu)


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


def test_a_layer_that_drops_the_sequences_raises(monkeypatch):
    model, ids = small(), torch.randint(40, (1, 9))
    inputs = varlen_inputs(model, (4, 5), ids.device)
    del inputs["sequences"]
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        model(ids, use_cache=False, **inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"])
def test_without_sequences_it_is_sdpa(name, model_folders):
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
