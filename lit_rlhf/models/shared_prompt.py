"""The last hidden states of rankings, with every prompt computed once for all its completions.

A ranking's K rows begin with the same tokens, and a causal model computes the same for them. So the prompt goes
through the model with the first completion only, and the others go on from its keys and values; gradients flow back
through these. Against K separate rows that is exact up to rounding.

Where no keys and values are kept (gradient checkpointing recomputes its layers), prompt and completions lie in one row
behind each other, under a mask that keeps the completions apart.

Shapes: `N` completions of all rankings of a batch, `T` width, `D` of the model.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.models.loading import maximum_length


class RankedRows(NamedTuple):
    """Completions behind their prompts; the rows of a ranking lie together."""

    input_ids: Tensor  # (N, T) int64, right-padded
    attention_mask: Tensor  # (N, T), 1 = real token
    prompt_length: Tensor  # (N,) int64, tokens of a row that are its prompt
    ranking: Tensor  # (N,) int64, 0 .. G-1 in this order

    @property
    def length(self) -> Tensor:
        """Real tokens of each row, (N,)."""
        return self.attention_mask.sum(1)


def last_hidden(model: PreTrainedModel, rows: RankedRows, shared_prompt: bool = True) -> Tensor:
    """Hidden state of the last token of each completion.

    Args:
        model: with a `base_model` that is causal.
        rows: the completions.
        shared_prompt: compute a prompt once for all its completions, where `reason_against_sharing` has none.

    Returns:
        (N, D).
    """
    if not shared_prompt or reason_against_sharing(model):
        return last_hidden_of_rows(model, rows)
    return last_hidden_through_cache(model, rows)


def last_hidden_of_rows(model: PreTrainedModel, rows: RankedRows) -> Tensor:
    """Hidden state of each row's last token, every row computed whole: K rows a ranking.

    Returns:
        (N, D).
    """
    mask = rows.attention_mask
    hidden = _hidden(model, rows.input_ids, mask, position_ids(mask), use_cache=False)  # (N, T, D)
    return hidden[torch.arange(len(hidden), device=hidden.device), rows.length - 1]


def last_hidden_through_cache(model: PreTrainedModel, rows: RankedRows) -> Tensor:
    """The same, with the prompt computed in the first row of each ranking and continued in the others.

    Returns:
        (N, D).
    """
    length, device = rows.length, rows.input_ids.device
    leads = torch.diff(rows.ranking, prepend=rows.ranking[:1] - 1) != 0  # (N,) bool: the first of its ranking
    lead, rest = leads.nonzero().squeeze(1), (~leads).nonzero().squeeze(1)
    width, prompts = int(length[lead].max()), int(rows.prompt_length.max())
    mask = rows.attention_mask[lead, :width]
    cache = DynamicCache()
    hidden = _hidden(model, rows.input_ids[lead, :width], mask, position_ids(mask), past_key_values=cache)
    first = hidden[torch.arange(len(lead), device=device), length[lead] - 1]
    if not len(rest):
        return first
    owner = rows.ranking[rest]
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


def reason_against_sharing(model: PreTrainedModel) -> str | None:
    """Why rows must be computed whole, or None where their prompt may be shared.

    It depends on the model alone, not on a batch: ranks that share weights must make the same passes.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if model._is_stateful or kinds - {"full_attention", "sliding_attention"}:
        return f"{config.model_type} has layers that carry a state over every token before"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < (maximum_length(config) or math.inf):
        return f"the attention of {config.model_type} slides over {window:,} tokens"
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing keeps no keys and values to go on from"
    return None


def _hidden(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, positions: Tensor, **settings: Any) -> Tensor:
    return model.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, **{"use_cache": True, **settings}
    )[0]
