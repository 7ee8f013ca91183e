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
        self.uniforms, self.sampling, self.ending = uniforms, sampling, ending
        self.ids = torch.full(uniforms.shape, model.config.pad_token_id, device=uniforms.device)  # (N, R)
        self.logprobs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        self.mask = torch.zeros_like(self.ids, dtype=torch.bool)
        self.ended = torch.zeros_like(self.mask[:, 0])

    def draw(self, rows: Tensor, step: int, logits: Tensor) -> Tensor:
        """Draw the next token of `rows` (b,), none of which has ended, by their logits (b, V); return which go on."""
        noise = self.uniforms[rows, step]
        tokens, logprobs = choose_tokens(logits, noise, self.sampling, step, self.ending.ids)
        self.ids[rows, step], self.logprobs[rows, step] = tokens, logprobs
        self.mask[rows, step] = True
        ended = self.ending.of(tokens[:, None] if self.ending.text is None else self.ids[rows, : step + 1])
        self.ended[rows] = ended
        return ~ended

    def rollout(self) -> Rollout:
        """Return them."""
        return Rollout(self.ids, self.mask, self.logprobs, self.ended)
