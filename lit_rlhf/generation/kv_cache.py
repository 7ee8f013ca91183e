"""Decoding with a KV cache: a static one, allocated once, or transformers' growing one.

Shapes: `B` prompts, `N` rows (responses), a multiple of B, `P` prompt width, `V` vocabulary, `H` heads, `d` head size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lit_rlhf.functional import position_ids
from lit_rlhf.generation.cuda_graph import can_capture_steps
from lit_rlhf.packing.attention_masks import packed_model_inputs, to_attention_mask

_WIDTH_STEP = 128  # attention of a captured step covers a multiple of so many columns


class DecodeBatch(ABC):
    """Rows that are decoded together. Rows may leave on the way."""

    @abstractmethod
    def prefill(self) -> Tensor:
        """Return the logits of every row's first token, (N, V). A prompt is computed once for all its rows."""

    @abstractmethod
    def compact(self, active: Tensor) -> Tensor:
        """Drop the rows where `active` (n,) bool is False; return the old index of each remaining row, (m,)."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row, (n,); return the logits of the next ones, (n, V)."""

    def reserve(self, steps: int) -> bool:
        """Prepare for `steps` more steps; return whether their launches differ from those of the step before."""
        return False


class Decoder(ABC):
    """How a model decodes during one rollout, with its weights as they were when it began.

    Args:
        model: the policy.
        step: a compiled decode step, from `compile_step`; None runs it eagerly.

    Attributes:
        allows_inference_mode: whether its passes leave nothing behind that training uses.
        captures_steps: whether steps are replayed from a CUDA graph.
    """

    allows_inference_mode = False
    captures_steps = False

    def __init__(self, model: PreTrainedModel, step: Any = None) -> None:
        self.model = model

    @abstractmethod
    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int) -> DecodeBatch:
        """Return a batch of B x `num_samples` rows.

        Args:
            prompt_ids: (B, P) int64, left-padded.
            prompt_mask: (B, P), 1 = real token.
            num_samples: rows per prompt.
            max_new_tokens: largest number of tokens of a response.
        """

    @staticmethod
    def compile_step() -> Any:
        """Return the compiled decode step, for any batch size and length."""


class DynamicCacheDecoder(Decoder):
    """transformers' growing cache, for models whose layers keep something else than all keys and values."""

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int) -> DecodeBatch:
        """See `Decoder.start`."""
        return DynamicCacheBatch(self.model, prompt_ids, prompt_mask, num_samples)


def keeps_layer_states(config: PretrainedConfig) -> bool:
    """Whether transformers' cache of a model holds something else than keys and values, such as the state of Mamba."""
    layers = DynamicCache(config=config).layers
    return any(not isinstance(layer, DynamicLayer) or hasattr(layer, "update_conv_state") for layer in layers)


