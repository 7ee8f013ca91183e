"""A pass of Llama's blocks over keys and values in memory set aside, without what transformers does around it.

A token of a response costs a small model less than the calls that lead to its matrices. So the blocks are written out
here for the architectures that share them, and all that is called is looked up once a rollout: projections,
feed-forward layers, embeddings and whatever adapters, 4-bit layers or hooks are on these are called as they are, or,
in float32 on a CPU, as products that give the same (`lit_rlhf.models.packed`); norms, rotation and attention are a call
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

from lit_rlhf.models.packed import Layer, PackedFeedForward, SideBySide, packed
from lit_rlhf.models.segments import SEQUENCES

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_FIXED_ROTATIONS = ("default", "linear", "llama3", "yarn")  # others depend on how long a sequence is


class Rotation(NamedTuple):
    """The rotary embedding of every position."""

    cosine: Tensor  # (M, d)
    sine: Tensor  # (M, d), negative in the first half: what a half turn of the columns is multiplied with


class Block(NamedTuple):
    """What is called of a block."""

    norm: Any
    heads: Layer  # (n, T, D) -> (n, T, (H + 2 K) d): queries, keys and values side by side
    out: Layer  # (n, T, H d) -> (n, T, D)
    next_norm: Any
    feed_forward: Layer  # (n, T, D) -> (n, T, D)
    scaling: float


class Stack(NamedTuple):
    """What is called of a model."""

    embed: Layer
    blocks: list[Block]
    norm: Any
    head: Layer


def reason_against_direct(model: PreTrainedModel) -> str | None:
    """Return why `last_logits` would not compute what the model's own forward pass does, or None."""
    name = type(model).__name__  # a sharded model has another: its blocks must be called, to be gathered
    if name not in _ARCHITECTURES or not type(model).__module__.startswith("transformers.models."):
        return f"{name} is none of {', '.join(_ARCHITECTURES)}"
    if model.config._attn_implementation not in ("sdpa", SEQUENCES):
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


def prepares_nothing(model: PreTrainedModel) -> bool:
    """Whether all layers are known to keep nothing of a pass.

    Quantised ones may prepare their weights in the first, and what inference mode makes is of no use to training.
    """
    return all(type(m).__module__.split(".")[0] in ("torch", "transformers", "peft") for m in model.modules())


def stack_of(model: PreTrainedModel, few: bool) -> Stack:
    """Return what is called of the model, for a rollout: with the weights as they are now.

    Args:
        model: one that nothing speaks against (`reason_against_direct`).
        few: for passes of few tokens, as a step of a token is: plain layers as `packed` products where it knows them.
    """
    base: Any = model.base_model

    def one(layer: Any) -> Layer:
        return (packed(layer) if few else None) or layer

    blocks = []
    for block in base.layers:
        attention, mlp = block.self_attn, block.mlp
        heads = attention.q_proj, attention.k_proj, attention.v_proj
        blocks.append(
            Block(
                block.input_layernorm,
                (packed(*heads) if few else None) or SideBySide(*heads),
                one(attention.o_proj),
                block.post_attention_layernorm,
                (PackedFeedForward.of(mlp) if few else None) or mlp,
                attention.scaling,
            )
        )
    return Stack(base.embed_tokens, blocks, base.norm, one(model.get_output_embeddings()))


def rotation_of(model: PreTrainedModel, positions: int) -> Rotation:
    """Return the rotations of the positions below `positions`."""
    base: Any = model.base_model
    like = base.embed_tokens.weight
    cosine, sine = base.rotary_emb(like, torch.arange(positions, device=like.device)[None])
    half = sine.shape[-1] // 2
    return Rotation(cosine[0], torch.cat([-sine[0, :, :half], sine[0, :, half:]], -1))


def set_aside(model: PreTrainedModel, rows: int, columns: int) -> list[Tensor]:
    """Return room for keys and values, of each block (rows, 2 K, columns, d), keys first, not yet filled."""
    base: Any = model.base_model
    attention, like = base.layers[0].self_attn, base.embed_tokens.weight.detach()
    shape = rows, 2 * model.config.num_key_value_heads, columns, attention.head_dim
    return [like.new_empty(shape) for _ in base.layers]


