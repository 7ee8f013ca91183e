"""Prompts and responses packed into rows, so that a forward pass computes few tokens twice and little padding.

In a padded batch rows are as wide as the longest, and the samples of one prompt all repeat it. Here a *unit* is the
prompt once, followed by its responses, and a row concatenates several units under a mask that keeps them apart, or all
of them for variable-length attention (`lit_rlhf.packing.varlen_attention`). A model computes the same, up to rounding.

Shapes: `B` sequences, `P` prompt, `R` response, `T = P + R`, `U` units, `L` rows of `W` tokens, `n` response tokens.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.packing.attention_masks import packing_unsupported_reason, prefix_tree_mask, to_attention_mask
from lit_rlhf.packing.bin_packing import forward_flops, pack_balanced
from lit_rlhf.packing.selective_logits import logits_at_positions
from lit_rlhf.packing.varlen_attention import (
    PackedSequences,
    can_use_varlen_kernel,
    enable_sequences,
    kernel_args,
    no_attention_mask,
)


class PackedBatch(NamedTuple):
    """Model inputs, and the indices of the tokens in them."""

    input_ids: Tensor  # (L, W) int64
    attention_mask: Tensor  # (L, W), or (L, 1, W, W) where rows hold several sequences; unused with `sequences`
    position_ids: Tensor  # (L, W) int64
    response_shape: tuple[int, int]  # (B, R)
    response_index: tuple[Tensor, Tensor]  # (n,) int64 each: sequence and step of each response token
    response_tokens: Tensor  # (n,) int64, in this order
    predictor_index: tuple[Tensor, Tensor]  # (n,) int64 each: row and column of the token before each response token
    last_token_index: tuple[Tensor, Tensor]  # (B,) int64 each: row and column of the last token of each sequence
    num_padding: int  # of the L x W tokens
    sequences: PackedSequences | None = None  # of the one row (L = 1) for variable-length attention

    @property
    def model_inputs(self) -> dict[str, Any]:
        """The inputs of a model that was named to `pack_batch`."""
        inputs = {name: getattr(self, name) for name in ("input_ids", "attention_mask", "position_ids")}
        return inputs if self.sequences is None else inputs | {"sequences": self.sequences}

    def scatter_to_responses(self, values: Tensor) -> Tensor:
        """Scatter one value per response token, (n,), to (B, R); 0 elsewhere."""
        table = values.new_zeros(self.response_shape)
        table[self.response_index] = values  # not by a mask, whose count a GPU would have to be asked for
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
    device = input_ids.device
    # planned on the host: on a GPU every operation below would be a launch, and every size a wait for it
    input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu()
    prompt_width, lengths = input_ids.shape[1] - response_width, attention_mask.sum(1)
    no_padding = bool((lengths == input_ids.shape[1]).all())
    nothing_to_gain = no_padding and not bool(same_prompt_as_previous(input_ids, attention_mask, prompt_width).any())
    longest = int(lengths.max())
    if nothing_to_gain or any(packing_unsupported_reason(model.config, longest) for model in models):
        return _keep_rows(input_ids, attention_mask, prompt_width, device)
    return pack_units(input_ids, attention_mask, response_width, models, device)


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
    prompt_width, device = attention_mask.shape[1] - response_width, attention_mask.device
    input_ids, attention_mask = input_ids.cpu(), attention_mask.cpu()  # as in `pack_batch`
    prompts = attention_mask[:, :prompt_width].sum(1)
    responses = attention_mask[:, prompt_width:].sum(1)
    unit = (~same_prompt_as_previous(input_ids, attention_mask, prompt_width)).cumsum(0) - 1  # (B,)
    longest = torch.zeros_like(unit).scatter_reduce_(0, unit, prompts + responses, "amax")
    order = torch.argsort(torch.argsort(torch.argsort(longest, stable=True))[unit], stable=True)
    for chunk in torch.split(order, batch_size):
        left = prompt_width - int(prompts[chunk].max())
        width = max(int(responses[chunk].max()), 1)
        yield chunk.to(device), slice(left, prompt_width + width), width


def same_prompt_as_previous(input_ids: Tensor, attention_mask: Tensor, prompt_width: int) -> Tensor:
    """Whether a row has the prompt of the row before it, (B,) bool."""
    prompts = torch.where(attention_mask.bool(), input_ids, -1)[:, :prompt_width]
    return torch.cat([prompts.new_zeros(1), (prompts[1:] == prompts[:-1]).all(1)]).bool()


def _keep_rows(input_ids: Tensor, attention_mask: Tensor, prompt_width: int, device: torch.device) -> PackedBatch:
    """Return the batch as it is, one sequence per row, on the device."""
    mask = attention_mask[:, prompt_width:].bool()
    row, column = mask.nonzero(as_tuple=True)
    return PackedBatch(
        input_ids.to(device),
        attention_mask.to(device),
        position_ids(attention_mask).to(device),
        response_shape=(len(mask), mask.shape[1]),
        response_index=(row.to(device), column.to(device)),
        response_tokens=input_ids[:, prompt_width:][mask].to(device),
        predictor_index=(row.to(device), (prompt_width - 1 + column).to(device)),
        last_token_index=(torch.arange(len(mask), device=device), (prompt_width + mask.sum(1) - 1).to(device)),
        num_padding=attention_mask.numel() - int(attention_mask.sum()),
    )


def pack_units(
    input_ids: Tensor,
    attention_mask: Tensor,
    response_width: int,
    models: Sequence[PreTrainedModel],
    device: torch.device,
) -> PackedBatch:
    """Pack units of a prompt and its responses, several per row.

    Args:
        input_ids: See `pack_batch`.
        attention_mask: See `pack_batch`.
        response_width: R.
        models: Supported by `packing_unsupported_reason`.
        device: Of the packed batch.
    """
    input_ids, real = input_ids.cpu(), attention_mask.cpu().bool()
    prompt_width = input_ids.shape[1] - response_width
    mask = real[:, prompt_width:]
    prompts, responses = real[:, :prompt_width].sum(1), mask.sum(1)
    is_first = ~same_prompt_as_previous(input_ids, real, prompt_width)
    unit, first = is_first.cumsum(0) - 1, is_first.nonzero().squeeze(1)  # (B,) unit of a sequence; (U,) its first one
    added = responses + torch.where(is_first, prompts, 0)  # (B,) tokens that a sequence adds to its unit
    before = added.cumsum(0) - added
    size = torch.zeros_like(first).index_add_(0, unit, added)  # (U,)
    by_kernel = all(can_use_varlen_kernel(model, device) for model in models)
    if by_kernel:
        unit_row, unit_start = torch.zeros_like(size), size.cumsum(0) - size
    else:
        unit_row, unit_start = _assign_rows(size.tolist(), models[0])
    # (B,) first column of a response: after the prompt and the responses before it
    start = unit_start[unit] + before - before[first][unit] + torch.where(is_first, prompts, 0)
    offset = torch.arange(-prompt_width, response_width)  # (T,), below 0 in the prompt
    position = offset + prompts[:, None]  # (B, T), in a sequence; of real tokens, as the next two
    column = torch.where(offset < 0, unit_start[unit, None] + position, start[:, None] + offset)
    row = unit_row[unit, None].expand_as(column)
    written = real & (is_first[:, None] | (offset >= 0))  # a prompt once for all its responses
    target = row[written], column[written]
    shape = (int(unit_row.max()) + 1, int((unit_start + size).max()))
    ids, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    ids[target], positions[target] = input_ids[written], position[written]
    sequences = None
    if by_kernel:
        for model in models:
            enable_sequences(model)
        attention = no_attention_mask(device)
        # sequences are the first response of a unit, with its prompt, and each other one, whose keys begin with it
        queries, keys = (lengths[added > 0].tolist() for lengths in (added, prompts + responses))
        index = None if is_first.all() else column[real & (added > 0)[:, None]].to(device)
        sequences = PackedSequences(queries, index, kernel_args(queries, keys, device))
    else:
        segment, parent = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1, dtype=torch.long)
        # segment ids: 1 + unit of a prompt, numbers above all of these of responses
        response_segment = 1 + len(first) + torch.arange(len(mask))
        segment[target] = torch.where(offset < 0, 1 + unit[:, None], response_segment[:, None])[written]
        parent[target] = torch.where(offset < 0, -1, 1 + unit[:, None])[written]
        tree = prefix_tree_mask(segment.to(device), parent.to(device))
        attention = to_attention_mask(tree, models[0].config.get_text_config()._attn_implementation)
    sequence, step = mask.nonzero(as_tuple=True)
    last = prompt_width + responses - 1
    return PackedBatch(
        ids.to(device),
        attention,
        positions.to(device),
        response_shape=(len(mask), response_width),
        response_index=(sequence.to(device), step.to(device)),
        response_tokens=input_ids[:, prompt_width:][mask].to(device),
        predictor_index=(row[:, prompt_width:][mask].to(device), column[:, prompt_width - 1 : -1][mask].to(device)),
        last_token_index=(unit_row[unit].to(device), column.gather(1, last[:, None]).squeeze(1).to(device)),
        num_padding=ids.numel() - int(size.sum()),
        sequences=sequences,
    )


def _assign_rows(sizes: list[int], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
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
    return torch.tensor(row_of), torch.tensor(start)


def response_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Compute the logits of the response tokens alone, (n, V): the `lm_head` gets no other position.

    Args:
        model: A causal language model, sharded by FSDP2 or not.
        batch: Of `pack_batch`.
    """
    return logits_at_positions(model, *batch.predictor_index, **batch.model_inputs)
