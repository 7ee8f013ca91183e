"""Variable-length attention: unrelated sequences concatenated in one row, each attending to itself alone.

Neither padding nor a mask is computed. All other layers work token by token, so to them the row is one long sequence.
Attention is called once per sequence, and is causal there: a mask over the full row would cost the square of its
length, mostly for pairs of tokens that are masked out. Padded rows would be up to a tenth padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from lit_rlhf.packing.attention_masks import VARLEN_SDPA, packing_unsupported_reason


def varlen_unsupported_reason(
    config: PretrainedConfig, longest: int, attn_implementation: str | None = None
) -> str | None:
    """Return why a model would not compute the sequences of a row as in separate rows, or None.

    Arguments as for `packing_unsupported_reason`.
    """
    config = config.get_text_config()
    implementation = attn_implementation or config._attn_implementation
    if implementation != "sdpa":
        return (
            f"attention {implementation!r} is not called sequence by sequence; "
            "set model.loading.attn_implementation to 'sdpa'"
        )
    reason = packing_unsupported_reason(config, longest, implementation)
    if reason is None and not MODEL_MAPPING[type(config)]._supports_attention_backend:
        reason = f"{config.model_type} has an attention of its own, which cannot be called sequence by sequence"
    return reason


def varlen_inputs(model: PreTrainedModel, sequence_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Build the model inputs, besides `input_ids` (1, T), with which sequences do not attend to each other.

    The first call sets the model's attention implementation to one that takes sequence lengths; without them it is
    "sdpa".

    Args:
        model: Supported by `varlen_unsupported_reason`.
        sequence_lengths: Tokens of each sequence, T together.
        device: Of `input_ids`.
    """
    # never reset: gradient checkpointing reads it again in the backward pass
    if model.config._attn_implementation != VARLEN_SDPA:
        model.set_attn_implementation(VARLEN_SDPA)
    positions = torch.cat([torch.arange(length, device=device) for length in sequence_lengths])[None]  # (1, T)
    # transformers passes a four-dimensional mask on and builds none. It is of integers, so that a layer that drops
    # sequence_lengths raises in PyTorch, instead of attending across sequences
    no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    return {"attention_mask": no_mask, "position_ids": positions, "sequence_lengths": list(sequence_lengths)}


def varlen_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: list[int] | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attend like "sdpa", sequence by sequence where `sequence_lengths` is given.

    Args:
        module: The attention layer.
        query: (B, H, T, d).
        key: (B, H_kv, T, d).
        value: (B, H_kv, T, d).
        attention_mask: Ignored where `sequence_lengths` is given.
        sequence_lengths: Tokens of each sequence, T together.
        settings: Passed on.

    Returns:
        (B, T, H, d), and no attention weights.
    """
    attend = AttentionInterface()["sdpa"]
    if sequence_lengths is None:
        output: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **settings)
        return output
    # not slices, whose gradients are each as long as the row; that of `split` is written once
    parts = zip(*(torch.split(states, sequence_lengths, 2) for states in (query, key, value)))
    return torch.cat([attend(module, *part, None, **settings)[0] for part in parts], 1), None


AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
AttentionMaskInterface.register(VARLEN_SDPA, AttentionMaskInterface()["sdpa"])
