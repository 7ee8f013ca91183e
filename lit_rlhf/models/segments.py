"""A model over rows that hold several segments, such as a prompt and its responses.

The one place that knows how transformers takes a mask of who sees whom, and which architectures keep to it.
"""

import inspect
import sys

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PretrainedConfig

from lit_rlhf.functional import segment_mask, segment_positions

#: the attention of `lit_rlhf.models.sequences`, which is "sdpa" under a mask
SEQUENCES = "lit_rlhf_sequences"
_ATTENTIONS = ("sdpa", "eager", SEQUENCES)
_LAYERS = ("full_attention", "sliding_attention")


def reason_against_segments(config: PretrainedConfig, attention: str, longest: int) -> str | None:
    """Why a model would not compute the segments of a row as it computes them in rows of their own.

    Read from the configuration and the architecture's code, before any weight.

    Args:
        config: of the model.
        attention: the attention implementation (`ModelOptions.attention`).
        longest: tokens of the longest sequence: of a segment, with the one that it continues.

    Returns:
        None where the two differ by rounding alone.
    """
    config = config.get_text_config()
    kind = config.model_type
    if attention not in _ATTENTIONS:
        return f"attention {attention!r} takes no mask of who sees whom; set model.options.attention to 'sdpa'"
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


def segment_inputs(segment: Tensor, parent: Tensor | None = None, attention: str = "sdpa") -> dict[str, Tensor]:
    """What a model takes, beside `input_ids`, so that segments see nothing of each other.

    Args:
        segment: (B, T) int64, the segment of each token, from 1 on; 0 is padding.
        parent: (B, T) int64, the segment that the token's segment continues, -1 for none; None: no segment does.
        attention: the attention implementation: "sdpa", "eager" or `SEQUENCES`.

    Returns:
        `attention_mask` (B, 1, T, T), True where a token is seen (for eager: 0 there and a very low float32 elsewhere),
        and `position_ids` (B, T) int64, from 0 on in each segment that continues none.
    """
    assert attention in _ATTENTIONS, attention
    seen = segment_mask(segment, torch.full_like(segment, -1) if parent is None else parent)  # (B, 1, T, T)
    return {"attention_mask": seen_mask(seen, attention), "position_ids": segment_positions(seen, segment)}


def seen_mask(seen: Tensor, attention: str) -> Tensor:
    """Return the mask that a model takes, from one that is True where a token is seen, (B, 1, any, any).

    Args:
        seen: bool.
        attention: the attention implementation: "sdpa", "eager" or `SEQUENCES`.
    """
    if attention != "eager":
        return seen
    # eager adds the mask to the scores: True would be 1
    return torch.zeros_like(seen, dtype=torch.float32).masked_fill_(~seen, torch.finfo(torch.float32).min)
