"""Responses while they are being drawn."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.generation.sampling import SamplingParams, sample_tokens
from lit_rlhf.generation.stopping import StoppingCriteria
from lit_rlhf.rollout.experience import GenerationOutput


class GenerationBuffer:
    """The table that an engine fills column by column, each row until it ends."""

    def __init__(
        self, model: PreTrainedModel, uniforms: Tensor, sampling: SamplingParams, ending: StoppingCriteria
    ) -> None:
        self.sampling, self.stopping = sampling, ending
        # a column a row, so that a step reads and writes what lies together
        self.uniforms = uniforms.T.contiguous()  # (R, N)
        self.token_ids = torch.full_like(self.uniforms, model.config.pad_token_id, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.uniforms, dtype=torch.float32)
        self.length = torch.zeros_like(self.token_ids[0])  # (N,), tokens drawn
        self.finished = torch.zeros_like(self.length, dtype=torch.bool)

    def sample(self, rows: Tensor, step: int, logits: Tensor) -> Tensor:
        """Draw the next token of `rows` (b,), none of which has ended, by their logits (b, V); return which end."""
        tokens, logprobs = sample_tokens(
            logits, self.uniforms[step][rows], self.sampling, step, self.stopping.stop_token_ids
        )
        self.token_ids[step].index_copy_(0, rows, tokens)
        self.logprobs[step].index_copy_(0, rows, logprobs)
        ended = self.stopping.is_finished(
            tokens[:, None] if self.stopping.matches_stop_string is None else self.token_ids[: step + 1, rows].T
        )
        self.length.index_fill_(0, rows, step + 1)
        self.finished.index_copy_(0, rows, ended)
        return ended

    def output(self) -> GenerationOutput:
        """Return them, a response a row."""
        mask = torch.arange(len(self.token_ids), device=self.token_ids.device) < self.length[:, None]
        return GenerationOutput(self.token_ids.T.contiguous(), mask, self.logprobs.T.contiguous(), self.finished)
