"""A faster decode step for Llama-family models: the decoder forward without the transformers wrappers around it.

For small models, Python dispatch costs more than the matrix products of a token. So the decoder layers of the
architectures that share them are written out here, over a preallocated KV cache, and every submodule is looked up once
per rollout. Projections, MLPs and embeddings are called as they are, with whatever adapters, 4-bit layers or hooks are
on them, or, with float32 weights on a CPU, as prepacked products of the same precision. Norms, rotary embeddings
and attention are one call each.

`CachedGenerator` alone knows this file: without it every model decodes by `StaticCacheDecoder`, with the same result.

Shapes: `n` rows, `T` new tokens per row, `C` columns of the KV cache, `M` positions, `H` query heads, `K` key-value
heads, `d` head size, `D` hidden size, `V` vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.generation.kv_cache import DecodeBatch, Decoder, compaction_plan
from lit_rlhf.models.lora import LinearParts, has_own_call, split_linear
from lit_rlhf.packing.attention_masks import packed_model_inputs, to_attention_mask, uses_sdpa

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # others depend on the length of a sequence

#: Prompt tokens per prefill pass. Activations of so few tokens stay in a CPU's caches; on other devices the number
#: bounds the memory that a pass takes in addition to the KV cache.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_DEFAULT = 16_384

_HAS_PREPACKED = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build of PyTorch
_PREPACK_ROWS = 16  # the batch size that the order of prepacked weights is chosen for; the product is the same for all

Layer = Callable[[Tensor], Tensor]
"""Maps (n, T, inputs) to (n, T, outputs)."""


def fast_decode_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return why `next_token_logits` would not compute what the model's own forward pass does, or None."""
    name = type(model).__name__  # a sharded model has another class: its layers must be called to be gathered
    if name not in _ARCHITECTURES or not type(model).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(_ARCHITECTURES)}"
    if not uses_sdpa(model.config):
        return f"its attention is {model.config._attn_implementation!r} and not 'sdpa'"
    base: Any = model.base_model
    if base.rotary_emb.rope_type not in _FIXED_ROPE_TYPES:
        return f"its rotary embedding is {base.rotary_emb.rope_type!r}, which depends on the length of a sequence"
    bypassed = [model, base, base.norm, base.rotary_emb]
    for layer in base.layers:
        bypassed += [layer, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm]
    if any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in bypassed):
        return "there are hooks on its decoder layers"
    return None


class LlamaDecoder(Decoder):
    """Decodes by `next_token_logits`, for a model without a `fast_decode_unsupported_reason`."""

    def __init__(self, model: PreTrainedModel, step: Any = None) -> None:
        super().__init__(model)
        self.prefill, self.decode = build_layers(model, prepack=False), build_layers(model, prepack=True)
        self.decode_step: Callable[..., Tensor] = step or next_token_logits
        # Layers of other packages (quantized ones) may prepare weights in their first pass; made in inference mode,
        # these would be of no use to training.
        packages = {type(module).__module__.split(".")[0] for module in model.modules()}
        self.allows_inference_mode = packages <= {"torch", "transformers", "peft"}

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int) -> DecodeBatch:
        """See `Decoder.start`."""
        return LlamaDecodeBatch(self, prompt_ids, prompt_mask, num_samples, max_new_tokens)

    @staticmethod
    def compile_step() -> Any:
        """See `Decoder.compile_step`. Weights are inputs of the compiled code, so it follows their updates."""
        compiled = torch.compile(next_token_logits, fullgraph=True)

        def step(
            layers: "LlamaLayers",
            tokens: Tensor,
            positions: Tensor,
            bias: Tensor,
            rope: RopeTables,
            cache: list[Tensor],
        ) -> Tensor:
            # contiguous at every step: the compiled code is specialized on strides
            tokens, positions, bias = tokens.contiguous(), positions.contiguous(), bias.contiguous()
            for tensor, dims in ((tokens, [0]), (positions, [0]), (bias, [0, 3]), *((part, [0]) for part in rope)):
                torch._dynamo.maybe_mark_dynamic(tensor, dims)
            for states in cache:
                torch._dynamo.maybe_mark_dynamic(states, [0, 2])
            logits: Tensor = compiled(layers, tokens, positions, bias, rope, cache)
            return logits

        return step


