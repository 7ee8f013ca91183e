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
from lit_rlhf.generation.llama_decode_batch import FastDecoder, LlamaDecodeBatch, compaction_plan
from lit_rlhf.packing.attention_masks import packed_model_inputs, packing_unsupported_reason, to_attention_mask


class DecodeBatch(Protocol):
    """What an engine decodes; some rows may be dropped on the way."""

    def prefill(self) -> Tensor:
        """Return the logits of every row's first token, (N, V)."""
        ...

    def compact(self, active: Tensor) -> Tensor:
        """Drop the rows where `active` (n,) bool is False; return the places of the others in their new order, (m,)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Take the rows' last tokens (n,); return the logits of their next ones, (n, V)."""
        ...


def make_decode_batch(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    num_samples: int,
    max_new_tokens: int,
    direct: FastDecoder | None,
) -> DecodeBatch:
    """Return the rows of the prompts, `num_samples` of each, for responses of at most `max_new_tokens` tokens.

    In memory set aside once where the model keeps all keys and values and takes a mask as it is; else in the growing
    cache of transformers, which gives the same and takes longer. Llama's blocks are called without the model around
    them.

    Args:
        model: the policy.
        prompt_ids: (B, P) int64, left-padded.
        prompt_mask: (B, P), 1 = real token.
        num_samples: rows of each prompt.
        max_new_tokens: most tokens of a response.
        direct: of `direct_rows.build_fast_decoder`, for a model that decodes so.
    """
    if direct is not None:
        return LlamaDecodeBatch(model, prompt_ids, prompt_mask, num_samples, max_new_tokens, direct)
    config = model.config.get_text_config()
    against = packing_unsupported_reason(config, config._attn_implementation, prompt_ids.shape[1] + max_new_tokens)
    kind = StaticCacheBatch if against is None else DynamicCacheBatch
    return kind(model, prompt_ids, prompt_mask, num_samples, max_new_tokens)


class StaticCacheBatch:
    """Keys and values in memory that is set aside once; where a row is dropped, the last one takes its place.

    So all the moves of a batch copy no more than it holds, and nothing is computed for what is not filled yet.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int
    ) -> None:
        self.model, self.ids, self.mask, self.num_samples = model, prompt_ids, prompt_mask, num_samples
        self.cache_position = prompt_ids.shape[1]
        self.cache = Cache(
            layer_class_to_replicate=partial(StaticCacheLayer, self.cache_position + max_new_tokens, num_samples)
        )
        response = prompt_mask.new_ones(len(prompt_mask), max_new_tokens)
        seen = torch.cat([prompt_mask, response], 1).repeat_interleave(num_samples, 0).bool()[:, None, None]
        self.attn_implementation = model.config.get_text_config()._attn_implementation
        self.attention_mask = to_attention_mask(seen, self.attn_implementation)  # (N, 1, 1, P + length)
        self.position_ids = position_ids(prompt_mask)[:, -1:].repeat_interleave(
            num_samples, 0
        )  # (N, 1), of the last token

    def prefill(self) -> Tensor:
        """See `Rows`. A prompt is computed once for all its rows."""
        return self._logits(
            self.ids, **packed_model_inputs(self.mask, attn_implementation=self.attn_implementation)
        ).repeat_interleave(self.num_samples, 0)

    def compact(self, active: Tensor) -> Tensor:
        """See `Rows`."""
        order, movers, holes = compaction_plan(active)
        if len(holes):
            for layer in self.cache.layers:
                layer.move(movers, holes)
        self.attention_mask, self.position_ids = self.attention_mask[order], self.position_ids[order]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `Rows`."""
        self.cache_position += 1
        self.position_ids = self.position_ids + 1
        return self._logits(tokens[:, None], self.attention_mask[..., : self.cache_position], self.position_ids)

    def _logits(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class StaticCacheLayer(DynamicLayer):
    """One layer's keys and values, (N, heads, columns, d), written in place where a `DynamicLayer` makes new ones.

    The first pass is over the prompts; what it leaves is repeated for their samples. Every later pass adds a column to
    as many rows as it has, from the first row on.

    Args:
        max_length: tokens of a prompt and its response at most.
        num_samples: rows of each prompt.
    """

    def __init__(self, max_length: int, num_samples: int) -> None:
        super().__init__()
        self.max_length, self.num_samples, self.cache_position = max_length, num_samples, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write them; return all that the rows of this pass attend to."""
        start, self.cache_position = self.cache_position, self.cache_position + key_states.shape[2]
        if start == 0:
            self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
            self.is_initialized = True
            return key_states, value_states
        rows = len(key_states)
        self.keys[:rows, :, start : self.cache_position] = key_states
        self.values[:rows, :, start : self.cache_position] = value_states
        return self.keys[:rows, :, : self.cache_position], self.values[:rows, :, : self.cache_position]

    def _allocate(self, prompts: Tensor) -> Tensor:
        """Return the memory for all columns, with those of the prompts (B, heads, P, d) in it."""
        count, heads, width, size = prompts.shape
        room = prompts.new_empty(count, self.num_samples, heads, self.max_length, size)
        room[..., :width, :] = prompts[:, None]
        return room.flatten(0, 1)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Put the rows `source` in place of the rows `target`."""
        for states in (self.keys, self.values):
            states[target, :, : self.cache_position] = states[source, :, : self.cache_position]

    def get_seq_length(self) -> int:
        """Return how many columns are filled."""
        return self.cache_position


class DynamicCacheBatch:
    """The cache of transformers, for models whose layers keep something else than all keys and values."""

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int
    ) -> None:
        self.model, self.ids, self.mask, self.samples = model, prompt_ids, prompt_mask, num_samples
        self.cache: Any = DynamicCache(config=model.config)
        self.position = position_ids(prompt_mask)

    def prefill(self) -> Tensor:
        """See `Rows`. A prompt is computed once for all its rows."""
        logits = self._logits(self.ids)
        self.cache.batch_repeat_interleave(self.samples)
        self.mask = self.mask.repeat_interleave(self.samples, 0)
        self.position = self.position[:, -1:].repeat_interleave(self.samples, 0)
        return logits.repeat_interleave(self.samples, 0)

    def compact(self, active: Tensor) -> Tensor:
        """See `Rows`."""
        kept = active.nonzero().squeeze(1)
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
