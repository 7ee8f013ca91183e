"""Last hidden states of rankings, with each prompt computed once for all its completions.

A ranking's K rows begin with the same tokens, for which a causal model computes the same. So prompt and completions
are packed, as responses are (`lit_rlhf.packing.packed_batch`), which leaves next to no padding; or the prompt is
computed with the first completion only, and the others continue from its keys and values, through which gradients flow
back: fewer tokens to attend to where completions are long. Both equal K separate rows up to rounding.

Shapes: `N` completions of all rankings of a batch, `T` tokens, `D` hidden size.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import embedding
from transformers import DynamicCache, PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.packing.architectures import CONTINUES_A_CACHE, architecture_unsupported_reason
from lit_rlhf.packing.attention_masks import packing_unsupported_reason
from lit_rlhf.packing.bin_packing import forward_flops
from lit_rlhf.packing.packed_batch import PackedBatch, pack_units
from lit_rlhf.packing.selective_logits import select_positions
from lit_rlhf.packing.varlen_attention import can_use_varlen_kernel

# the pass that continues a prompt reads all weights again, for short rows: at equal cost it was slower by a quarter
WORTH_A_PASS = 0.8


class RankingInputs(NamedTuple):
    """Prompts followed by completions; the rows of a ranking are consecutive."""

    input_ids: Tensor  # (N, T) int64, right-padded
    attention_mask: Tensor  # (N, T), 1 = real token
    prompt_length: Tensor  # (N,) int64, prompt tokens of a row
    ranking_index: Tensor  # (N,) int64, 0 .. G-1, ascending

    @property
    def length(self) -> Tensor:
        """Real tokens of each row, (N,) int64."""
        return self.attention_mask.sum(1)


def last_hidden_state(model: PreTrainedModel, rows: RankingInputs, shared_prompt: bool = True) -> Tensor:
    """Compute the hidden state of the last token of each completion.

    Args:
        model: With a causal `base_model`.
        rows: The completions.
        shared_prompt: Compute a prompt once for all its completions, unless `prefix_sharing_unsupported_reason`.

    Returns:
        (N, D).
    """
    if not shared_prompt or prefix_sharing_unsupported_reason(model) is not None:
        return last_hidden_per_row(model, rows)
    can_continue = not _uses_gradient_checkpointing(model)  # which recomputes layers and keeps no keys and values
    if packing_unsupported_reason(model.config, 0) is not None:
        return last_hidden_with_prefix_cache(model, rows)
    by_kernel = can_use_varlen_kernel(model, rows.input_ids.device)  # which costs the same in any row
    # ranks that share weights must make as many passes, whatever their batches are
    if can_continue and not by_kernel and _is_sharded(model):
        return last_hidden_with_prefix_cache(model, rows)
    batch = pack_rankings(model, rows)
    if not by_kernel:
        packed = _cost(model, *batch.input_ids.shape)
        if can_continue and _prefix_cache_cost(model, rows) < WORTH_A_PASS * packed:
            return last_hidden_with_prefix_cache(model, rows)
        if not can_continue and _cost(model, *rows.input_ids.shape) <= packed:
            return last_hidden_per_row(model, rows)
    hidden = model.base_model(**batch.model_inputs, use_cache=False)[0]
    return select_positions(hidden, batch.last_token_index)


def last_hidden_per_row(model: PreTrainedModel, rows: RankingInputs) -> Tensor:
    """Compute the hidden state of each row's last token from K full rows per ranking.

    Returns:
        (N, D).
    """
    mask = rows.attention_mask
    hidden = _hidden(model, rows.input_ids, mask, position_ids(mask))  # (N, T, D)
    return hidden[torch.arange(len(hidden), device=hidden.device), rows.length - 1]


def last_hidden_with_prefix_cache(model: PreTrainedModel, rows: RankingInputs) -> Tensor:
    """Compute the same from the first row of each ranking, whose prompt's keys and values the others continue.

    Returns:
        (N, D).
    """
    length, device = rows.length, rows.input_ids.device
    is_first = _is_first(rows)
    first, rest = is_first.nonzero().squeeze(1), (~is_first).nonzero().squeeze(1)
    width, prompts = int(length[first].max()), int(rows.prompt_length.max())
    mask = rows.attention_mask[first, :width]
    cache = DynamicCache()
    hidden = _hidden(model, rows.input_ids[first, :width], mask, position_ids(mask), cache)
    first_hidden = hidden[torch.arange(len(first), device=device), length[first] - 1]
    if not len(rest):
        return first_hidden
    ranking = rows.ranking_index[rest]
    for layer in cache.layers:  # of each completion, the keys and values of its prompt
        layer.keys, layer.values = (
            # as in `select_positions`
            embedding(ranking, states[:, :, :prompts].flatten(1)).view(-1, *states[0, :, :prompts].shape)
            for states in (layer.keys, layer.values)
        )
    start, end = rows.prompt_length[rest, None], length[rest, None]
    column = start + torch.arange(int((end - start).max()), device=device)  # (M, C), column of the separate row
    real = column < end
    ids = rows.input_ids[rest].gather(1, column.clamp_max(rows.input_ids.shape[1] - 1))
    # after a prompt shorter than the longest, the cache holds keys of the first completion: masked out
    mask = torch.cat([torch.arange(prompts, device=device) < start, real], 1).long()  # (M, P + C)
    hidden = _hidden(model, ids, mask, column.where(real, 0), cache)
    rest_hidden = hidden[torch.arange(len(rest), device=device), (end - start).squeeze(1) - 1]
    return torch.cat([first_hidden, rest_hidden])[torch.argsort(torch.cat([first, rest]))]


def pack_rankings(model: PreTrainedModel, rows: RankingInputs) -> PackedBatch:
    """Pack rankings with each prompt once; a response of the packed batch is a completion.

    Args:
        model: That will compute the batch.
        rows: The completions.
    """
    length, start = rows.length[:, None], rows.prompt_length[:, None]  # (N, 1)
    prompt_width, completion_width = int(start.max()), int((length - start).max())
    offset = torch.arange(prompt_width + completion_width, device=start.device) - prompt_width
    column = start + offset  # (N, P + C): left-padded prompt, right-padded completion
    real = (column >= 0) & (column < length)
    ids = rows.input_ids.gather(1, column.clamp(0, rows.input_ids.shape[1] - 1))
    return pack_units(ids, real, completion_width, [model], ids.device)


def _cost(model: PreTrainedModel, rows: int, width: int) -> int:
    """Estimate the cost of a batch; attention over a row of long completions can cost more than K prompts."""
    return forward_flops(rows, width, int(model.config.get_text_config().hidden_size))


def _prefix_cache_cost(model: PreTrainedModel, rows: RankingInputs) -> int:
    """Estimate the cost of `last_hidden_with_prefix_cache`."""
    is_first = _is_first(rows)
    first = _cost(model, int(is_first.sum()), int(rows.length[is_first].max()))
    completions = (rows.length - rows.prompt_length)[~is_first]
    if not len(completions):
        return first
    keys = int(rows.prompt_length.max()) + int(completions.max())
    return first + _cost(model, len(completions), keys) * int(completions.max()) // keys


def _is_first(rows: RankingInputs) -> Tensor:
    """Return which rows are the first of their ranking, (N,) bool."""
    return torch.diff(rows.ranking_index, prepend=rows.ranking_index[:1] - 1) != 0


def _is_sharded(model: PreTrainedModel) -> bool:
    """Whether ranks share the weights, so that every pass waits for that of all others."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _uses_gradient_checkpointing(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is active: its layers return no keys and values to continue from."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def prefix_sharing_unsupported_reason(model: PreTrainedModel) -> str | None:
    """Return why every row must be computed in full, or None where completions can share their prompt.

    It depends on the model alone, never on a batch: ranks that share weights must make the same forward passes.
    """
    config = model.config.get_text_config()
    reason = architecture_unsupported_reason(config, CONTINUES_A_CACHE)
    if reason is not None:
        return reason
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < (getattr(config, "max_position_embeddings", None) or math.inf):
        return f"the attention of {config.model_type} slides over {window:,} tokens"
    return packing_unsupported_reason(config, 0) if _uses_gradient_checkpointing(model) else None


def _hidden(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None = None
) -> Tensor:
    """Return the last layer's output, (B, T, D)."""
    inputs: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    inputs |= {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    return model.base_model(**inputs, use_cache=cache is not None)[0]
