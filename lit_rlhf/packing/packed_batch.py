"""Prompts and responses packed into rows, so that a forward pass computes few tokens twice and little padding.

In a padded batch rows are as wide as the longest, and the samples of one prompt all repeat it. Here a *unit* is the
prompt once, followed by its responses, and a row concatenates several units under a mask that keeps them apart. A model
computes the same, up to rounding.

Shapes: `B` sequences, `P` prompt, `R` response, `T = P + R`, `U` units, `L` rows of `W` tokens, `n` response tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.packing.attention_masks import packed_model_inputs, packing_unsupported_reason
from lit_rlhf.packing.bin_packing import forward_flops, pack_balanced
from lit_rlhf.packing.selective_logits import logits_at_positions


class PackedBatch(NamedTuple):
    """Model inputs, and the indices of the tokens in them."""

    input_ids: Tensor  # (L, W) int64
    attention_mask: Tensor  # (L, W), or (L, 1, W, W) where rows hold several sequences
    position_ids: Tensor  # (L, W) int64
    response_mask: Tensor  # (B, R) bool
    response_tokens: Tensor  # (n,) int64, in the order of `response_mask`
    predictor_index: tuple[Tensor, Tensor]  # (n,) int64 each: row and column of the token before each response token
    last_token_index: tuple[Tensor, Tensor]  # (B,) int64 each: row and column of the last token of each sequence
    num_padding: int  # of the L x W tokens

    def scatter_to_responses(self, values: Tensor) -> Tensor:
        """Scatter one value per response token, (n,), to (B, R); 0 elsewhere."""
        table = values.new_zeros(self.response_mask.shape)
        table[self.response_mask] = values
        return table


def pack_batch(input_ids: Tensor, attention_mask: Tensor, response_width: int, *models: PreTrainedModel) -> PackedBatch:
    """Pack a batch, or keep one sequence per row where packing gains nothing or a model does not support it.

    Args:
        input_ids: (B, T) int64: left-padded prompt, then right-padded response. Consecutive rows with equal prompts
            share one.
        attention_mask: (B, T), 1 = real token; at least one in each prompt.
        response_width: R.
        models: Those that will compute the batch; the first one's size decides the width of the rows.
    """
    prompt_width, lengths = input_ids.shape[1] - response_width, attention_mask.sum(1)
    no_padding = bool((lengths == input_ids.shape[1]).all())
    nothing_to_gain = no_padding and not bool(same_prompt_as_previous(input_ids, attention_mask, prompt_width).any())
    longest = int(lengths.max())
    if nothing_to_gain or any(packing_unsupported_reason(model.config, longest) for model in models):
        return _keep_rows(input_ids, attention_mask, prompt_width)
    return pack_units(input_ids, attention_mask, response_width, models[0])


def length_bucketed_chunks(
    input_ids: Tensor, attention_mask: Tensor, response_width: int, batch_size: int
) -> Iterator[tuple[Tensor, slice, int]]:
    """Split a batch into chunks of rows of similar length, without the columns that are padding in the full chunk.

    Consecutive rows with equal prompts stay consecutive.

    Args:
        input_ids: (B, T) int64: left-padded prompt, then right-padded response.
        attention_mask: (B, T), 1 = real token.
        response_width: R.
        batch_size: Most rows per chunk.

    Yields:
        The rows (b,), the slice of the T columns to keep, and how many of these are of responses.
    """
    prompt_width = attention_mask.shape[1] - response_width
    prompts = attention_mask[:, :prompt_width].sum(1)
    responses = attention_mask[:, prompt_width:].sum(1)
    unit = (~same_prompt_as_previous(input_ids, attention_mask, prompt_width)).cumsum(0) - 1  # (B,)
    longest = torch.zeros_like(unit).scatter_reduce_(0, unit, prompts + responses, "amax")
    order = torch.argsort(torch.argsort(torch.argsort(longest, stable=True))[unit], stable=True)
    for chunk in torch.split(order, batch_size):
        left = prompt_width - int(prompts[chunk].max())
        width = max(int(responses[chunk].max()), 1)
        yield chunk, slice(left, prompt_width + width), width


def same_prompt_as_previous(input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> Tensor:
    """Whether a row has the prompt of the row before it, (B,) bool."""
    prompts = torch.where(attention_mask.bool(), input_ids, -1)[:, :prompt_width]
    return torch.cat([prompts.new_zeros(1), (prompts[1:] == prompts[:-1]).all(1)]).bool()


def _keep_rows(input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> PackedBatch:
    """Return the batch as it is, one sequence per row."""
    mask = attention_mask[:, prompt_width:].bool()
    row, column = mask.nonzero(as_tuple=True)
    return PackedBatch(
        input_ids,
        attention_mask,
        position_ids(attention_mask),
        response_mask=mask,
        response_tokens=input_ids[:, prompt_width:][mask],
        predictor_index=(row, prompt_width - 1 + column),
        last_token_index=(torch.arange(len(mask), device=mask.device), prompt_width + mask.sum(1) - 1),
        num_padding=attention_mask.numel() - int(attention_mask.sum()),
    )


def pack_units(input_ids: Tensor, attention_mask: Tensor, response_width: int, model: PreTrainedModel) -> PackedBatch:
    """Pack units of a prompt and its responses, several per row. Arguments as for `pack_batch`."""
    prompt_width, device, real = input_ids.shape[1] - response_width, input_ids.device, attention_mask.bool()
    mask = real[:, prompt_width:]
    prompts, responses = real[:, :prompt_width].sum(1), mask.sum(1)
    is_first = ~same_prompt_as_previous(input_ids, attention_mask, prompt_width)
    unit, first = is_first.cumsum(0) - 1, is_first.nonzero().squeeze(1)  # (B,) unit of a sequence; (U,) its first one
    added = responses + torch.where(is_first, prompts, 0)  # (B,) tokens that a sequence adds to its unit
    before = added.cumsum(0) - added
    size = torch.zeros_like(first).index_add_(0, unit, added)  # (U,)
    unit_row, unit_start = _assign_rows(size.tolist(), model, device)
    # (B,) first column of a response: after the prompt and the responses before it
    start = unit_start[unit] + before - before[first][unit] + torch.where(is_first, prompts, 0)
    offset = torch.arange(response_width, device=device)
    row, column = unit_row[unit], start[:, None] + offset  # (B,), (B, R)
    shape = (int(unit_row.max()) + 1, int((unit_start + size).max()))
    ids, segment = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(2))
    parent = torch.full(shape, -1, dtype=torch.long, device=device)
    # segment ids: 1 + unit of a prompt, numbers above all of these of responses
    response_segment = 1 + len(first) + torch.arange(len(mask), device=device)
    source = mask.nonzero(as_tuple=True)
    target = row[source[0]], column[source]
    ids[target] = input_ids[:, prompt_width:][source]
    segment[target], parent[target] = response_segment[source[0]], 1 + unit[source[0]]
    source = real[first, :prompt_width].nonzero(as_tuple=True)
    target = unit_row[source[0]], unit_start[source[0]] + source[1] - (prompt_width - prompts[first][source[0]])
    ids[target], segment[target] = input_ids[first, :prompt_width][source], 1 + source[0]
    prompt_end = (unit_start + prompts[first] - 1)[unit]  # (B,)
    predictor = torch.where(offset == 0, prompt_end[:, None], column - 1)  # (B, R)
    return PackedBatch(
        ids,
        **packed_model_inputs(segment, parent, model.config.get_text_config()._attn_implementation),
        response_mask=mask,
        response_tokens=input_ids[:, prompt_width:][mask],
        predictor_index=(row[:, None].expand_as(mask)[mask], predictor[mask]),
        last_token_index=(row, torch.where(responses > 0, start + responses - 1, prompt_end)),
        num_padding=segment.numel() - int(size.sum()),
    )


def _assign_rows(sizes: list[int], model: PreTrainedModel, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and first column of each unit, (U,) int64 each, at the cheapest of several row widths."""
    longest, hidden_size = max(sizes), int(model.config.get_text_config().hidden_size)

    def cost(rows: list[list[int]]) -> int:
        return forward_flops(len(rows), max(sum(sizes[unit] for unit in row) for row in rows), hidden_size)

    packed = min((pack_balanced(sizes, longest * quarters // 4) for quarters in (4, 5, 6, 7, 8, 10, 12)), key=cost)
    row_of, start = [0] * len(sizes), [0] * len(sizes)
    for number, units in enumerate(packed):
        column = 0
        for unit in units:
            row_of[unit], start[unit] = number, column
            column += sizes[unit]
    return torch.tensor(row_of, device=device), torch.tensor(start, device=device)


def response_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute the logits of the response tokens alone, (n, V): the `lm_head` gets no other position.

    Args:
        model: A causal language model, or the strategy's wrapper of one.
        batch: Of `pack_batch`.
    """
    masks = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return logits_at_positions(model, *batch.predictor_index, input_ids=batch.input_ids, **masks)
