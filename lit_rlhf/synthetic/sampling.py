"""Sampling from models of the synthetic world, with the generator of PPO rollouts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import mask_through_first_stop, pad_left
from lit_rlhf.generation import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.rollout.forward_passes import map_in_chunks, response_logprobs
from lit_rlhf.synthetic.labelers import Response
from lit_rlhf.synthetic.responses import MAX_RESPONSE_TOKENS


class Completions(NamedTuple):
    """One response per prompt, as text for the judge and as token ids for log-probs and scores."""

    responses: list[Response]
    response_ids: Tensor  # (B, R) int64
    response_mask: Tensor  # (B, R) bool, True through the end token or the first newline
    logprobs: Tensor  # (B, R) float32

    def append_to(self, prompts: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Return token ids and attention mask, (B, T) each, of the left-padded prompts followed by the responses."""
        ids, mask = pad_left([tokenizer.encode(prompt) for prompt in prompts], tokenizer.pad_token_id)
        return torch.cat([ids, self.response_ids], 1), torch.cat([mask, self.response_mask.long()], 1)


def complete_prompts(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], temperature: float, *noise: int
) -> Completions:
    """Sample one response per prompt; it ends at the end token or, as in App. D, at the first newline.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: B texts, each with its few-shot prefix, if any.
        temperature: 1 to sample, 0 for greedy decoding.
        noise: the seed and further integers that key the sampling noise.
    """
    ids, mask = pad_left([tokenizer.encode(prompt) for prompt in prompts], tokenizer.pad_token_id)
    uniforms = sampling_uniforms(len(prompts), MAX_RESPONSE_TOKENS, *noise)
    rollout = CachedGenerator(batch_size=512).generate(
        model, PromptBatch.from_tokens(ids, mask), SamplingParams(MAX_RESPONSE_TOKENS, temperature), uniforms
    )
    stop_token_ids = torch.tensor([tokenizer.eos_token_id, tokenizer.encode("\n")[0]])
    response_mask, finished = mask_through_first_stop(rollout.response_ids, stop_token_ids)
    response_mask &= rollout.response_mask
    response_ids = rollout.response_ids.masked_fill(~response_mask, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    responses = [Response(text.strip(), bool(end)) for text, end in zip(texts, finished)]
    return Completions(responses, response_ids, response_mask, rollout.logprobs * response_mask)


def compute_kl(reference: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], completions: Completions) -> float:
    """Return the mean of log π(y|x) - log π_reference(y|x) over responses sampled from π, in nats per response."""
    ids, mask = completions.append_to(prompts, tokenizer)
    width = completions.response_ids.shape[1]

    def compute_logprobs(chunk: Tensor, chunk_mask: Tensor, chunk_width: int) -> Any:
        return response_logprobs(reference, chunk, chunk_mask, chunk_width, SamplingParams(chunk_width))

    ref_logprobs = map_in_chunks(compute_logprobs, ids, mask, width, batch_size=128) * completions.response_mask
    mean = float((completions.logprobs - ref_logprobs).sum(1).mean())
    return round(mean, 6) + 0.0  # rounding errors of a model against itself must not print as -0.00
