"""The last hidden states of rankings, with every prompt computed once for all its completions.

A ranking's K rows begin with the same tokens, and a causal model computes the same for them. So the prompt goes
through the model with the first completion only, and the others go on from its keys and values; gradients flow back
through these. Against K separate rows that is exact up to rounding.

Where no keys and values are kept (gradient checkpointing recomputes its layers), prompt and completions lie in one row
behind each other, under a mask that keeps the completions apart. That too is exact, and cheaper than K rows as long as
the completions are not much longer than the prompt.

Shapes: `N` completions of all rankings of a batch, `T` width, `D` of the model.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_rlhf.functional import forward_flops, position_ids
from lit_rlhf.models.loading import max_positions
from lit_rlhf.packing.attention_masks import packed_model_inputs, packing_unsupported_reason


class RankingInputs(NamedTuple):
    """Completions behind their prompts; the rows of a ranking lie together."""

    input_ids: Tensor  # (N, T) int64, right-padded
    attention_mask: Tensor  # (N, T), 1 = real token
    prompt_length: Tensor  # (N,) int64, tokens of a row that are its prompt
    ranking_index: Tensor  # (N,) int64, 0 .. G-1 in this order

    @property
    def length(self) -> Tensor:
        """Real tokens of each row, (N,)."""
        return self.attention_mask.sum(1)


def last_hidden_state(model: PreTrainedModel, rows: RankingInputs, shared_prompt: bool = True) -> Tensor:
    """Hidden state of the last token of each completion.

    Args:
        model: with a `base_model` that is causal.
        rows: the completions.
        shared_prompt: compute a prompt once for all its completions, where `prefix_sharing_unsupported_reason` has none.

    Returns:
        (N, D).
    """
    if shared_prompt and prefix_sharing_unsupported_reason(model) is None:
        if not _uses_gradient_checkpointing(model):
            return last_hidden_with_prefix_cache(model, rows)
        layout = pack_rankings(rows)
        if _cost(layout.input_ids, model) < _cost(rows.input_ids, model):
            return last_hidden_packed(model, layout)
    return last_hidden_per_row(model, rows)


def last_hidden_per_row(model: PreTrainedModel, rows: RankingInputs) -> Tensor:
    """Hidden state of each row's last token, every row computed whole: K rows a ranking.

    Returns:
        (N, D).
    """
    mask = rows.attention_mask
    hidden = _hidden(model, rows.input_ids, mask, position_ids(mask), use_cache=False)  # (N, T, D)
    return hidden[torch.arange(len(hidden), device=hidden.device), rows.length - 1]


def last_hidden_with_prefix_cache(model: PreTrainedModel, rows: RankingInputs) -> Tensor:
    """The same, with the prompt computed in the first row of each ranking and continued in the others.

    Returns:
        (N, D).
    """
    length, device = rows.length, rows.input_ids.device
    leads = (
        torch.diff(rows.ranking_index, prepend=rows.ranking_index[:1] - 1) != 0
    )  # (N,) bool: the first of its ranking
    lead, rest = leads.nonzero().squeeze(1), (~leads).nonzero().squeeze(1)
    width, prompts = int(length[lead].max()), int(rows.prompt_length.max())
    mask = rows.attention_mask[lead, :width]
    cache = DynamicCache()
    hidden = _hidden(model, rows.input_ids[lead, :width], mask, position_ids(mask), past_key_values=cache)
    first = hidden[torch.arange(len(lead), device=device), length[lead] - 1]
    if not len(rest):
        return first
    owner = rows.ranking_index[rest]
    for layer in cache.layers:  # of each completion, the keys and values of its prompt
        layer.keys, layer.values = layer.keys[owner, :, :prompts], layer.values[owner, :, :prompts]
    start, end = rows.prompt_length[rest, None], length[rest, None]
    column = start + torch.arange(int((end - start).max()), device=device)  # (M, C): place in the separate row
    real = column < end
    ids = rows.input_ids[rest].gather(1, column.clamp_max(rows.input_ids.shape[1] - 1))
    # behind a prompt that is shorter than the longest lie keys of the first completion: not to be seen
    seen = torch.cat([torch.arange(prompts, device=device) < start, real], 1).long()  # (M, P + C)
    hidden = _hidden(model, ids, seen, column.where(real, 0), past_key_values=cache)
    others = hidden[torch.arange(len(rest), device=device), (end - start).squeeze(1) - 1]
    return torch.cat([first, others])[torch.argsort(torch.cat([lead, rest]))]


class PackedRankings(NamedTuple):
    """Rankings as rows of segments: each a prompt and its completions behind each other; `G` rankings."""

    input_ids: Tensor  # (G, W) int64
    segment: Tensor  # (G, W) int64: 1 the prompt, 2 .. K+1 the completions, 0 padding
    parent: Tensor  # (G, W) int64: 1 for completions, -1 else
    line: Tensor  # (N,) int64, where the last token of each completion lies
    column: Tensor  # (N,) int64


def pack_rankings(rows: RankingInputs) -> PackedRankings:
    """Return the rankings with each prompt written once."""
    length, place = rows.length, torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    leads = torch.diff(rows.ranking_index, prepend=rows.ranking_index[:1] - 1) != 0
    lead = leads.nonzero().squeeze(1)  # (G,)
    start = torch.where(leads, 0, rows.prompt_length)  # the lead brings the prompt along
    taken = length - start
    before = taken.cumsum(0) - taken
    offset = before - before[lead][rows.ranking_index]  # (N,): where a row's part begins in its ranking's row
    number = torch.arange(len(leads), device=place.device) - lead[rows.ranking_index] + 2  # segment of each completion
    kept = (place >= start[:, None]) & (place < length[:, None])  # (N, T)
    line = rows.ranking_index[:, None].expand_as(kept)[kept]
    column = (offset[:, None] + place - start[:, None])[kept]
    segments = torch.where(place < rows.prompt_length[:, None], 1, number[:, None])
    shape = (len(lead), int((offset + taken).max()))
    ids, segment = (rows.input_ids.new_zeros(shape) for _ in range(2))
    ids[line, column], segment[line, column] = rows.input_ids[kept], segments[kept]
    return PackedRankings(ids, segment, torch.where(segment > 1, 1, -1), rows.ranking_index, offset + taken - 1)


def last_hidden_packed(model: PreTrainedModel, layout: PackedRankings) -> Tensor:
    """The same, with a ranking's prompt and completions in one row, under a mask that keeps completions apart.

    Returns:
        (N, D).
    """
    inputs = packed_model_inputs(layout.segment, layout.parent, model.config._attn_implementation)
    hidden = _hidden(model, layout.input_ids, inputs["attention_mask"], inputs["position_ids"], use_cache=False)
    return hidden[layout.line, layout.column]


def _cost(input_ids: Tensor, model: PreTrainedModel) -> int:
    """What a pass over (B, T) costs: long completions in one row take more attention than a prompt twice."""
    rows, width = input_ids.shape
    return forward_flops(rows, width, int(model.config.get_text_config().hidden_size))


def _uses_gradient_checkpointing(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is at work, which keeps no keys and values to go on from."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def prefix_sharing_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why rows must be computed whole, or None where their prompt may be shared.

    It depends on the model alone, not on a batch: ranks that share weights must make the same passes.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if model._is_stateful or kinds - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers that carry a state over every token before"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < (max_positions(config) or math.inf):
        return f"the attention of {config.model_type} slides over {window:,} tokens"
    return (
        packing_unsupported_reason(config, config._attn_implementation, 0)
        if _uses_gradient_checkpointing(model)
        else None
    )


def _hidden(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, positions: Tensor, **settings: Any) -> Tensor:
    return model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, **{"use_cache": True, **settings}
    )[0]
