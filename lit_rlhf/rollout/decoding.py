"""Rows that are being decoded: one pass over their prompts, then one a token, from keys and values kept.

Shapes: `B` prompts, `N` rows, a multiple of B, `P` prompt width, `V` vocabulary.
"""

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_rlhf.functional import position_ids
from lit_rlhf.models.segments import reason_against_segments, seen_mask, segment_inputs
from lit_rlhf.rollout.direct_rows import Direct, DirectRows, moved


class Rows(Protocol):
    """What an engine decodes; some rows may be dropped on the way."""

    def prefill(self) -> Tensor:
        """Return the logits of every row's first token, (N, V)."""
        ...

    def keep(self, going: Tensor) -> Tensor:
        """Drop the rows where `going` (n,) bool is False; return the places of the others in their new order, (m,)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Take the rows' last tokens (n,); return the logits of their next ones, (n, V)."""
        ...


def rows_of(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    samples: int,
    length: int,
    direct: Direct | None,
) -> Rows:
    """Return the rows of the prompts, `samples` of each, for responses of at most `length` tokens.

    In memory set aside once where the model keeps all keys and values and takes a mask as it is; else in the growing
    cache of transformers, which gives the same and takes longer. Llama's blocks are called without the model around
    them.

    Args:
        model: the policy.
        prompt_ids: (B, P) int64, left-padded.
        prompt_mask: (B, P), 1 = real token.
        samples: rows of each prompt.
        length: most tokens of a response.
        direct: of `direct_rows.direct_of`, for a model that decodes so.
    """
    if direct is not None:
        return DirectRows(model, prompt_ids, prompt_mask, samples, length, direct)
    config = model.config.get_text_config()
    against = reason_against_segments(config, config._attn_implementation, prompt_ids.shape[1] + length)
    kind = FixedRows if against is None else GrowingRows
    return kind(model, prompt_ids, prompt_mask, samples, length)


class FixedRows:
    """Keys and values in memory that is set aside once; where a row is dropped, the last one takes its place.

    So all the moves of a batch copy no more than it holds, and nothing is computed for what is not filled yet.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, samples: int, length: int
    ) -> None:
        self.model, self.ids, self.mask, self.samples = model, prompt_ids, prompt_mask, samples
        self.filled = prompt_ids.shape[1]
        self.cache = Cache(layer_class_to_replicate=partial(FixedLayer, self.filled + length, samples))
        response = prompt_mask.new_ones(len(prompt_mask), length)
        seen = torch.cat([prompt_mask, response], 1).repeat_interleave(samples, 0).bool()[:, None, None]
        self.attention = model.config.get_text_config()._attn_implementation
        self.seen = seen_mask(seen, self.attention)  # (N, 1, 1, P + length)
        self.position = position_ids(prompt_mask)[:, -1:].repeat_interleave(samples, 0)  # (N, 1), of the last token

    def prefill(self) -> Tensor:
        """See `Rows`. A prompt is computed once for all its rows."""
        return self._logits(self.ids, **segment_inputs(self.mask, attention=self.attention)).repeat_interleave(
            self.samples, 0
        )

    def keep(self, going: Tensor) -> Tensor:
        """See `Rows`."""
        order, movers, holes = moved(going)
        if len(holes):
            for layer in self.cache.layers:
                layer.move(movers, holes)
        self.seen, self.position = self.seen[order], self.position[order]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows`."""
        self.filled += 1
        self.position = self.position + 1
        return self._logits(tokens[:, None], self.seen[..., : self.filled], self.position)

    def _logits(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class FixedLayer(DynamicLayer):
    """One layer's keys and values, (N, heads, columns, d), written in place where a `DynamicLayer` makes new ones.

    The first pass is over the prompts; what it leaves is repeated for their samples. Every later pass adds a column to
    as many rows as it has, from the first row on.

    Args:
        columns: tokens of a prompt and its response at most.
        samples: rows of each prompt.
    """

    def __init__(self, columns: int, samples: int) -> None:
        super().__init__()
        self.columns, self.samples, self.filled = columns, samples, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write them; return all that the rows of this pass attend to."""
        start, self.filled = self.filled, self.filled + key_states.shape[2]
        if start == 0:
            self.keys, self.values = self._room(key_states), self._room(value_states)
            self.is_initialized = True
            return key_states, value_states
        rows = len(key_states)
        self.keys[:rows, :, start : self.filled] = key_states
        self.values[:rows, :, start : self.filled] = value_states
        return self.keys[:rows, :, : self.filled], self.values[:rows, :, : self.filled]

    def _room(self, prompts: Tensor) -> Tensor:
        """Return the memory for all columns, with those of the prompts (B, heads, P, d) in it."""
        count, heads, width, size = prompts.shape
        room = prompts.new_empty(count, self.samples, heads, self.columns, size)
        room[..., :width, :] = prompts[:, None]
        return room.flatten(0, 1)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Put the rows `source` in place of the rows `target`."""
        for states in (self.keys, self.values):
            states[target, :, : self.filled] = states[source, :, : self.filled]

    def get_seq_length(self) -> int:
        """Return how many columns are filled."""
        return self.filled


class GrowingRows:
    """The cache of transformers, for models whose layers keep something else than all keys and values."""

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, samples: int, length: int
    ) -> None:
        self.model, self.ids, self.mask, self.samples = model, prompt_ids, prompt_mask, samples
        self.cache: Any = DynamicCache(config=model.config)
        self.position = position_ids(prompt_mask)

    def prefill(self) -> Tensor:
        """See `Rows`. A prompt is computed once for all its rows."""
        logits = self._logits(self.ids)
        self.cache.batch_repeat_interleave(self.samples)
        self.mask = self.mask.repeat_interleave(self.samples, 0)
        self.position = self.position[:, -1:].repeat_interleave(self.samples, 0)
        return logits.repeat_interleave(self.samples, 0)

    def keep(self, going: Tensor) -> Tensor:
        """See `Rows`."""
        kept = going.nonzero().squeeze(1)
        self.cache.batch_select_indices(kept)
        self.mask, self.position = self.mask[kept], self.position[kept]
        return kept

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.position = self.position + 1
        return self._logits(tokens[:, None])

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
