"""Prompts and responses laid out so that a pass computes little twice and little padding.

In a batch of responses, rows are as wide as the longest, and the samples of one prompt all repeat it. Here the prompt
is written once with its responses behind each other, as many such units behind each other as fit a row, under a mask
that keeps them apart. What a model computes is the same up to rounding.

Shapes: `B` episodes, `P` prompt, `R` response, `T = P + R`, `L` rows of `W` tokens, `n` response tokens of the batch.
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
    """A batch as a model is to compute it, and where its tokens lie."""

    input_ids: Tensor  # (L, W) int64
    attention_mask: Tensor  # (L, W), or (L, 1, W, W) where rows hold several units
    position_ids: Tensor  # (L, W) int64
    response_mask: Tensor  # (B, R) bool
    response_tokens: Tensor  # (n,) int64, the response tokens, in the order of `response_mask`
    row_index: Tensor  # (n,) int64, the row of each of them
    column_index: Tensor  # (n,) int64, and where in it the token before it lies, whose output predicts it
    last_token_index: tuple[Tensor, Tensor]  # (B,) int64 each: row and column of the last token of each episode
    num_padding: int  # of the L x W tokens

    @property
    def predictor_index(self) -> tuple[Tensor, Tensor]:
        """Where the token before each response token lies: rows and columns, (n,) each."""
        return self.row_index, self.column_index

    def scatter_to_responses(self, values: Tensor) -> Tensor:
        """Return what was computed for response tokens, (n,), in their places, (B, R), 0 elsewhere."""
        table = values.new_zeros(self.response_mask.shape)
        table[self.response_mask] = values
        return table


def pack_batch(input_ids: Tensor, attention_mask: Tensor, response_width: int, *models: PreTrainedModel) -> PackedBatch:
    """Return the layout that costs the models least, and that all of them can compute.

    Args:
        input_ids: (B, T) int64: left-padded prompt, then right-padded response. Rows of one prompt that follow each
            other share it.
        attention_mask: (B, T), 1 = real token; at least one of each prompt.
        response_width: R.
        models: what is to compute it: their architectures decide what a mask can say.
    """
    prompt_width, lengths = input_ids.shape[1] - response_width, attention_mask.sum(1)
    # rows of one length, each with a prompt of its own, are best as they are
    nothing_to_gain = bool((lengths == input_ids.shape[1]).all()) and not bool(
        same_prompt_as_previous(input_ids, attention_mask, prompt_width).any()
    )
    if nothing_to_gain or not all(_supports_packing(model, int(lengths.max())) for model in models):
        return _unpacked(input_ids, attention_mask, prompt_width)
    return _packed(input_ids, attention_mask, prompt_width, models[0])


def _supports_packing(model: PreTrainedModel, longest: int) -> bool:
    config = model.config.get_text_config()
    return packing_unsupported_reason(config, config._attn_implementation, longest) is None


def length_bucketed_chunks(
    input_ids: Tensor, attention_mask: Tensor, response_width: int, batch_size: int
) -> Iterator[tuple[Tensor, slice, int]]:
    """Cut a batch into chunks of rows of like length, with the columns that are padding in all of them left out.

    Rows of one prompt that follow each other go on doing so.

    Args:
        input_ids: (B, T).
        attention_mask: (B, T).
        response_width: R.
        batch_size: rows a chunk.

    Yields:
        the rows (b,), the columns of (B, T) to keep, and the response width that remains.
    """
    prompt_width = attention_mask.shape[1] - response_width
    prompts = attention_mask[:, :prompt_width].sum(1)
    responses = attention_mask[:, prompt_width:].sum(1)
    run = (~same_prompt_as_previous(input_ids, attention_mask, prompt_width)).cumsum(0) - 1  # (B,)
    longest = torch.zeros_like(run).scatter_reduce_(0, run, prompts + responses, "amax")
    order = torch.argsort(torch.argsort(torch.argsort(longest, stable=True))[run], stable=True)
    for chunk in torch.split(order, batch_size):
        left = prompt_width - int(prompts[chunk].max())
        width = max(int(responses[chunk].max()), 1)
        yield chunk, slice(left, prompt_width + width), width


def same_prompt_as_previous(input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> Tensor:
    """Whether a row has the prompt of the row before it, (B,) bool."""
    prompts = torch.where(attention_mask.bool(), input_ids, -1)[:, :prompt_width]
    return torch.cat([prompts.new_zeros(1), (prompts[1:] == prompts[:-1]).all(1)]).bool()


def _unpacked(input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> PackedBatch:
    """An episode a row, as they are."""
    mask = attention_mask[:, prompt_width:].bool()
    line, token = mask.nonzero(as_tuple=True)
    last = prompt_width + mask.sum(1) - 1
    rows = torch.arange(len(mask), device=mask.device)
    positions = position_ids(attention_mask)
    padding = attention_mask.numel() - int(attention_mask.sum())
    tokens, column = input_ids[:, prompt_width:][mask], prompt_width - 1 + token
    return PackedBatch(input_ids, attention_mask, positions, mask, tokens, line, column, (rows, last), padding)


def _packed(input_ids: Tensor, attention_mask: Tensor, prompt_width: int, model: PreTrainedModel) -> PackedBatch:
    """Units of a prompt with its responses, dealt to rows."""
    device, real = input_ids.device, attention_mask.bool()
    mask = real[:, prompt_width:]
    prompts, responses = real[:, :prompt_width].sum(1), mask.sum(1)
    leads = ~same_prompt_as_previous(input_ids, attention_mask, prompt_width)
    unit, lead = leads.cumsum(0) - 1, leads.nonzero().squeeze(1)  # (B,) which unit a row is of; (U,) its first row
    taken = responses + torch.where(leads, prompts, 0)  # tokens that a row adds to its unit
    before = taken.cumsum(0) - taken
    size = torch.zeros_like(lead).index_add_(0, unit, taken)  # (U,)
    row_of, start = _assign_rows(size.tolist(), model, device)
    # where a row's response begins: behind the prompt and the responses before it
    begin = start[unit] + before - before[lead][unit] + torch.where(leads, prompts, 0)
    place = torch.arange(mask.shape[1], device=device)
    line, column = row_of[unit], begin[:, None] + place  # (B,), (B, R)
    shape = (int(row_of.max()) + 1, int((start + size).max()))
    ids, segment = (torch.zeros(shape, dtype=torch.long, device=device) for _ in range(2))
    parent = torch.full(shape, -1, dtype=torch.long, device=device)
    # prompts: segment 1 + unit; responses: numbers above all of these
    number = 1 + len(lead) + torch.arange(len(mask), device=device)
    own = mask.nonzero(as_tuple=True)
    where = line[own[0]], column[own]
    ids[where], segment[where], parent[where] = input_ids[:, prompt_width:][own], number[own[0]], 1 + unit[own[0]]
    own = real[lead, :prompt_width].nonzero(as_tuple=True)
    where = row_of[own[0]], start[own[0]] + own[1] - (prompt_width - prompts[lead][own[0]])
    ids[where], segment[where] = input_ids[lead, :prompt_width][own], 1 + own[0]
    inputs = packed_model_inputs(segment, parent, model.config.get_text_config()._attn_implementation)
    ends_prompt = (start + prompts[lead] - 1)[unit]  # (B,)
    predictor = torch.where(place == 0, ends_prompt[:, None], column - 1)[mask]
    last = torch.where(responses > 0, begin + responses - 1, ends_prompt)
    padding = segment.numel() - int(size.sum())
    rows = line[:, None].expand_as(mask)[mask]
    tokens = input_ids[:, prompt_width:][mask]
    return PackedBatch(
        ids,
        **inputs,
        response_mask=mask,
        response_tokens=tokens,
        row_index=rows,
        column_index=predictor,
        last_token_index=(line, last),
        num_padding=padding,
    )


def _assign_rows(sizes: list[int], model: PreTrainedModel, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row of each unit and where in it the unit begins, (U,) each, by the cheapest width."""
    longest, hidden = max(sizes), int(model.config.get_text_config().hidden_size)

    def cost(rows: list[list[int]]) -> int:
        return forward_flops(len(rows), max(sum(sizes[unit] for unit in row) for row in rows), hidden)

    dealt = min((pack_balanced(sizes, longest * quarters // 4) for quarters in (4, 5, 6, 7, 8, 10, 12)), key=cost)
    line, start = [0] * len(sizes), [0] * len(sizes)
    for number, row in enumerate(dealt):
        place = 0
        for unit in row:
            line[unit], start[unit] = number, place
            place += sizes[unit]
    return torch.tensor(line, device=device), torch.tensor(start, device=device)


def response_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Logits of the response tokens alone, (n, V): the unembedding sees nothing else.

    Args:
        model: a causal language model, or the strategy's wrapper of one.
        batch: of `pack_batch`.
    """
    masks = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return logits_at_positions(model, batch.row_index, batch.column_index, input_ids=batch.input_ids, **masks)
