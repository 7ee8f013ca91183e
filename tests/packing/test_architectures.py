"""Packed and shared rows equal sequences alone in every checked causal language model of transformers.

The others are left to plain rows, for a reason. Windows and chunks of attention are shorter than a packed row here, and
not shorter than a sequence: a local attention that counts columns would show.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right, position_ids
from lit_rlhf.generation import CachedGenerator, HuggingFaceGenerator
from lit_rlhf.packing.architectures import (
    CHECKED_ARCHITECTURES,
    CONTINUES_A_CACHE,
    architecture_unsupported_reason,
    left_padding_unsupported_reason,
)
from lit_rlhf.packing.attention_masks import packed_model_inputs, packing_unsupported_reason
from lit_rlhf.packing.packed_batch import pack_batch
from lit_rlhf.packing.rankings import (
    RankingInputs,
    last_hidden_with_prefix_cache,
    prefix_sharing_unsupported_reason,
)
from lit_rlhf.packing.varlen_attention import varlen_unsupported_reason
from tests.helpers.varlen_kernel import use_reference_kernel

CONFIGS: dict[str, type[PretrainedConfig]] = {each.model_type: each for each in MODEL_FOR_CAUSAL_LM_MAPPING}
BIDIRECTIONAL = {"use_bidirectional_attention": True}
SIZES = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 40),
    **dict.fromkeys(["hidden_size", "d_model", "word_embed_proj_dim", "embedding_size"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"], 48),
    **dict.fromkeys(["ffn_hidden_size", "mlp_hidden_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "decoder_layers", "encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k"], 2),
    **dict.fromkeys(["head_dim", "kv_lora_rank", "q_lora_rank", "v_head_dim", "hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "state_size"], 4),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "bos_token_id"], 1),
    **dict.fromkeys(["index_head_dim", "index_topk"], 8),
    **{"pad_token_id": 0, "eos_token_id": 2, "num_kv_shared_layers": 0, "index_n_heads": 2, "mlp_dim": 48},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 30},
    "mamba2": {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 1,
    },
    "falcon": {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma4_text": {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")},
}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "keep_window_size")


def draw_tokens(generator: torch.Generator, *lengths: int) -> Iterator[list[int]]:
    for length in lengths:
        yield torch.randint(4, 40, (length,), generator=generator).tolist()


# 29 tokens in the longest sequence, 49 in the packed row
PROMPT, LONG, SHORT, OTHER = draw_tokens(torch.Generator().manual_seed(0), 9, 20, 5, 12)


def small_config(name: str, **settings: Any) -> PretrainedConfig:
    """Return the configuration of an architecture with small sizes, of those that it has, and small windows."""
    config_class = CONFIGS[name]
    if name in SPECIAL:
        return config_class(**SPECIAL[name] | settings)
    default = config_class()
    sizes = {size: value for size, value in SIZES.items() if hasattr(default, size)}
    if "qk_rope_head_dim" in sizes:  # the size of a head follows from it
        sizes = {size: value for size, value in sizes.items() if size not in ("head_dim", "num_key_value_heads")}
    windows = {window: 30 for window in WINDOWS if isinstance(getattr(default, window, None), int)}
    return config_class(**sizes | windows | settings)


def build(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model with sharp random weights, so that differences show."""
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except ValueError:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model.float().eval()


