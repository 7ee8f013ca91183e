"""Attention masks and position ids of rows that hold several segments, such as a prompt and its responses.

A segment is a run of tokens: a prompt, or a response that names the prompt as its parent. A token attends to its own
segment and to its parent, so a prompt is computed once for all its responses. This module alone knows in what form
transformers takes such a mask; `lit_rlhf.packing.architectures` knows which architectures apply it.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig

from lit_rlhf.packing.architectures import CHECKED_ARCHITECTURES, architecture_unsupported_reason

VARLEN_SDPA = "lit_rlhf_varlen_sdpa"
"""Name of the attention of `lit_rlhf.packing.varlen_attention`; given a mask, it is "sdpa"."""
_IMPLEMENTATIONS = ("sdpa", "eager", VARLEN_SDPA)


def uses_sdpa(config: PretrainedConfig) -> bool:
    """Whether a loaded model's attention, given a mask, is PyTorch's scaled dot-product attention."""
    return config._attn_implementation in ("sdpa", VARLEN_SDPA)


def packing_unsupported_reason(
    config: PretrainedConfig, longest: int, attn_implementation: str | None = None
) -> str | None:
    """Return why a model would not compute the segments of a packed row as in separate rows.

    Read from the configuration, before any weight is loaded: an architecture is supported if it was compared with plain
    rows, not because nothing is known against it.

    Args:
        config: Of the model.
        longest: Tokens of the longest sequence: of a segment together with its parent.
        attn_implementation: `ModelLoadingConfig.attn_implementation`; by default that of a loaded model's `config`.

    Returns:
        None where packed and separate rows differ by rounding alone.
    """
    config = config.get_text_config()
    name, implementation = config.model_type, attn_implementation or config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        return (
            f"attention {implementation!r} takes no mask that keeps packed sequences apart; "
            "set model.loading.attn_implementation to 'sdpa'"
        )
    reason = architecture_unsupported_reason(config, CHECKED_ARCHITECTURES)
    if reason is not None:
        return reason
    if getattr(config, "alibi", False):
        return f"{name} with alibi has an attention bias by column, whatever the attention mask"
    # transformers ignores the sliding window when it is given a four-dimensional mask
    window = getattr(config, "sliding_window", None)
    if window and longest > window:
        return f"the attention of {name} slides over {window:,} tokens, and the longest sequence has {longest:,}"
    return None


def packed_model_inputs(
    segment_ids: Tensor, parent_ids: Tensor | None = None, attn_implementation: str = "sdpa"
) -> dict[str, Tensor]:
    """Build the model inputs, besides `input_ids`, with which segments do not attend to each other.

    Args:
        segment_ids: (B, T) int64, the segment of each token, from 1 on; 0 is padding.
        parent_ids: (B, T) int64, the parent of the token's segment, -1 for none; None: no segment has one.
        attn_implementation: "sdpa", "eager" or `VARLEN_SDPA`.

    Returns:
        `attention_mask` (B, 1, T, T) in the form of `to_attention_mask`, and `position_ids` (B, T) int64.
    """
    assert attn_implementation in _IMPLEMENTATIONS, attn_implementation
    no_parents = torch.full_like(segment_ids, -1)
    mask = prefix_tree_mask(segment_ids, no_parents if parent_ids is None else parent_ids)  # (B, 1, T, T)
    return {
        "attention_mask": to_attention_mask(mask, attn_implementation),
        "position_ids": packed_position_ids(mask, segment_ids),
    }


def prefix_tree_mask(segment_ids: Tensor, parent_ids: Tensor) -> Tensor:
    """Build the causal mask within a token's own segment and its parent.

    Args:
        segment_ids: (B, T) int64, the segment of each token, from 1 on; 0 is padding, which attends to padding only, so
            that no row of the softmax is empty.
        parent_ids: (B, T) int64, the parent of the token's segment, which must come before it; -1 for none.

    Returns:
        (B, 1, T, T) bool, True where the query (third dimension) attends to the key (last dimension).
    """
    assert segment_ids.shape == parent_ids.shape and segment_ids.ndim == 2
    key = segment_ids.unsqueeze(1)  # (B, 1, T)
    related = (segment_ids.unsqueeze(2) == key) | (parent_ids.unsqueeze(2) == key)  # (B, T, T)
    return related.tril().unsqueeze(1)


def packed_position_ids(mask: Tensor, segment_ids: Tensor) -> Tensor:
    """Compute the position of each token in its sequence; a segment continues the positions of its parent.

    Args:
        mask: (B, 1, T, T) bool, of `prefix_tree_mask`.
        segment_ids: (B, T) int64.

    Returns:
        (B, T) int64, from 0 on; 0 on padding, whose count could exceed the model's positions.
    """
    num_keys = mask.sum(-1).squeeze(1)  # (B, T), the token itself included
    return (num_keys - 1).masked_fill(segment_ids == 0, 0)


def to_attention_mask(mask: Tensor, attn_implementation: str) -> Tensor:
    """Convert a bool mask to what the attention implementation takes.

    Args:
        mask: Bool, any shape, True where a query attends to a key.
        attn_implementation: "sdpa", "eager" or `VARLEN_SDPA`.

    Returns:
        The same shape: `mask` itself, or for eager float32, 0 where it is True and the lowest float32 elsewhere.
    """
    if attn_implementation != "eager":
        return mask
    # eager adds the mask to the scores, where True would count as 1
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, torch.finfo(torch.float32).min)