def last_logits(
    stack: Stack,
    tokens: Tensor,
    position: Tensor,
    seen: Tensor,
    rotation: Rotation,
    room: list[Tensor],
) -> Tensor:
    """Return the logits of the token after the last one, (n, V).

    The tokens' keys and values go into the last T of the C columns of `room`.

    Args:
        stack: of `stack_of`.
        tokens: (n, T) int64.
        position: (n, T) int64, of each in its sequence.
        seen: (n, 1, T, C) of the model's type, 0 where a token sees a column and a very low number elsewhere.
        rotation: of `rotation_of`, for all positions.
        room: of `set_aside`, for n rows and C columns or more.
    """
    x = stack.embed(tokens)  # (n, T, D)
    turn = Rotation(rotation.cosine[position][:, None], rotation.sine[position][:, None])  # (n, 1, T, d) each
    last = len(stack.blocks) - 1
    for number, block in enumerate(stack.blocks):
        # nothing reads what the last block makes of a prompt but its last token
        x = _block(block, x, 1 if number == last else tokens.shape[1], turn, room[number], seen)
    return stack.head(_norm(stack.norm, x[:, -1]))


def compiled_last_logits() -> Callable[..., Tensor]:
    """Return `last_logits` for one new token a row, compiled once for any number of columns and of rows but one.

    Weights are inputs of the compiled code, so it sees every update of them.
    """
    compiled = torch.compile(last_logits, fullgraph=True)

    def step(
        stack: Stack, tokens: Tensor, position: Tensor, seen: Tensor, rotation: Rotation, room: list[Tensor]
    ) -> Tensor:
        # contiguous at every step: whether they are is a condition of the compiled code
        tokens, position, seen = tokens.contiguous(), position.contiguous(), seen.contiguous()
        for tensor, sizes in ((tokens, [0]), (position, [0]), (seen, [0, 3]), *((part, [0]) for part in rotation)):
            torch._dynamo.maybe_mark_dynamic(tensor, sizes)
        for states in room:
            torch._dynamo.maybe_mark_dynamic(states, [0, 2])
        logits: Tensor = compiled(stack, tokens, position, seen, rotation, room)
        return logits

    return step


def _block(block: Block, x: Tensor, asked: int, turn: Rotation, room: Tensor, seen: Tensor) -> Tensor:
    """Return the last `asked` tokens behind the block, (n, asked, D)."""
    rows, new, columns = *x.shape[:2], seen.shape[-1]
    room = room[:rows, :, :columns]
    shared, size = room.shape[1] // 2, room.shape[3]  # K and d
    heads = block.heads(_norm(block.norm, x)).view(rows, new, -1, size).transpose(1, 2)  # (n, H + 2 K, T, d)
    turned = _turned(heads[:, :-shared], turn)  # (n, H + K, T, d)
    # in one piece: compiled code copies all of the room for every further one
    room[:, :, columns - new :] = torch.cat([turned[:, -shared:], heads[:, -shared:]], 1)
    keys, values = room[:, :shared], room[:, shared:]
    x, query, seen = x[:, -asked:], turned[:, :-shared, -asked:], seen[:, :, -asked:]
    # heads that share keys stand behind each other as so many more tokens
    groups = query.shape[1] // shared
    if groups > 1 and asked > 1:
        seen = seen.repeat(1, 1, groups, 1)
    folded = query.reshape(rows, shared, groups * asked, size)
    mixed = scaled_dot_product_attention(folded, keys, values, seen.to(folded.dtype), scale=block.scaling)
    x = x + block.out(mixed.view(rows, -1, asked, size).transpose(1, 2).reshape(rows, asked, -1))
    return x + block.feed_forward(_norm(block.next_norm, x))


def _turned(x: Tensor, turn: Rotation) -> Tensor:
    return torch.addcmul(x * turn.cosine, x.roll(x.shape[-1] // 2, -1), turn.sine)


def _norm(norm: Any, x: Tensor) -> Tensor:
    """Apply a norm of Llama's kind: in one call in float32; in half precision it rounds on its way, as it is."""
    single = x.dtype == norm.weight.dtype == torch.float32
    normed: Tensor = rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon) if single else norm(x)
    return normed
