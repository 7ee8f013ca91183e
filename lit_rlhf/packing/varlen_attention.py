"""Sequences behind each other in one row, each attending to itself alone: without padding, and without a mask.

All layers but attention know nothing of sequences: to them the row is so many tokens. Attention is called once for
each sequence, and is causal there. A mask over the whole row would cost a square of its length, and most of what is
computed under it would be thrown away; rows of several sequences, as wide as the widest, are up to a tenth padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from lit_rlhf.packing.attention_masks import VARLEN_SDPA, packing_unsupported_reason


def varlen_unsupported_reason(config: PretrainedConfig, attn_implementation: str, longest: int) -> str | None:
    """Why a model would not compute the sequences of a row as it computes them in rows of their own.

    Read from the configuration and the architecture's code, before any weight.

    Args:
        config: of the model.
        attn_implementation: the attention implementation (`ModelLoadingConfig.attention`).
        longest: tokens of the longest sequence.

    Returns:
        None where the two differ by rounding alone.
    """
    config = config.get_text_config()
    if attn_implementation != "sdpa":
        return f"attention {attn_implementation!r} is not called sequence by sequence; set model.loading.attn_implementation to 'sdpa'"
    reason = packing_unsupported_reason(config, attn_implementation, longest)
    if reason is None and not MODEL_MAPPING[type(config)]._supports_attention_backend:
        reason = f"{config.model_type} has an attention of its own, which cannot be called sequence by sequence"
    return reason


def varlen_inputs(model: PreTrainedModel, sequence_lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a model takes, beside `input_ids` (1, T), so that sequences see nothing of each other.

    From the first call on, the model's attention is one that knows of sequences; without them it is "sdpa".

    Args:
        model: one that nothing speaks against (`varlen_unsupported_reason`).
        sequence_lengths: tokens of each sequence, T together.
        device: of the ids.
    """
    # in the configuration for good: gradient checkpointing asks it again in the backward pass
    if model.config._attn_implementation != VARLEN_SDPA:
        model.set_attn_implementation(VARLEN_SDPA)
    positions = torch.cat([torch.arange(length, device=device) for length in sequence_lengths])[None]
    # transformers passes on what has four dimensions, and makes no mask. Where a layer drops the lengths, PyTorch
    # refuses this one: it is of whole numbers
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
    """Return what "sdpa" does, (B, T, H, d), of queries (B, H, T, d) and keys and values; by sequence if there are."""
    attend = AttentionInterface()["sdpa"]
    if sequence_lengths is None:
        mixed: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **settings)
        return mixed
    # `split` and not slices: its gradient is written once, that of every slice is as long as the row
    parts = zip(*(torch.split(states, sequence_lengths, 2) for states in (query, key, value)))
    return torch.cat([attend(module, *part, None, **settings)[0] for part in parts], 1), None


AttentionInterface.register(VARLEN_SDPA, varlen_sdpa)
AttentionMaskInterface.register(VARLEN_SDPA, AttentionMaskInterface()["sdpa"])
