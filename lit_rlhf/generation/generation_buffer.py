"""Responses while they are being sampled."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.generation.base import GenerationOutput
from lit_rlhf.generation.sampling import SamplingParams, sample_tokens
from lit_rlhf.generation.stopping import StoppingCriteria


class GenerationBuffer:
    """Token ids and log-probs of N responses, filled step by step.

    A response that has finished may be sampled on: what follows its end is dropped by `output`. So ends need not be
    looked for at every step, which would make the host wait for the device.

    Tensors are (R, N), one row per step: a step then reads and writes contiguous memory.
    """

    def __init__(
        self, model: PreTrainedModel, uniforms: Tensor, sampling: SamplingParams, stopping: StoppingCriteria
    ) -> None:
        self.sampling, self.stopping, self.pad_token_id = sampling, stopping, model.config.pad_token_id
        self.uniforms = uniforms.T.contiguous()  # (R, N)
        self.token_ids = torch.full_like(self.uniforms, self.pad_token_id, dtype=torch.long)
        self.logprobs = torch.zeros_like(self.uniforms, dtype=torch.float32)
        self.lengths = torch.full_like(self.token_ids[0], len(self.uniforms))  # (N,), of responses in tokens
        self.finished = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.step = self.lengths.new_zeros(1)  # tokens that the rows now decoded have; a tensor: see `sample`

    def sample(self, rows: Tensor, step: int, logits: Tensor) -> Tensor:
        """Sample the next token of `rows` (b,) from their logits (b, V); return the tokens, (b,) int64.

        Nothing here depends on the number `step` but `min_new_tokens`, so that the launches of one step can be replayed
        for the next ones: where the token goes is read from a tensor on the device.
        """
        if step == 0:
            self.step.zero_()
        place = self.step, rows
        tokens, logprobs = sample_tokens(
            logits, self.uniforms[place], self.sampling, step, self.stopping.stop_token_ids
        )
        self.token_ids.index_put_(place, tokens)
        self.logprobs.index_put_(place, logprobs)
        self.step.add_(1)
        return tokens

    def find_finished(self, rows: Tensor, start: int, stop: int) -> Tensor | None:
        """Look for ends among the tokens [start, stop) of `rows`. The host waits for the device here, and only here.

        Returns:
            which of the rows have finished, (b,) bool, or None where no token is an end. Stop strings are looked for at
            the last token alone.
        """
        new_tokens = self.token_ids[start:stop, rows]  # (k, b)
        is_end = self.stopping.is_stop_token(new_tokens)
        if self.stopping.matches_stop_string is not None:
            is_end[-1] |= self.stopping.matches_stop_string(self.token_ids[:stop, rows].T)
        if not is_end.any():
            return None
        newly = is_end.any(0) & ~self.finished[rows]
        before_end = (is_end.cumsum(0) == 0).sum(0)  # (b,)
        self.lengths[rows[newly]] = start + 1 + before_end[newly]
        self.finished[rows[newly]] = True
        return self.finished[rows]

    def output(self) -> GenerationOutput:
        """Return the responses, one per row."""
        mask = torch.arange(len(self.token_ids), device=self.token_ids.device) < self.lengths[:, None]  # (N, R)
        ids, logprobs = torch.where(mask, self.token_ids.T, self.pad_token_id), torch.where(mask, self.logprobs.T, 0.0)
        return GenerationOutput(ids.contiguous(), mask, logprobs.contiguous(), self.finished)
