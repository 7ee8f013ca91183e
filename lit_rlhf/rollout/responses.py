"""Responses while they are being drawn."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.rollout.endings import Ending
from lit_rlhf.rollout.experience import Rollout
from lit_rlhf.rollout.sampling import Sampling, choose_tokens


class Responses:
    """The table that an engine fills column by column, each row until it ends."""

    def __init__(self, model: PreTrainedModel, uniforms: Tensor, sampling: Sampling, ending: Ending) -> None:
        self.sampling, self.ending = sampling, ending
        # a column a row, so that a step reads and writes what lies together
        self.uniforms = uniforms.T.contiguous()  # (R, N)
        self.ids = torch.full_like(self.uniforms, model.config.pad_token_id, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.uniforms, dtype=torch.float32)
        self.length = torch.zeros_like(self.ids[0])  # (N,), tokens drawn
        self.ended = torch.zeros_like(self.length, dtype=torch.bool)

    def draw(self, rows: Tensor, step: int, logits: Tensor) -> Tensor:
        """Draw the next token of `rows` (b,), none of which has ended, by their logits (b, V); return which end."""
        tokens, logprobs = choose_tokens(logits, self.uniforms[step][rows], self.sampling, step, self.ending.ids)
        self.ids[step].index_copy_(0, rows, tokens)
        self.logprobs[step].index_copy_(0, rows, logprobs)
        ended = self.ending.of(tokens[:, None] if self.ending.text is None else self.ids[: step + 1, rows].T)
        self.length.index_fill_(0, rows, step + 1)
        self.ended.index_copy_(0, rows, ended)
        return ended

    def rollout(self) -> Rollout:
        """Return them, a response a row."""
        mask = torch.arange(len(self.ids), device=self.ids.device) < self.length[:, None]
        return Rollout(self.ids.T.contiguous(), mask, self.logprobs.T.contiguous(), self.ended)
