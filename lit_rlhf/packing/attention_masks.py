"""A model over rows that hold several segments, such as a prompt and its responses.

The one place that knows how transformers takes a mask of who sees whom, and which architectures keep to it.
"""

import inspect
import sys

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PretrainedConfig

from lit_rlhf.functional import packed_position_ids, prefix_tree_mask

#: the attention of `lit_rlhf.packing.varlen_attention`, which is "sdpa" under a mask
VARLEN_SDPA = "lit_rlhf_sequences"
_ATTENTIONS = ("sdpa", "eager", VARLEN_SDPA)
_LAYERS = ("full_attention", "sliding_attention")


def packing_unsupported_reason(config: PretrainedConfig, attn_implementation: str, longest: int) -> str | None:
    """Why a model would not compute the segments of a row as it computes them in rows of their own.

    Read from the configuration and the architecture's code, before any weight.

    Args:
        config: of the model.
        attn_implementation: the attention implementation (`ModelLoadingConfig.attention`).
        longest: tokens of the longest sequence: of a segment, with the one that it continues.

    Returns:
        None where the two differ by rounding alone.
    """
    config = config.get_text_config()
    kind = config.model_type
    if attn_implementation not in _ATTENTIONS:
        return f"attention {attn_implementation!r} takes no mask of who sees whom; set model.loading.attn_implementation to 'sdpa'"
    if type(config) not in MODEL_MAPPING:
        return f"{kind} is no architecture of transformers itself, and what its code makes of a mask is not known"
    architecture = MODEL_MAPPING[type(config)]
    if architecture._is_stateful or set(getattr(config, "layer_types", None) or ()) - set(_LAYERS):
        return f"{kind} has layers that carry a state over every token before, whatever a mask says"
    if "position_ids" not in inspect.signature(architecture.forward).parameters:
        return f"{kind} takes no positions, which must begin anew in each segment"
    if not hasattr(sys.modules[architecture.__module__], "create_causal_mask"):
        return f"{kind} does not take a mask of who sees whom as it is"
    # transformers leaves the window away under a mask of our own
    window = getattr(config, "sliding_window", None)
    if window and longest > window:
        return f"the attention of {kind} slides over {window:,} tokens, and the longest sequence has {longest:,}"
    return None


def packed_model_inputs(
    segment_ids: Tensor, parent_ids: Tensor | None = None, attn_implementation: str = "sdpa"
) -> dict[str, Tensor]:
    """What a model takes, beside `input_ids`, so that segments see nothing of each other.

    Args:
        segment_ids: (B, T) int64, the segment of each token, from 1 on; 0 is padding.
        parent_ids: (B, T) int64, the segment that the token's segment continues, -1 for none; None: no segment does.
        attn_implementation: the attention implementation: "sdpa", "eager" or `VARLEN_SDPA`.

    Returns:
        `attention_mask` (B, 1, T, T), True where a token is seen (for eager: 0 there and a very low float32 elsewhere),
        and `position_ids` (B, T) int64, from 0 on in each segment that continues none.
    """
    assert attn_implementation in _ATTENTIONS, attn_implementation
    visible = prefix_tree_mask(
        segment_ids, torch.full_like(segment_ids, -1) if parent_ids is None else parent_ids
    )  # (B, 1, T, T)
    return {
        "attention_mask": to_attention_mask(visible, attn_implementation),
        "position_ids": packed_position_ids(visible, segment_ids),
    }


def to_attention_mask(visible: Tensor, attn_implementation: str) -> Tensor:
    """Return the mask that a model takes, from one that is True where a token is seen, (B, 1, any, any).

    Args:
        visible: bool.
        attn_implementation: the attention implementation: "sdpa", "eager" or `VARLEN_SDPA`.
    """
    if attn_implementation != "eager":
        return visible
    # eager adds the mask to the scores: True would be 1
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill_(~visible, torch.finfo(torch.float32).min)
