"""A pass of Llama's blocks over keys and values in memory set aside, without what transformers does around it.

A token of a response costs a small model less than the calls that lead to its matrices. So the blocks are written out
here for the architectures that share them, and all that is called is looked up once a rollout: projections,
feed-forward layers, embeddings and whatever adapters, 4-bit layers or hooks are on these are called as they are, or,
in float32 on a CPU, as products that give the same (`lit_rlhf.generation.prepacked_linear`); norms, rotation and attention are a call
each.

Shapes: `n` rows, `T` new tokens of each, `C` columns that keys are kept for, `M` positions, `H` heads of queries, `K`
of keys, `d` a head's size, `D` the hidden size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from lit_rlhf.generation.prepacked_linear import ConcatLinear, Layer, PrepackedGatedMLP, prepack_linear
from lit_rlhf.packing.attention_masks import VARLEN_SDPA

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # others depend on how long a sequence is


class RopeTables(NamedTuple):
    """The rotary embedding of every position."""

    cos: Tensor  # (M, d)
    sin: Tensor  # (M, d), negative in the first half: what a half turn of the columns is multiplied with


class DecoderLayer(NamedTuple):
    """What is called of a block."""

    input_norm: Any
    qkv_proj: Layer  # (n, T, D) -> (n, T, (H + 2 K) d): queries, keys and values side by side
    o_proj: Layer  # (n, T, H d) -> (n, T, D)
    post_attention_norm: Any
    mlp: Layer  # (n, T, D) -> (n, T, D)
    softmax_scale: float


class LlamaDecoder(NamedTuple):
    """What is called of a model."""

    embed_tokens: Layer
    layers: list[DecoderLayer]
    norm: Any
    lm_head: Layer


def fast_decode_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return why `next_token_logits` would not compute what the model's own forward pass does, or None."""
    name = type(model).__name__  # a sharded model has another: its blocks must be called, to be gathered
    if name not in _ARCHITECTURES or not type(model).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(_ARCHITECTURES)}"
    if model.config._attn_implementation not in ("sdpa", VARLEN_SDPA):
        return f"its attention is {model.config._attn_implementation!r} and not 'sdpa'"
    base: Any = model.base_model
    if base.rotary_emb.rope_type not in _FIXED_ROTATIONS:
        return f"its rotary embedding is {base.rotary_emb.rope_type!r}, which depends on the length of a sequence"
    passed_by = [model, base, base.norm, base.rotary_emb]
    for block in base.layers:
        passed_by += [block, block.self_attn, block.input_layernorm, block.post_attention_layernorm]
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in passed_by):
        return "there are hooks on its blocks"
    return None


def is_safe_in_inference_mode(model: PreTrainedModel) -> bool:
    """Whether all layers are known to keep nothing of a pass.

    Quantised ones may prepare their weights in the first, and what inference mode makes is of no use to training.
    """
    return all(type(m).__module__.split(".")[0] in ("torch", "transformers", "peft") for m in model.modules())


def build_decoder(model: PreTrainedModel, prepack: bool) -> LlamaDecoder:
    """Return what is called of the model, for a rollout: with the weights as they are now.

    Args:
        model: one that nothing speaks against (`fast_decode_unsupported_reason`).
        prepack: for passes of few tokens, as a step of a token is: plain layers as `packed` products where it knows them.
    """
    base: Any = model.base_model

    def one(layer: Any) -> Layer:
        return (prepack_linear(layer) if prepack else None) or layer

    blocks = []
    for block in base.layers:
        attention, mlp = block.self_attn, block.mlp
        heads = attention.q_proj, attention.k_proj, attention.v_proj
        blocks.append(
            DecoderLayer(
                block.input_layernorm,
                (prepack_linear(*heads) if prepack else None) or ConcatLinear(*heads),
                one(attention.o_proj),
                block.post_attention_layernorm,
                (PrepackedGatedMLP.from_module(mlp) if prepack else None) or mlp,
                attention.scaling,
            )
        )
    return LlamaDecoder(base.embed_tokens, blocks, base.norm, one(model.get_output_embeddings()))


def build_rope_tables(model: PreTrainedModel, positions: int) -> RopeTables:
    """Return the rotations of the positions below `positions`."""
    base: Any = model.base_model
    like = base.embed_tokens.weight
    cosine, sine = base.rotary_emb(like, torch.arange(positions, device=like.device)[None])
    half = sine.shape[-1] // 2
    return RopeTables(cosine[0], torch.cat([-sine[0, :, :half], sine[0, :, half:]], -1))


def allocate_kv_cache(model: PreTrainedModel, rows: int, columns: int) -> list[Tensor]:
    """Return room for keys and values, of each block (rows, 2 K, columns, d), keys first, not yet filled."""
    base: Any = model.base_model
    attention, like = base.layers[0].self_attn, base.embed_tokens.weight.detach()
    shape = rows, 2 * model.config.num_key_value_heads, columns, attention.head_dim
    return [like.new_empty(shape) for _ in base.layers]


