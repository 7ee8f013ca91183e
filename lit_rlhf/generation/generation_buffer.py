"""Responses while they are being sampled."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.generation.base import GenerationOutput
from lit_rlhf.generation.sampling import SamplingParams, sample_tokens
from lit_rlhf.generation.stopping import StoppingCriteria


class GenerationBuffer:
    """Token ids and log-probs of N responses, filled step by step, each response until it finishes.

    Tensors are (R, N), one row per step: a step then reads and writes contiguous memory.
    """

    def __init__(
        self, model: PreTrainedModel, uniforms: Tensor, sampling: SamplingParams, stopping: StoppingCriteria
    ) -> None:
        self.sampling, self.stopping = sampling, stopping
        self.uniforms = uniforms.T.contiguous()  # (R, N)
        self.token_ids = torch.full_like(self.uniforms, model.config.pad_token_id, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.uniforms, dtype=torch.float32)
        self.lengths = torch.zeros_like(self.token_ids[0])  # (N,), tokens sampled so far
        self.finished = torch.zeros_like(self.lengths, dtype=torch.bool)

    def sample(self, rows: Tensor, step: int, logits: Tensor) -> Tensor:
        """Sample the next token of unfinished `rows` (b,) from their logits (b, V); return which finish, (b,) bool."""
        stopping = self.stopping
        tokens, logprobs = sample_tokens(
            logits, self.uniforms[step][rows], self.sampling, step, stopping.stop_token_ids
        )
        self.token_ids[step].index_copy_(0, rows, tokens)
        self.logprobs[step].index_copy_(0, rows, logprobs)
        so_far = tokens[:, None] if stopping.matches_stop_string is None else self.token_ids[: step + 1, rows].T
        finished = stopping.is_finished(so_far)
        self.lengths.index_fill_(0, rows, step + 1)
        self.finished.index_copy_(0, rows, finished)
        return finished

    def output(self) -> GenerationOutput:
        """Return the responses, one per row."""
        mask = torch.arange(len(self.token_ids), device=self.token_ids.device) < self.lengths[:, None]
        return GenerationOutput(self.token_ids.T.contiguous(), mask, self.logprobs.T.contiguous(), self.finished)
