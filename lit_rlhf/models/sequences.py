"""Sequences behind each other in one row, each attending to itself alone: without padding, and without a mask.

All layers but attention know nothing of sequences: to them the row is so many tokens. Attention is called once for
each sequence, and is causal there. A mask over the whole row would cost a square of its length, and most of what is
computed under it would be thrown away; rows of several sequences, as wide as the widest, are up to a tenth padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from lit_rlhf.models.segments import SEQUENCES, reason_against_segments


def reason_against_sequences(config: PretrainedConfig, attention: str, longest: int) -> str | None:
    """Why a model would not compute the sequences of a row as it computes them in rows of their own.

    Read from the configuration and the architecture's code, before any weight.

    Args:
        config: of the model.
        attention: the attention implementation (`ModelOptions.attention`).
        longest: tokens of the longest sequence.

    Returns:
        None where the two differ by rounding alone.
    """
    config = config.get_text_config()
    if attention != "sdpa":
        return f"attention {attention!r} is not called sequence by sequence; set model.options.attention to 'sdpa'"
    reason = reason_against_segments(config, attention, longest)
    if reason is None and not MODEL_MAPPING[type(config)]._supports_attention_backend:
        reason = f"{config.model_type} has an attention of its own, which cannot be called sequence by sequence"
    return reason


def sequence_inputs(model: PreTrainedModel, lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """What a model takes, beside `input_ids` (1, T), so that sequences see nothing of each other.

    From the first call on, the model's attention is one that knows of sequences; without them it is "sdpa".

    Args:
        model: one that nothing speaks against (`reason_against_sequences`).
        lengths: tokens of each sequence, T together.
        device: of the ids.
    """
    # in the configuration for good: gradient checkpointing asks it again in the backward pass
    if model.config._attn_implementation != SEQUENCES:
        model.set_attn_implementation(SEQUENCES)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    # transformers passes on what has four dimensions, and makes no mask. Where a layer drops the lengths, PyTorch
    # refuses this one: it is of whole numbers
    no_mask = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    return {"attention_mask": no_mask, "position_ids": positions, "sequence_lengths": list(lengths)}


def _attend(
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


AttentionInterface.register(SEQUENCES, _attend)
AttentionMaskInterface.register(SEQUENCES, AttentionMaskInterface()["sdpa"])