def next_token_logits(
    decoder: LlamaDecoder,
    tokens: Tensor,
    position_ids: Tensor,
    attn_bias: Tensor,
    rope: RopeTables,
    kv_cache: list[Tensor],
) -> Tensor:
    """Return the logits of the token after the last one, (n, V).

    The tokens' keys and values go into the last T of the C columns of `kv_cache`.

    Args:
        decoder: of `build_decoder`.
        tokens: (n, T) int64.
        position_ids: (n, T) int64, of each in its sequence.
        attn_bias: (n, 1, T, C) of the model's type, 0 where a token sees a column and a very low number elsewhere.
        rope: of `build_rope_tables`, for all positions.
        kv_cache: of `allocate_kv_cache`, for n rows and C columns or more.
    """
    x = decoder.embed_tokens(tokens)  # (n, T, D)
    cos_sin = RopeTables(rope.cos[position_ids][:, None], rope.sin[position_ids][:, None])  # (n, 1, T, d) each
    last = len(decoder.layers) - 1
    for number, block in enumerate(decoder.layers):
        # nothing reads what the last block makes of a prompt but its last token
        x = _decoder_layer(block, x, 1 if number == last else tokens.shape[1], cos_sin, kv_cache[number], attn_bias)
    return decoder.lm_head(_norm(decoder.norm, x[:, -1]))


def compile_decode_step() -> Callable[..., Tensor]:
    """Return `next_token_logits` for one new token a row, compiled once for any number of columns and of rows but one.

    Weights are inputs of the compiled code, so it sees every update of them.
    """
    compiled = torch.compile(next_token_logits, fullgraph=True)

    def step(
        decoder: LlamaDecoder,
        tokens: Tensor,
        position_ids: Tensor,
        attn_bias: Tensor,
        rope: RopeTables,
        kv_cache: list[Tensor],
    ) -> Tensor:
        # contiguous at every step: whether they are is a condition of the compiled code
        tokens, position_ids, attn_bias = tokens.contiguous(), position_ids.contiguous(), attn_bias.contiguous()
        for tensor, sizes in ((tokens, [0]), (position_ids, [0]), (attn_bias, [0, 3]), *((part, [0]) for part in rope)):
            torch._dynamo.maybe_mark_dynamic(tensor, sizes)
        for states in kv_cache:
            torch._dynamo.maybe_mark_dynamic(states, [0, 2])
        logits: Tensor = compiled(decoder, tokens, position_ids, attn_bias, rope, kv_cache)
        return logits

    return step


def _decoder_layer(
    layer: DecoderLayer, x: Tensor, num_queries: int, rope: RopeTables, kv_cache: Tensor, attn_bias: Tensor
) -> Tensor:
    """Return the last `num_queries` tokens behind the block, (n, asked, D)."""
    rows, new, columns = *x.shape[:2], attn_bias.shape[-1]
    kv_cache = kv_cache[:rows, :, :columns]
    shared, size = kv_cache.shape[1] // 2, kv_cache.shape[3]  # K and d
    heads = layer.qkv_proj(_norm(layer.input_norm, x)).view(rows, new, -1, size).transpose(1, 2)  # (n, H + 2 K, T, d)
    turned = apply_rotary(heads[:, :-shared], rope)  # (n, H + K, T, d)
    # in one piece: compiled code copies all of the room for every further one
    kv_cache[:, :, columns - new :] = torch.cat([turned[:, -shared:], heads[:, -shared:]], 1)
    keys, values = kv_cache[:, :shared], kv_cache[:, shared:]
    x, query, attn_bias = x[:, -num_queries:], turned[:, :-shared, -num_queries:], attn_bias[:, :, -num_queries:]
    # heads that share keys stand behind each other as so many more tokens
    groups = query.shape[1] // shared
    if groups > 1 and num_queries > 1:
        attn_bias = attn_bias.repeat(1, 1, groups, 1)
    folded = query.reshape(rows, shared, groups * num_queries, size)
    mixed = scaled_dot_product_attention(folded, keys, values, attn_bias.to(folded.dtype), scale=layer.softmax_scale)
    x = x + layer.o_proj(mixed.view(rows, -1, num_queries, size).transpose(1, 2).reshape(rows, num_queries, -1))
    return x + layer.mlp(_norm(layer.post_attention_norm, x))


def apply_rotary(x: Tensor, turn: RopeTables) -> Tensor:
    return torch.addcmul(x * turn.cos, x.roll(x.shape[-1] // 2, -1), turn.sin)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm of Llama's kind: in one call in float32; in half precision it rounds on its way, as it is."""
    single = x.dtype == norm.weight.dtype == torch.float32
    normed: Tensor = rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon) if single else norm(x)
    return normed