class LlamaDecodeBatch(DecodeBatch):
    """A batch in a KV cache that is allocated once per layer; the last row moves to the place of one that leaves."""

    def __init__(
        self, decoder: LlamaDecoder, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int
    ) -> None:
        self.decoder, self.ids, self.mask, self.num_samples = decoder, prompt_ids, prompt_mask, num_samples
        self.cache_position, columns = prompt_ids.shape[1], prompt_ids.shape[1] + max_new_tokens
        count = len(prompt_ids) * num_samples
        self.rope = build_rope_tables(decoder.model, columns)
        self.kv_cache = allocate_kv_cache(decoder.model, _round_up(count), columns)
        response = prompt_mask.new_ones(len(prompt_mask), max_new_tokens)
        visible = torch.cat([prompt_mask, response], 1).bool()[:, None, None]
        prompt_index = torch.arange(_round_up(count), device=prompt_ids.device).clamp(max=count - 1) // num_samples
        bias = to_attention_mask(visible, "eager").to(self.kv_cache[0].dtype)
        self.attn_bias = bias[prompt_index]  # (rows of the cache, 1, 1, P + R)
        self.position_ids = position_ids(prompt_mask)[prompt_index, -1:]  # (rows of the cache, 1), of the last token

    def prefill(self) -> Tensor:
        """See `DecodeBatch.prefill`."""
        count, width = self.ids.shape
        size = max(_PREFILL_TOKENS.get(self.ids.device.type, _PREFILL_TOKENS_DEFAULT) // width, 1)
        logits = torch.cat([self._prefill(start, min(start + size, count)) for start in range(0, count, size)])
        if self.num_samples > 1:
            for states in self.kv_cache:
                rows = states[: count * self.num_samples].view(count, self.num_samples, *states.shape[1:])
                rows = rows[..., : self.cache_position, :]
                rows[:, 1:] = rows[:, :1]
        return logits.repeat_interleave(self.num_samples, 0)

    def _prefill(self, start: int, stop: int) -> Tensor:
        """Compute the prompts [start, stop), each in the first of its rows; return the logits after them."""
        inputs = packed_model_inputs(self.mask[start:stop], attn_implementation="eager")
        bias = inputs["attention_mask"].to(self.attn_bias.dtype)
        first_rows = slice(start * self.num_samples, stop * self.num_samples, self.num_samples)
        cache = [states[first_rows] for states in self.kv_cache]
        ids, positions = self.ids[start:stop], inputs["position_ids"]
        return next_token_logits(self.decoder.prefill, ids, positions, bias, self.rope, cache)

    def compact(self, active: Tensor) -> Tensor:
        """See `DecodeBatch.compact`."""
        order, movers, holes = compaction_plan(active)
        if len(holes):
            for states in self.kv_cache:
                states[holes, :, : self.cache_position] = states[movers, :, : self.cache_position]
            self.attn_bias[holes], self.position_ids[holes] = self.attn_bias[movers], self.position_ids[movers]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `DecodeBatch.step`."""
        self.cache_position += 1
        self.position_ids += 1
        count, rows = len(tokens), _round_up(len(tokens))
        ids = pad(tokens, (0, rows - count))[:, None]
        positions, bias = self.position_ids[:rows], self.attn_bias[:rows, ..., : self.cache_position]
        decoder = self.decoder
        return decoder.decode_step(decoder.decode, ids, positions, bias, self.rope, self.kv_cache)[:count]


def _round_up(rows: int) -> int:
    """Return a batch size of a small set: for every other one oneDNN generates code anew, and keeps it."""
    step = max(4, 1 << max((rows - 1).bit_length() - 4, 0))
    return -(-rows // step) * step


class RopeTables(NamedTuple):
    """Rotary position embedding of every position."""

    cos: Tensor  # (M, d)
    sin: Tensor  # (M, d), negated in the first half: `rotate_half` without a copy


class DecoderLayer(NamedTuple):
    """The submodules of a decoder layer."""

    input_norm: Any
    qkv_proj: Layer  # (n, T, D) -> (n, T, (H + 2 K) d): queries, keys and values concatenated
    o_proj: Layer  # (n, T, H d) -> (n, T, D)
    post_attention_norm: Any
    mlp: Layer  # (n, T, D) -> (n, T, D)
    softmax_scale: float


class LlamaLayers(NamedTuple):
    """The submodules of a model."""

    embed_tokens: Layer
    layers: list[DecoderLayer]
    norm: Any
    lm_head: Layer


def build_layers(model: PreTrainedModel, prepack: bool) -> LlamaLayers:
    """Return the submodules of the model, with the weights as they are now.

    Args:
        model: one without a `fast_decode_unsupported_reason`.
        prepack: prepack the weights of plain linear layers, for passes of few tokens such as a decode step.
    """
    base: Any = model.base_model

    def linear(layer: Any) -> Layer:
        return (prepack_linear(layer) if prepack else None) or layer

    layers = []
    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = attention.q_proj, attention.k_proj, attention.v_proj
        layers.append(
            DecoderLayer(
                layer.input_layernorm,
                (prepack_linear(*qkv) if prepack else None) or ConcatLinear(*qkv),
                linear(attention.o_proj),
                layer.post_attention_layernorm,
                (PrepackedGatedMLP.from_module(mlp) if prepack else None) or mlp,
                attention.scaling,
            )
        )
    return LlamaLayers(base.embed_tokens, layers, base.norm, linear(model.get_output_embeddings()))


def build_rope_tables(model: PreTrainedModel, positions: int) -> RopeTables:
    """Return the rotary embeddings of the positions below `positions`."""
    base: Any = model.base_model
    like = base.embed_tokens.weight
    cos, sin = base.rotary_emb(like, torch.arange(positions, device=like.device)[None])
    half = sin.shape[-1] // 2
    return RopeTables(cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1))


def allocate_kv_cache(model: PreTrainedModel, rows: int, columns: int) -> list[Tensor]:
    """Return an uninitialized KV cache, one tensor per layer, (rows, 2 K, columns, d), keys first."""
    base: Any = model.base_model
    attention, like = base.layers[0].self_attn, base.embed_tokens.weight.detach()
    shape = rows, 2 * model.config.num_key_value_heads, columns, attention.head_dim
    # attention would convert the whole cache to the dtype of autocast in every pass
    half = like.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if half else like.dtype
    return [like.new_empty(shape, dtype=dtype) for _ in base.layers]


def next_token_logits(
    layers: LlamaLayers,
    tokens: Tensor,
    position_ids: Tensor,
    attn_bias: Tensor,
    rope: RopeTables,
    kv_cache: list[Tensor],
) -> Tensor:
    """Return the logits after the last token, (n, V); write keys and values to the last T of the C columns.

    Args:
        layers: of `build_layers`.
        tokens: (n, T) int64.
        position_ids: (n, T) int64.
        attn_bias: (n, 1, T, C) of the model's dtype, 0 where a token attends and a very low number elsewhere.
        rope: of `build_rope_tables`, for all positions.
        kv_cache: of `allocate_kv_cache`, for at least n rows and C columns.
    """
    x = layers.embed_tokens(tokens)  # (n, T, D)
    cos_sin = RopeTables(rope.cos[position_ids][:, None], rope.sin[position_ids][:, None])  # (n, 1, T, d) each
    last = len(layers.layers) - 1
    for index, layer in enumerate(layers.layers):
        # of the last layer's output only the last token is read
        x = _decoder_layer(layer, x, 1 if index == last else tokens.shape[1], cos_sin, kv_cache[index], attn_bias)
    return layers.lm_head(_rms_norm(layers.norm, x[:, -1]))


def _decoder_layer(
    layer: DecoderLayer, x: Tensor, num_queries: int, cos_sin: RopeTables, kv_cache: Tensor, attn_bias: Tensor
) -> Tensor:
    """Return the layer's output of the last `num_queries` tokens, (n, num_queries, D)."""
    rows, new, columns = *x.shape[:2], attn_bias.shape[-1]
    kv_cache = kv_cache[:rows, :, :columns]
    num_kv_heads, head_dim = kv_cache.shape[1] // 2, kv_cache.shape[3]
    qkv = layer.qkv_proj(_rms_norm(layer.input_norm, x)).view(rows, new, -1, head_dim).transpose(1, 2)
    rotated = apply_rotary(qkv[:, :-num_kv_heads], cos_sin)  # (n, H + K, T, d)
    # One assignment: compiled code copies the whole cache for every further one.
    kv_cache[:, :, columns - new :] = torch.cat([rotated[:, -num_kv_heads:], qkv[:, -num_kv_heads:]], 1)
    keys, values = kv_cache[:, :num_kv_heads], kv_cache[:, num_kv_heads:]
    x, query, bias = x[:, -num_queries:], rotated[:, :-num_kv_heads, -num_queries:], attn_bias[:, :, -num_queries:]
    # grouped-query attention: the query heads of a key-value head are folded into its query tokens
    groups = query.shape[1] // num_kv_heads
    if groups > 1 and num_queries > 1:
        bias = bias.repeat(1, 1, groups, 1)
    folded = query.reshape(rows, num_kv_heads, groups * num_queries, head_dim)
    attended = scaled_dot_product_attention(folded, keys, values, bias.to(folded.dtype), scale=layer.softmax_scale)
    merged = attended.view(rows, -1, num_queries, head_dim).transpose(1, 2).reshape(rows, num_queries, -1)
    x = x + layer.o_proj(merged)
    return x + layer.mlp(_rms_norm(layer.post_attention_norm, x))


def apply_rotary(x: Tensor, cos_sin: RopeTables) -> Tensor:
    """Return x * cos + rotate_half(x) * sin, (n, heads, T, d)."""
    return torch.addcmul(x * cos_sin.cos, x.roll(x.shape[-1] // 2, -1), cos_sin.sin)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """Apply a Llama RMSNorm: by one call in float32; in half precision the module's own rounding is kept."""
    single = x.dtype == norm.weight.dtype == torch.float32
    normed: Tensor = rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon) if single else norm(x)
    return normed


class ConcatLinear:
    """Linear layers of one input, called as they are; their outputs concatenated in the last dimension."""

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, T, sum of outputs)."""
        return torch.cat([layer(x) for layer in self.layers], -1)


class PrepackedLinear:
    """Linear layers of one input as one product, with their weights as they were, in the order a CPU reads them.

    A product of a few dozen rows finishes before its weights have come from memory; in blocked order it takes down to
    half the time. PyTorch's compiler packs weights too, but as constants, and a policy's weights change.

    Args:
        weight: (sum of outputs, inputs), in the dtype of the product.
        bias: (sum of outputs,), if any.
        low_rank: down (R, inputs) and up (sum of outputs, R), whose product is added to the weight, if any.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, low_rank: tuple[Tensor, Tensor] | None = None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PREPACK_ROWS)
        self.bias, self.low_rank = bias, low_rank

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, T, sum of outputs)."""
        product: Tensor
        x = x.to(self.weight.dtype)
        if torch.compiler.is_compiling():
            product = torch.ops.lit_rlhf.prepacked_linear(x, self.weight, self.bias)
        else:
            product = _prepacked_product(x, self.weight, self.bias)
        if self.low_rank is None:
            return product
        down, up = self.low_rank
        return product + linear(linear(x, down), up)


class PrepackedGatedMLP:
    """A Llama MLP, with gate and up projection in one product."""

    def __init__(self, gate_up_proj: PrepackedLinear, act_fn: Callable[[Tensor], Tensor], down_proj: PrepackedLinear):
        self.gate_up_proj, self.act_fn, self.down_proj = gate_up_proj, act_fn, down_proj

    @classmethod
    def from_module(cls, mlp: Any) -> "PrepackedGatedMLP | None":
        """Return the prepacked form of an MLP module, or None where its class or layers are not plain."""
        if not type(mlp).__module__.startswith("transformers.models.") or has_own_call(mlp):
            return None
        gate_up, down = prepack_linear(mlp.gate_proj, mlp.up_proj), prepack_linear(mlp.down_proj)
        return cls(gate_up, mlp.act_fn, down) if gate_up and down else None

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, T, D)."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(self.act_fn(gate) * up)


def prepack_linear(*layers: nn.Module) -> PrepackedLinear | None:
    """Return linear layers of one input as one product; None unless their weights are in float32 on a CPU.

    In float32 adapters are merged. Under autocast the product is in its dtype, to which the weights are converted here
    and not in each pass; adapters stay apart: merged, an update below half a step of bfloat16 would be rounded away.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    # before adapters are merged, which would be for nothing
    if not can_prepack(dtype) or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters):
        return None
    parts = [each for each in map(split_linear, layers) if each is not None]
    biases = [each.bias for each in parts if each.bias is not None]
    if len(parts) < len(layers) or len(biases) not in (0, len(layers)):
        return None
    bias = torch.cat(biases).to(dtype) if biases else None
    if dtype == torch.float32:
        merged = [sum((up @ down for down, up in each.adapters), each.weight) for each in parts]
        return PrepackedLinear(torch.cat(merged), bias)
    return PrepackedLinear(torch.cat([each.weight for each in parts]).to(dtype), bias, join_adapters(parts, dtype))


def join_adapters(parts: list[LinearParts], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Return the adapters of linear layers of one input as one, down (R, inputs) and up (sum of outputs, R)."""
    downs = [down for each in parts for down, _ in each.adapters]
    if not downs:
        return None
    ups = [
        torch.cat([each.weight.new_empty(len(each.weight), 0), *(up for _, up in each.adapters)], 1) for each in parts
    ]
    up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
    return torch.cat(downs).to(dtype), up.to(dtype)


def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch and this processor multiply prepacked weights of the type."""
    if not _HAS_PREPACKED or dtype not in (torch.float32, torch.bfloat16):
        return False
    # without AVX-512 the layers compute in bfloat16 by other code, and the prepacked product raises
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _prepacked_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# PyTorch's compiler accepts prepacked weights as constants alone. As an opaque operator they are inputs.
torch.library.define("lit_rlhf::prepacked_linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("lit_rlhf::prepacked_linear", "default", _prepacked_product)


@torch.library.register_fake("lit_rlhf::prepacked_linear")
def _prepacked_linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
