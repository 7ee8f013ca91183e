"""Rows of Llama's architectures that are being decoded: keys and values of all blocks in memory set aside once.

Shapes: `B` prompts, `N` rows, a multiple of B, `P` prompt width, `V` vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.generation.llama_decoder import (
    LlamaDecoder,
    allocate_kv_cache,
    build_decoder,
    build_rope_tables,
    next_token_logits,
)
from lit_rlhf.packing.attention_masks import packed_model_inputs, to_attention_mask

#: `models.direct.next_token_logits`, as it is or compiled
DecodeStep = Callable[..., Tensor]


class FastDecoder(NamedTuple):
    """What is called of Llama's blocks in a rollout, with weights as they were when it began."""

    prefill: LlamaDecoder
    decode: LlamaDecoder  # for a step of one
    step: DecodeStep


def build_fast_decoder(model: PreTrainedModel, step: DecodeStep = next_token_logits) -> FastDecoder:
    """Return the blocks of a model that decodes by `next_token_logits`.

    Args:
        model: the policy; nothing speaks against it (`fast_decode_unsupported_reason`, `packing_unsupported_reason`).
        step: for the step of a token: `models.direct.next_token_logits`, or that compiled.
    """
    return FastDecoder(build_decoder(model, prepack=False), build_decoder(model, prepack=True), step)


#: Tokens of prompts that a pass takes at once. What so few leave between two layers stays in a CPU's caches; elsewhere
#: it is what a pass may need beside keys and values.
_PREFILL_TOKENS = {"cpu": 1024}
_PREFILL_TOKENS_DEFAULT = 16_384


class LlamaDecodeBatch:
    """Keys and values of all blocks in one piece of memory; where a row is dropped, the last one takes its place."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_samples: int,
        max_new_tokens: int,
        decoder: FastDecoder,
    ) -> None:
        self.ids, self.mask, self.num_samples, self.decoder = prompt_ids, prompt_mask, num_samples, decoder
        self.cache_position, columns = prompt_ids.shape[1], prompt_ids.shape[1] + max_new_tokens
        count = len(prompt_ids) * num_samples
        self.rope, self.kv_cache = build_rope_tables(model, columns), allocate_kv_cache(model, _rounded(count), columns)
        response = prompt_mask.new_ones(len(prompt_mask), max_new_tokens)
        seen = torch.cat([prompt_mask, response], 1).bool()[:, None, None]
        of_row = torch.arange(_rounded(count), device=prompt_ids.device).clamp(max=count - 1) // num_samples
        self.attn_bias = to_attention_mask(seen, "eager").to(self.kv_cache[0].dtype)[
            of_row
        ]  # (rows of room, 1, 1, P + length)
        self.position_ids = position_ids(prompt_mask)[of_row, -1:]  # (rows of room, 1), of the last token

    def prefill(self) -> Tensor:
        """See `decoding.Rows`. A prompt is computed once for all its rows."""
        count, width = self.ids.shape
        prompts = max(_PREFILL_TOKENS.get(self.ids.device.type, _PREFILL_TOKENS_DEFAULT) // width, 1)
        logits = torch.cat([self._pass(start, min(start + prompts, count)) for start in range(0, count, prompts)])
        if self.num_samples > 1:
            for states in self.kv_cache:
                rows = states[: count * self.num_samples].view(count, self.num_samples, *states.shape[1:])
                rows = rows[..., : self.cache_position, :]
                rows[:, 1:] = rows[:, :1]
        return logits.repeat_interleave(self.num_samples, 0)

    def _pass(self, start: int, stop: int) -> Tensor:
        """Compute so many prompts, each in the first of its rows; return the logits behind them."""
        inputs = packed_model_inputs(self.mask[start:stop], attn_implementation="eager")
        seen = inputs["attention_mask"].to(self.attn_bias.dtype)
        room = [
            states[start * self.num_samples : stop * self.num_samples : self.num_samples] for states in self.kv_cache
        ]
        return next_token_logits(
            self.decoder.prefill, self.ids[start:stop], inputs["position_ids"], seen, self.rope, room
        )

    def compact(self, active: Tensor) -> Tensor:
        """See `decoding.Rows`."""
        order, movers, holes = compaction_plan(active)
        if len(holes):
            for states in self.kv_cache:
                states[holes, :, : self.cache_position] = states[movers, :, : self.cache_position]
            self.attn_bias[holes], self.position_ids[holes] = self.attn_bias[movers], self.position_ids[movers]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `decoding.Rows`."""
        self.cache_position += 1
        self.position_ids += 1
        count, rows = len(tokens), _rounded(len(tokens))
        tokens = pad(tokens, (0, rows - count))[:, None]
        position, seen = self.position_ids[:rows], self.attn_bias[:rows, ..., : self.cache_position]
        return self.decoder.step(self.decoder.decode, tokens, position, seen, self.rope, self.kv_cache)[:count]


def _rounded(rows: int) -> int:
    """Return as many rows or a few more: for products of every other size a CPU makes code anew, and keeps it."""
    step = max(4, 1 << max((rows - 1).bit_length() - 4, 0))
    return -(-rows // step) * step


def compaction_plan(active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how rows close up behind those that are dropped, where `active` (n,) bool is False.

    Returns:
        the places of the rows that stay, in their new order, (m,); those that move, from the end, (h,); the places
        that they move to, (h,).
    """
    kept, dropped = active.nonzero().squeeze(1), (~active).nonzero().squeeze(1)
    holes = dropped[dropped < len(kept)]
    movers = kept[len(kept) - len(holes) :]
    return torch.arange(len(kept), device=active.device).index_copy_(0, holes, movers), movers, holes
