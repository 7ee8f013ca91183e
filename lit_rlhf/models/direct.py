"""A pass of Llama's blocks over keys and values in memory set aside, without what transformers does around it.

A token of a response costs a small model less than the calls that lead to its matrices. So the blocks are written out
here for the architectures that share them: projections, feed-forward layers, embeddings and whatever adapters, 4-bit
layers or hooks are on these are called as they are; norms, rotation and attention are a call each.

Shapes: `n` rows, `T` new tokens of each, `C` columns that keys are kept for, `M` positions, `d` a head's size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import PreTrainedModel

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # others depend on how long a sequence is


class Rotation(NamedTuple):
    """The rotary embedding of every position."""

    cosine: Tensor  # (M, d)
    sine: Tensor  # (M, d), negative in the first half: what a half turn of the columns is multiplied with


def reason_against_direct(model: PreTrainedModel) -> str | None:
    """Return why `last_logits` would not compute what the model's own forward pass does, or None."""
    name = type(model).__name__  # a sharded model has another: its blocks must be called, to be gathered
    if name not in _ARCHITECTURES or not type(model).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(_ARCHITECTURES)}"
    if model.config._attn_implementation != "sdpa":
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


def rotation_of(model: PreTrainedModel, positions: int) -> Rotation:
    """Return the rotations of the positions below `positions`."""
    base: Any = model.base_model
    like = base.embed_tokens.weight
    cosine, sine = base.rotary_emb(like, torch.arange(positions, device=like.device)[None])
    half = sine.shape[-1] // 2
    return Rotation(cosine[0], torch.cat([-sine[0, :, :half], sine[0, :, half:]], -1))


def set_aside(model: PreTrainedModel, rows: int, columns: int) -> list[Tensor]:
    """Return room for keys and values, block by block, (rows, heads, columns, d) each, not yet filled.

    For two rows at least: compiled code knows no single row.
    """
    base: Any = model.base_model
    attention, like = base.layers[0].self_attn, base.embed_tokens.weight.detach()
    shape = max(rows, 2), model.config.num_key_value_heads, columns, attention.head_dim
    return [like.new_empty(shape) for _ in range(2 * len(base.layers))]


def last_logits(
    model: PreTrainedModel,
    tokens: Tensor,
    position: Tensor,
    seen: Tensor,
    rotation: Rotation,
    room: list[Tensor],
) -> Tensor:
    """Return the logits of the token after the last one, (n, V).

    The tokens' keys and values go into the last T of the C columns of `room`.

    Args:
        model: one that nothing speaks against (`reason_against_direct`).
        tokens: (n, T) int64.
        position: (n, T) int64, of each in its sequence.
        seen: (n, 1, T, C) of the model's type, 0 where a token sees a column and a very low number elsewhere.
        rotation: of `rotation_of`, for all positions.
        room: of `set_aside`, for n rows and C columns or more.
    """
    base: Any = model.base_model
    x = base.embed_tokens(tokens)  # (n, T, D)
    turn = Rotation(rotation.cosine[position][:, None], rotation.sine[position][:, None])  # (n, 1, T, d) each
    last = len(base.layers) - 1
    for number, block in enumerate(base.layers):
        # nothing reads what the last block makes of a prompt but its last token
        asked = 1 if number == last else tokens.shape[1]
        x = _block(block, x, asked, turn, room[2 * number], room[2 * number + 1], seen)
    head: Any = model.get_output_embeddings()
    logits: Tensor = head(_norm(base.norm, x[:, -1]))
    return logits


def compiled_last_logits() -> Callable[..., Tensor]:
    """Return `last_logits` for one new token a row, compiled once for any number of rows and columns.

    Weights are inputs of the compiled code, so it sees every update of them.
    """
    compiled = torch.compile(last_logits, fullgraph=True)

    def step(
        model: PreTrainedModel, tokens: Tensor, position: Tensor, seen: Tensor, rotation: Rotation, room: list[Tensor]
    ) -> Tensor:
        rows = len(tokens)
        if rows == 1:  # a single row would be a case of its own, compiled again
            tokens, position, seen = (each.expand(2, *each.shape[1:]) for each in (tokens, position, seen))
        # contiguous at every step: whether they are is a condition of the compiled code
        tokens, position, seen = tokens.contiguous(), position.contiguous(), seen.contiguous()
        for tensor, sizes in ((tokens, [0]), (position, [0]), (seen, [0, 3]), *((part, [0]) for part in rotation)):
            torch._dynamo.maybe_mark_dynamic(tensor, sizes)
        for states in room:
            torch._dynamo.maybe_mark_dynamic(states, [0, 2])
        logits: Tensor = compiled(model, tokens, position, seen, rotation, room)
        return logits[:rows]

    return step


def _block(block: Any, x: Tensor, asked: int, turn: Rotation, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """Return the last `asked` tokens behind the block, (n, asked, D)."""
    attention = block.self_attn
    normed = _norm(block.input_layernorm, x)
    rows, new, columns = *x.shape[:2], seen.shape[-1]
    keys, values = keys[:rows, :, :columns], values[:rows, :, :columns]
    keys[:, :, columns - new :] = _turned(_heads(attention.k_proj(normed), attention.head_dim), turn)
    values[:, :, columns - new :] = _heads(attention.v_proj(normed), attention.head_dim)
    if asked < new:
        x, normed, seen = x[:, -asked:], normed[:, -asked:], seen[:, :, -asked:]
        turn = Rotation(turn.cosine[:, :, -asked:], turn.sine[:, :, -asked:])
    query = _turned(_heads(attention.q_proj(normed), attention.head_dim), turn)  # (n, heads, asked, d)
    # heads that share keys stand behind each other as so many more tokens
    groups = query.shape[1] // keys.shape[1]
    folded = query.reshape(rows, keys.shape[1], groups * asked, attention.head_dim)
    if groups > 1 and asked > 1:
        seen = seen.repeat(1, 1, groups, 1)
    seen = seen.to(folded.dtype)
    mixed = scaled_dot_product_attention(folded, keys, values, seen, scale=attention.scaling).reshape(query.shape)
    x = x + attention.o_proj(mixed.transpose(1, 2).reshape(rows, asked, -1))
    return x + block.mlp(_norm(block.post_attention_layernorm, x))


def _heads(projected: Tensor, size: int) -> Tensor:
    return projected.view(*projected.shape[:2], -1, size).transpose(1, 2)


def _turned(x: Tensor, turn: Rotation) -> Tensor:
    return torch.addcmul(x * turn.cosine, x.roll(x.shape[-1] // 2, -1), turn.sine)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm of Llama's kind: in one call in float32; in half precision it rounds on its way, as it is."""
    single = x.dtype == norm.weight.dtype == torch.float32
    normed: Tensor = rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon) if single else norm(x)
    return normed
