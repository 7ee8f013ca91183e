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
from lit_rlhf.models.direct import Stack, last_logits, rotation_of, set_aside, stack_of
from lit_rlhf.models.segments import seen_mask, segment_inputs

#: `models.direct.last_logits`, as it is or compiled
LastLogits = Callable[..., Tensor]


class Direct(NamedTuple):
    """What is called of Llama's blocks in a rollout, with weights as they were when it began."""

    prompts: Stack
    tokens: Stack  # for a step of one
    step: LastLogits


def direct_of(model: PreTrainedModel, step: LastLogits = last_logits) -> Direct:
    """Return the blocks of a model that decodes by `last_logits`.

    Args:
        model: the policy; nothing speaks against it (`reason_against_direct`, `reason_against_segments`).
        step: for the step of a token: `models.direct.last_logits`, or that compiled.
    """
    return Direct(stack_of(model, few=False), stack_of(model, few=True), step)


#: Tokens of prompts that a pass takes at once. What so few leave between two layers stays in a CPU's caches; elsewhere
#: it is what a pass may need beside keys and values.
_AT_ONCE = {"cpu": 1024}
_AT_ONCE_ELSEWHERE = 16_384


class DirectRows:
    """Keys and values of all blocks in one piece of memory; where a row is dropped, the last one takes its place."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        samples: int,
        length: int,
        direct: Direct,
    ) -> None:
        self.ids, self.mask, self.samples, self.direct = prompt_ids, prompt_mask, samples, direct
        self.filled, columns = prompt_ids.shape[1], prompt_ids.shape[1] + length
        count = len(prompt_ids) * samples
        self.rotation, self.room = rotation_of(model, columns), set_aside(model, _rounded(count), columns)
        response = prompt_mask.new_ones(len(prompt_mask), length)
        seen = torch.cat([prompt_mask, response], 1).bool()[:, None, None]
        of_row = torch.arange(_rounded(count), device=prompt_ids.device).clamp(max=count - 1) // samples
        self.seen = seen_mask(seen, "eager").to(self.room[0].dtype)[of_row]  # (rows of room, 1, 1, P + length)
        self.position = position_ids(prompt_mask)[of_row, -1:]  # (rows of room, 1), of the last token

    def prefill(self) -> Tensor:
        """See `decoding.Rows`. A prompt is computed once for all its rows."""
        count, width = self.ids.shape
        prompts = max(_AT_ONCE.get(self.ids.device.type, _AT_ONCE_ELSEWHERE) // width, 1)
        logits = torch.cat([self._pass(start, min(start + prompts, count)) for start in range(0, count, prompts)])
        if self.samples > 1:
            for states in self.room:
                rows = states[: count * self.samples].view(count, self.samples, *states.shape[1:])
                rows = rows[..., : self.filled, :]
                rows[:, 1:] = rows[:, :1]
        return logits.repeat_interleave(self.samples, 0)

    def _pass(self, start: int, stop: int) -> Tensor:
        """Compute so many prompts, each in the first of its rows; return the logits behind them."""
        inputs = segment_inputs(self.mask[start:stop], attention="eager")
        seen = inputs["attention_mask"].to(self.seen.dtype)
        room = [states[start * self.samples : stop * self.samples : self.samples] for states in self.room]
        return last_logits(self.direct.prompts, self.ids[start:stop], inputs["position_ids"], seen, self.rotation, room)

    def keep(self, going: Tensor) -> Tensor:
        """See `decoding.Rows`."""
        order, movers, holes = moved(going)
        if len(holes):
            for states in self.room:
                states[holes, :, : self.filled] = states[movers, :, : self.filled]
            self.seen[holes], self.position[holes] = self.seen[movers], self.position[movers]
        return order

    def step(self, tokens: Tensor) -> Tensor:
        """See `decoding.Rows`."""
        self.filled += 1
        self.position += 1
        count, rows = len(tokens), _rounded(len(tokens))
        tokens = pad(tokens, (0, rows - count))[:, None]
        position, seen = self.position[:rows], self.seen[:rows, ..., : self.filled]
        return self.direct.step(self.direct.tokens, tokens, position, seen, self.rotation, self.room)[:count]


def _rounded(rows: int) -> int:
    """Return as many rows or a few more: for products of every other size a CPU makes code anew, and keeps it."""
    step = max(4, 1 << max((rows - 1).bit_length() - 4, 0))
    return -(-rows // step) * step


def moved(going: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how rows close up behind those that are dropped, where `going` (n,) bool is False.

    Returns:
        the places of the rows that stay, in their new order, (m,); those that move, from the end, (h,); the places
        that they move to, (h,).
    """
    kept, dropped = going.nonzero().squeeze(1), (~going).nonzero().squeeze(1)
    holes = dropped[dropped < len(kept)]
    movers = kept[len(kept) - len(holes) :]
    return torch.arange(len(kept), device=going.device).index_copy_(0, holes, movers), movers, holes
