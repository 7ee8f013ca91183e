"""Which architectures of transformers keep the sequences of a row apart; found by comparison, not from their code.

`tests/packing/test_architectures.py` builds the causal language models of transformers with random weights, and
compares packed rows, shared prompts and padding with sequences computed alone.
"""

import inspect

from transformers import MODEL_MAPPING, PretrainedConfig, PreTrainedModel

_NAMES = """
    afmoe apertus arcee aria_text axk1 beam biogpt bitnet codegen cohere cohere2 cohere2_moe ctrl cwm
    deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo flint gemma
    gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoeshared helium
    hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jetmoe kolibri1
    laguna lfm2 llama mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral
    mixtral modernbert-decoder moshi nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe
    qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
"""
CHECKED_ARCHITECTURES = frozenset(_NAMES.split())
"""Architectures (`model_type`) whose attention depends on a four-dimensional mask and position ids, not on columns.

The local attention of GPT-Neo and the attention bias of MPT depend on columns. Others than these are computed in plain
rows, so a missing name costs time alone.
"""
CONTINUES_A_CACHE = CHECKED_ARCHITECTURES | {"bloom"}
"""Architectures that compute the same from the keys and values of a prompt."""
DROPS_SEQUENCES = {"nemotron"}
"""Architectures whose layers do not pass their keyword arguments on to attention."""
_COUNTS_BY_MASK = {"bloom", "cpmant", "falcon_mamba", "mamba", "mamba2", "mpt", "roformer"}
"""Architectures without position ids that compute the same with padding on the left."""
_STATELESS_LAYERS = {"full_attention", "sliding_attention"}


def architecture_unsupported_reason(config: PretrainedConfig, checked: frozenset[str]) -> str | None:
    """Return why tokens of other segments could change what a model computes of a segment, or None.

    Args:
        config: Its text configuration.
        checked: The architectures that were compared with plain rows.
    """
    name = config.model_type
    if type(config) not in MODEL_MAPPING:
        return f"{name} is no architecture of transformers itself, and how its code uses an attention mask is unknown"
    if has_stateful_layers(config, MODEL_MAPPING[type(config)]):
        return f"{name} has layers that carry a state over every token before, whatever the attention mask"
    if name not in checked:
        return f"{name} is not among the architectures that were checked to apply attention masks and position ids"
    if getattr(config, "use_bidirectional_attention", False):
        return f"{name} with use_bidirectional_attention is not causal"
    return None


def left_padding_unsupported_reason(config: PretrainedConfig) -> str | None:
    """Return why a model would compute something else with padding on the left, as prompts have it, or None."""
    config = config.get_text_config()
    if type(config) not in MODEL_MAPPING or config.model_type in _COUNTS_BY_MASK:
        return None
    if "position_ids" in inspect.signature(MODEL_MAPPING[type(config)].forward).parameters:
        return None
    return f"{config.model_type} takes no position_ids and counts the padding on the left of a prompt"


def has_stateful_layers(config: PretrainedConfig, architecture: type[PreTrainedModel]) -> bool:
    """Whether a model has layers other than attention that mix tokens, such as those of Mamba.

    Args:
        config: Its text configuration.
        architecture: Its class.
    """
    return architecture._is_stateful or bool(set(getattr(config, "layer_types", None) or ()) - _STATELESS_LAYERS)