class DynamicCacheBatch(DecodeBatch):
    """A batch in a `DynamicCache`, which a step copies to append to it."""

    def __init__(self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int) -> None:
        self.model, self.ids, self.mask, self.num_samples = model, prompt_ids, prompt_mask, num_samples
        self.cache: Any = DynamicCache(config=model.config)
        self.position_ids = position_ids(prompt_mask)

    def prefill(self) -> Tensor:
        """See `DecodeBatch.prefill`."""
        logits = self._logits(self.ids)
        self.cache.batch_repeat_interleave(self.num_samples)
        self.mask = self.mask.repeat_interleave(self.num_samples, 0)
        self.position_ids = self.position_ids[:, -1:].repeat_interleave(self.num_samples, 0)
        return logits.repeat_interleave(self.num_samples, 0)

    def compact(self, active: Tensor) -> Tensor:
        """See `DecodeBatch.compact`."""
        kept = active.nonzero().squeeze(1)
        self.cache.batch_select_indices(kept)
        self.mask, self.position_ids = self.mask[kept], self.position_ids[kept]
        return kept

    def step(self, tokens: Tensor) -> Tensor:
        """See `DecodeBatch.step`."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        self.position_ids = self.position_ids + 1
        return self._logits(tokens[:, None])

    def _logits(self, ids: Tensor) -> Tensor:
        return _last_logits(self.model, ids, self.mask, self.position_ids, self.cache)


class StaticCacheDecoder(Decoder):
    """A KV cache that is allocated once, for every model that keeps all keys and values and takes a mask as it is."""

    def __init__(self, model: PreTrainedModel, step: Any = None) -> None:
        super().__init__(model)
        self.compiled_step: Callable[..., Tensor] | None = step
        self.captures_steps = can_capture_steps(model)

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int) -> DecodeBatch:
        """See `Decoder.start`."""
        kind: Callable[..., StaticCacheBatch]
        if self.compiled_step is not None:
            kind = partial(CompiledCacheBatch, self.compiled_step)
        else:
            kind = FixedShapeCacheBatch if self.captures_steps else StaticCacheBatch
        return kind(self.model, prompt_ids, prompt_mask, num_samples, max_new_tokens)

    @staticmethod
    def compile_step() -> Any:
        """See `Decoder.compile_step`."""
        return torch.compile(_last_logits, fullgraph=True)


class StaticCacheBatch(DecodeBatch):
    """A batch in a cache that is allocated once; the last row moves to the place of one that leaves.

    Compaction copies each row at most once; attention covers the filled columns only.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, num_samples: int, max_new_tokens: int
    ) -> None:
        self.model, self.ids, self.mask, self.num_samples = model, prompt_ids, prompt_mask, num_samples
        self.cache_position = prompt_ids.shape[1]  # columns filled
        self.max_length = self.cache_position + max_new_tokens
        self.cache = Cache(layer_class_to_replicate=partial(StaticCacheLayer, self.max_length, num_samples))
        response = prompt_mask.new_ones(len(prompt_mask), max_new_tokens)
        visible = torch.cat([prompt_mask, response], 1).repeat_interleave(num_samples, 0).bool()[:, None, None]
        self.attn_implementation = model.config.get_text_config()._attn_implementation
        self.attention_mask = to_attention_mask(visible, self.attn_implementation)  # (N, 1, 1, P + R)
        # (N, 1), position of each row's last token
        self.position_ids = position_ids(prompt_mask)[:, -1:].repeat_interleave(num_samples, 0)

    def prefill(self) -> Tensor:
        """See `DecodeBatch.prefill`."""
        inputs = packed_model_inputs(self.mask, attn_implementation=self.attn_implementation)
        logits = _last_logits(self.model, self.ids, inputs["attention_mask"], inputs["position_ids"], self.cache)
        return logits.repeat_interleave(self.num_samples, 0)

    def compact(self, active: Tensor) -> Tensor:
        """See `DecodeBatch.compact`."""
        order, movers, holes = compaction_plan(active)
        if len(holes):
            for layer in self.cache.layers:
                layer.move(movers, holes)
        self.attention_mask, self.position_ids = self.attention_mask[order], self.position_ids[order]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `DecodeBatch.step`."""
        self.cache_position += 1
        self.position_ids = self.position_ids + 1
        mask = self.attention_mask[..., : self.cache_position]
        return _last_logits(self.model, tokens[:, None], mask, self.position_ids, self.cache)


class FixedShapeCacheBatch(StaticCacheBatch):
    """`StaticCacheBatch` with a step that is the same launches every time: the position is a tensor, not a number.

    So the step can be compiled once, and captured in a CUDA graph. Attention covers columns that are not yet filled;
    they are masked.

    Args:
        args: of `StaticCacheBatch`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        device = self.ids.device
        self.column = torch.full((1,), self.cache_position - 1, device=device)  # the last filled one
        self.columns = torch.arange(self.max_length, device=device)
        nowhere = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.hidden = to_attention_mask(nowhere, self.attn_implementation)
        self.width = self.max_length  # columns that attention covers

    def prefill(self) -> Tensor:
        """See `DecodeBatch.prefill`."""
        logits = super().prefill()
        self.cache.layer_class_to_replicate = None  # all layers exist; compiled code is specialized on its arguments
        for layer in self.cache.layers:
            for states in (layer.keys, layer.values):
                states[:, :, self.cache_position :] = 0  # masked, but 0 x NaN would be NaN
            layer.column = self.column
        return logits

    def reserve(self, steps: int) -> bool:
        """See `DecodeBatch.reserve`: attention covers the next multiple of `_WIDTH_STEP` columns."""
        self.cache_position += steps
        width = min(-(-self.cache_position // _WIDTH_STEP) * _WIDTH_STEP, self.max_length)
        changed, self.width = width != self.width, width
        for layer in self.cache.layers:
            layer.width = width
        return changed

    def step(self, tokens: Tensor) -> Tensor:
        """See `DecodeBatch.step`."""
        self.column.add_(1)
        self.position_ids.add_(1)
        filled = self.columns[: self.width] <= self.column
        mask = torch.where(filled, self.attention_mask[..., : self.width], self.hidden)
        return self.logits(tokens[:, None], mask)

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits after `ids` (n, 1), (n, V), by one pass under the `mask` (n, 1, 1, columns)."""
        return _last_logits(self.model, ids, mask, self.position_ids, self.cache)


class CompiledCacheBatch(FixedShapeCacheBatch):
    """`FixedShapeCacheBatch` with one compiled step, for all columns: no shape but the batch size changes.

    Args:
        compiled_step: of `StaticCacheDecoder.compile_step`.
        args: of `StaticCacheBatch`.
    """

    def __init__(self, compiled_step: Callable[..., Tensor], *args: Any) -> None:
        super().__init__(*args)
        self.compiled_step = compiled_step

    def prefill(self) -> Tensor:
        """See `DecodeBatch.prefill`."""
        logits = super().prefill()
        for layer in self.cache.layers:
            if len(layer.keys) == 1:
                layer.keys, layer.values = layer.keys.repeat(2, 1, 1, 1), layer.values.repeat(2, 1, 1, 1)
            for states in (layer.keys, layer.values):
                torch._dynamo.maybe_mark_dynamic(states, [0, 2])
        return logits

    def reserve(self, steps: int) -> bool:
        """See `DecodeBatch.reserve`: for all columns at once, or the step would be compiled anew."""
        return False

    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See `FixedShapeCacheBatch.logits`."""
        inputs = [ids.contiguous(), mask.contiguous(), self.position_ids.contiguous()]
        if len(ids) == 1:  # computed twice: a size of 1 is never dynamic
            inputs = [torch.cat([each, each]) for each in inputs]
        for tensor, dims in zip(inputs, ([0], [0, 3], [0])):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)
        return self.compiled_step(self.model, *inputs, self.cache)[: len(ids)]


class StaticCacheLayer(DynamicLayer):
    """Keys and values of one layer, (N, H, columns, d), written in place where a `DynamicLayer` makes new ones.

    The first pass is over the prompts; its keys and values are repeated for their samples. Every later pass adds a
    column to as many rows as it has, from the first row on.

    Args:
        max_length: columns: tokens of a prompt and its response at most.
        num_samples: rows per prompt.

    Attributes:
        column: (1,) int64, the column that a step of fixed shape writes; attention then covers the first `width`
            columns, filled or not. None: the next column, and attention covers the filled ones.
        width: None: all columns.
    """

    def __init__(self, max_length: int, num_samples: int) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.max_length, self.num_samples, self.cache_position = max_length, num_samples, 0
        self.column: Tensor | None = None
        self.width: int | None = None  # of compiled code a constant, so that it stays None there

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write them; return all keys and values that the rows of this pass attend to."""
        rows = len(key_states)
        if self.column is not None:
            self.keys[:rows].index_copy_(2, self.column, key_states)
            self.values[:rows].index_copy_(2, self.column, value_states)
            return self.keys[:rows, :, : self.width], self.values[:rows, :, : self.width]
        start, self.cache_position = self.cache_position, self.cache_position + key_states.shape[2]
        if start == 0:
            self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
            self.is_initialized = True
            return key_states, value_states
        self.keys[:rows, :, start : self.cache_position] = key_states
        self.values[:rows, :, start : self.cache_position] = value_states
        return self.keys[:rows, :, : self.cache_position], self.values[:rows, :, : self.cache_position]

    def _allocate(self, prompts: Tensor) -> Tensor:
        """Return memory for all columns, with those of the prompts (B, H, P, d) filled in."""
        count, heads, width, head_dim = prompts.shape
        # no view of another tensor: compiled code is specialized on the shape of a view's base
        states = prompts.new_empty(count * self.num_samples, heads, self.max_length, head_dim)
        states.view(count, self.num_samples, *states.shape[1:])[..., :width, :] = prompts[:, None]
        return states

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the rows `source` over the rows `target`."""
        columns = self.cache_position if self.column is None else self.width
        for states in (self.keys, self.values):
            states[target, :, :columns] = states[source, :, :columns]

    def get_seq_length(self) -> int:
        """Return the number of filled columns."""
        # a constant for a compiled step, which would else be compiled anew at every length
        return self.cache_position if self.column is None else 0


def _last_logits(
    model: PreTrainedModel, ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Any
) -> Tensor:
    """Return the logits after the last token of each row, (n, V)."""
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits


def compaction_plan(active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how the remaining rows fill the holes of those that leave.

    Args:
        active: (n,) bool, False where a row leaves.

    Returns:
        the old index of each remaining row in the new order, (m,); the rows that move, from the end, (h,); the indices
        that they move to, (h,).
    """
    kept, dropped = active.nonzero().squeeze(1), (~active).nonzero().squeeze(1)
    holes = dropped[dropped < len(kept)]
    movers = kept[len(kept) - len(holes) :]
    return torch.arange(len(kept), device=active.device).index_copy_(0, holes, movers), movers, holes
