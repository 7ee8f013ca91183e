"""Variable-length attention: sequences concatenated in one row, without padding and without a mask.

All layers but attention work token by token, so to them the row is one long sequence. A mask over the full row would
cost the square of its length, mostly for pairs of tokens that are masked out; padded rows would be up to a tenth
padding.

On a CUDA device in half precision a layer calls PyTorch's variable-length kernel once, and a response may continue a
prompt that stands in the row once for all its responses. Elsewhere it calls attention once per sequence, and a batch
with shared prompts gets a mask (`lit_rlhf.packing.packed_batch`). `can_use_varlen_kernel` is the one place that
chooses.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from lit_rlhf.packing.architectures import DROPS_SEQUENCES
from lit_rlhf.packing.attention_masks import VARLEN_SDPA, packing_unsupported_reason


class PackedSequences(NamedTuple):
    """The sequences of a row of T tokens, each of which attends to itself causally, and to a prompt before it."""

    lengths: list[int]  # tokens of each sequence, T together
    key_index: Tensor | None = None  # (K,) int64, the tokens that are keys; None: those of the row as they are
    # first query and first key of each sequence, (S + 1,) int32 each, and the most of both; None: without the kernel
    kernel_args: tuple[Tensor, Tensor, int, int] | None = None


def varlen_unsupported_reason(
    config: PretrainedConfig, longest: int, attn_implementation: str | None = None
) -> str | None:
    """Return why a model would not compute the sequences of a row as in separate rows, or None.

    Arguments as for `packing_unsupported_reason`.
    """
    config = config.get_text_config()
    implementation = attn_implementation or config._attn_implementation
    if implementation not in ("sdpa", VARLEN_SDPA):
        return (
            f"attention {implementation!r} is not called sequence by sequence; "
            "set model.loading.attn_implementation to 'sdpa'"
        )
    reason = packing_unsupported_reason(config, longest, implementation)
    if reason is None and config.model_type in DROPS_SEQUENCES:
        return f"the layers of {config.model_type} do not tell their attention where sequences begin"
    if reason is None and not MODEL_MAPPING[type(config)]._supports_attention_backend:
        reason = f"{config.model_type} has an attention of its own, which cannot be called sequence by sequence"
    return reason


def can_use_varlen_kernel(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether the attention of a model can be PyTorch's variable-length kernel.

    It is Flash Attention: on a CUDA device of compute capability 8.0 or more, in half precision, for heads of at most
    256 dimensions, as many for values as for keys.

    Args:
        model: In its own dtype, or that of autocast.
        device: Of its inputs.
    """
    config = model.config.get_text_config()
    if device.type != "cuda" or torch.version.cuda is None or varlen_unsupported_reason(config, 0) is not None:
        return False
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    others = {getattr(config, name, None) for name in ("qk_nope_head_dim", "v_head_dim", "global_head_dim")}
    return (
        _kernel_dtype(model.dtype) in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.__version__ >= "2.12"  # earlier ones take no grouped queries
        and others <= {None, head_dim}
        and head_dim <= 256
        and head_dim % 8 == 0
    )


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to call the kernel in, to which autocast does not convert."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype


def kernel_args(query_lengths: list[int], key_lengths: list[int], device: torch.device) -> Any:
    """Return `PackedSequences.kernel_args` of sequences of these lengths."""
    offsets = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (query_lengths, key_lengths)
    )
    return *offsets, max(query_lengths), max(key_lengths)


def enable_sequences(model: PreTrainedModel) -> None:
    """Set the attention implementation of a model to one that takes sequences; without them it is "sdpa".

    Never reset: gradient checkpointing reads it again in the backward pass.
    """
    if model.config._attn_implementation != VARLEN_SDPA:
        model.set_attn_implementation(VARLEN_SDPA)


def no_attention_mask(device: torch.device) -> Tensor:
    """Return what the models get for a mask beside sequences, (1, 1, 1, 1): transformers passes it on and builds none.

    It is of integers, so that a layer that drops the sequences raises in PyTorch, instead of attending across them.
    """
    return torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)


def varlen_inputs(model: PreTrainedModel, sequence_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Build the model inputs, besides `input_ids` (1, T), with which sequences do not attend to each other.

    Args:
        model: Supported by `varlen_unsupported_reason`.
        sequence_lengths: Tokens of each sequence, T together.
        device: Of `input_ids`.
    """
    enable_sequences(model)
    lengths = list(sequence_lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)  # (1, T)
    args = kernel_args(lengths, lengths, device) if can_use_varlen_kernel(model, device) else None
    sequences = PackedSequences(lengths, kernel_args=args)
    return {"attention_mask": no_attention_mask(device), "position_ids": positions, "sequences": sequences}


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequences: PackedSequences | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend like "sdpa", within sequences where they are given.

    Args:
        module: The attention layer.
        query: (B, H, T, d).
        key: (B, H_kv, T, d).
        value: (B, H_kv, T, d).
        attention_mask: Ignored where sequences are given.
        sequences: Those of the one row (B = 1).
        settings: Passed on.

    Returns:
        (B, T, H, d), and no attention weights.
    """
    attend = AttentionInterface()["sdpa"]
    if sequences is None:
        output: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **settings)
        return output
    if sequences.kernel_args is not None and not settings.get("dropout"):  # of which the kernel has none
        return _attend_by_kernel(query, key, value, sequences, settings.get("scaling")), None
    assert sequences.key_index is None, "without the kernel, a shared prompt needs a mask"
    # not slices, whose gradients are each as long as the row; that of `split` is written once
    parts = zip(*(torch.split(states, sequences.lengths, 2) for states in (query, key, value)))
    return torch.cat([attend(module, *part, None, **settings)[0] for part in parts], 1), None


def _attend_by_kernel(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences, scale: float | None
) -> Tensor:
    """Attend by one call for all sequences, (1, T, H, d)."""
    from torch.nn.attention import varlen

    assert sequences.kernel_args is not None
    attend: Any = varlen.varlen_attn
    dtype = _kernel_dtype(value.dtype)  # rotary embeddings give queries and keys another one
    tokens = [states[0].transpose(0, 1).to(dtype) for states in (query, key, value)]  # (T, H, d)
    if sequences.key_index is not None:  # (K, H_kv, d); as in `select_positions`
        tokens[1:] = [
            embedding(sequences.key_index, states.flatten(1)).view(-1, *states.shape[1:]) for states in tokens[1:]
        ]
    # this window is the causal one: the last query of a sequence attends to all its keys
    output: Tensor = attend(*tokens, *sequences.kernel_args, scale=scale, window_size=(-1, 0), enable_gqa=True)
    return output[None]


AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
AttentionMaskInterface.register(VARLEN_SDPA, AttentionMaskInterface()["sdpa"])