def logits_alone(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def varlen_error(model: PreTrainedModel) -> float:
    """Return the largest relative error of a row of sequences: one, and a prompt with two responses."""
    sequences = [OTHER, PROMPT + LONG, PROMPT + SHORT]
    ids, mask = pad_right([[0] * (9 - prompt) + each for prompt, each in zip((1, 9, 9), sequences)], 0)
    mask[0, :8] = 0
    batch = pack_batch(ids, mask, 20, model)
    assert batch.sequences is not None and batch.sequences.lengths == [12, 29, 5]
    packed = model(**batch.model_inputs, use_cache=False).logits[0]
    other, long, short = (logits_alone(model, each) for each in sequences)
    expected = torch.cat([other, long, short[len(PROMPT) :]])
    return float((packed - expected).abs().max() / expected.abs().max())


def packed_error(model: PreTrainedModel) -> float:
    """Return the largest relative error of a row with a sequence, a prompt and two responses, and padding."""
    lengths = [len(OTHER), len(PROMPT), len(LONG), len(SHORT)]
    segment = torch.tensor([number for number, length in enumerate([*lengths, 3], 1) for _ in range(length)])[None] % 5
    parent = torch.where(segment > 2, 2, -1)
    inputs = packed_model_inputs(segment, parent, model.config._attn_implementation)
    ids = torch.tensor([[*OTHER, *PROMPT, *LONG, *SHORT, 0, 0, 0]])
    packed = model(input_ids=ids, use_cache=False, **inputs).logits[0, :-3]
    long, short = (logits_alone(model, PROMPT + response) for response in (LONG, SHORT))
    expected = torch.cat([logits_alone(model, OTHER), long, short[len(PROMPT) :]])
    return float((packed - expected).abs().max() / expected.abs().max())


def shared_error(model: PreTrainedModel) -> float:
    """Return the largest relative error of last hidden states that continue a prompt's keys and values."""
    rows = [(PROMPT, LONG), (PROMPT, SHORT), (OTHER, LONG), (OTHER, SHORT)]
    ids, mask = pad_right([prompt + completion for prompt, completion in rows], 0)
    lengths = torch.tensor([len(prompt) for prompt, _ in rows])
    hidden = last_hidden_with_prefix_cache(model, RankingInputs(ids, mask, lengths, torch.tensor([0, 0, 1, 1])))
    each = [model.base_model(torch.tensor([prompt + c]), use_cache=False)[0][0, -1] for prompt, c in rows]
    return float((hidden - torch.stack(each)).abs().max() / torch.stack(each).abs().max())


def left_padded_error(model: PreTrainedModel) -> float:
    """Return the largest relative error of a row with padding on the left."""
    ids = torch.tensor([[0] * 7 + OTHER])
    mask = (torch.arange(ids.shape[1]) >= 7).long()[None]
    padded = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits[0, 7:]
    expected = logits_alone(model, OTHER)
    return float((padded - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", sorted(CONTINUES_A_CACHE))
@torch.no_grad()
def test_checked_architectures_compute_packed_and_shared_rows_as_sequences_alone(name, varlen_kernel):
    model = build(small_config(name))
    assert packing_unsupported_reason(model.config, len(PROMPT + LONG)) is None or name not in CHECKED_ARCHITECTURES
    if name in CHECKED_ARCHITECTURES:
        assert packed_error(model) < 1e-5
    assert shared_error(model) < 1e-5
    if varlen_unsupported_reason(model.config, len(PROMPT + LONG)) is None:
        assert varlen_error(model) < 1e-5


def test_most_checked_architectures_take_sequences():
    configs = [small_config(name) for name in CHECKED_ARCHITECTURES]
    assert sum(varlen_unsupported_reason(config, 29, "sdpa") is None for config in configs) > 60


@torch.no_grad()
def test_layers_that_drop_the_sequences_are_refused(monkeypatch):
    model = build(small_config("nemotron"))
    assert "layers of nemotron do not tell" in varlen_unsupported_reason(model.config, 29)
    monkeypatch.setattr("lit_rlhf.packing.varlen_attention.DROPS_SEQUENCES", set())
    use_reference_kernel(monkeypatch)
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        varlen_error(model)


def test_other_architectures_are_left_to_plain_rows_for_a_reason():
    # an assistant has no default configuration, and musicgen has two models of text
    omitted = ("gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody")
    others = [name for name in CONFIGS if name not in CHECKED_ARCHITECTURES and name not in omitted]
    assert len(others) > 25
    for name in others:
        config = CONFIGS[name]().get_text_config()
        if config.model_type not in CHECKED_ARCHITECTURES:
            config._attn_implementation = "sdpa"
            assert packing_unsupported_reason(config, 1), name
            assert architecture_unsupported_reason(config, CONTINUES_A_CACHE) or name == "bloom"


@pytest.mark.parametrize(("name", "settings"), [("gpt_neo", {}), ("mpt", {}), ("gemma3_text", BIDIRECTIONAL)])
@torch.no_grad()
def test_the_comparison_shows_what_counts_columns_or_looks_ahead(name, settings):
    """Local attention, an attention bias by column and bidirectional attention: each is refused, and each differs."""
    model = build(small_config(name, **settings))
    assert packing_unsupported_reason(model.config, 1) and prefix_sharing_unsupported_reason(model)
    assert packed_error(model) > 1e-3


@torch.no_grad()
def test_falcon_with_alibi_shares_prompts_but_no_rows():
    model = build(small_config("falcon", alibi=True))
    assert "falcon with alibi has an attention bias by column" in packing_unsupported_reason(model.config, 1)
    assert prefix_sharing_unsupported_reason(model) is None
    assert shared_error(model) < 1e-5


@pytest.mark.parametrize("name", ["bloom", "cpmant", "falcon_mamba", "mamba", "mamba2", "mpt", "roformer", "llama"])
@torch.no_grad()
def test_padding_on_the_left_changes_nothing_where_it_is_supported(name):
    model = build(small_config(name))
    assert left_padding_unsupported_reason(model.config) is None
    assert left_padded_error(model) < 1e-5


@pytest.mark.parametrize("name", ["bart", "rwkv"])
@torch.no_grad()
def test_architectures_that_count_padding_on_the_left_are_refused(name):
    model = build(small_config(name))
    assert left_padding_unsupported_reason(model.config) == (
        f"{name} takes no position_ids and counts the padding on the left of a prompt"
    )
    assert left_padded_error(model) > 1e-3


@pytest.mark.parametrize("name", ["mamba", "jamba", "qwen3_next"])
def test_cached_generation_refuses_layers_with_a_state(name):
    with pytest.raises(UserError, match=f"{name} has layers with another state; set model.generator to "):
        CachedGenerator().check_model(CONFIGS[name]())
    with pytest.raises(UserError, match="rwkv takes no position_ids"):
        HuggingFaceGenerator().check_model(CONFIGS["rwkv"]())
    CachedGenerator().check_model(CONFIGS["gpt_neo"]())
