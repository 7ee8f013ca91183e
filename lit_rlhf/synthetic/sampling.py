"""Completions of a model in the world, by the engine that PPO's rollouts use."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.functional import mask_through_first_stop, pad_left
from lit_rlhf.generation.generators import CachedGenerator
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.rollout.forward_passes import map_in_chunks, response_logprobs
from lit_rlhf.synthetic.labelers import Response
from lit_rlhf.synthetic.responses import MAX_RESPONSE_TOKENS


class Completions(NamedTuple):
    """One response a prompt, as text for the judge and as ids for log-probs and scores."""

    responses: list[Response]
    response_ids: Tensor  # (B, R) int64
    response_mask: Tensor  # (B, R) bool, True through the end token or the first newline
    logprobs: Tensor  # (B, R) float32

    def append_to(self, prompts: list[str], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
        """Return ids and attention mask (B, T) of the prompts, left-padded, with the responses behind them."""
        ids, mask = pad_left([tokenizer.encode(prompt) for prompt in prompts], tokenizer.pad_token_id)
        return torch.cat([ids, self.response_ids], 1), torch.cat([mask, self.response_mask.long()], 1)


def complete(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], temperature: float, *noise: int
) -> Completions:
    """Sample one response a prompt; it ends at the end token or, as in App. D, at the first newline.

    Args:
        model: any causal language model of the world.
        tokenizer: the world's.
        prompts: texts; a few-shot prefix stands in front of the prompt.
        temperature: 1 to sample, 0 for greedy decoding.
        noise: the seed and the place of the random draws.
    """
    ids, mask = pad_left([tokenizer.encode(prompt) for prompt in prompts], tokenizer.pad_token_id)
    uniforms = sampling_uniforms(len(prompts), MAX_RESPONSE_TOKENS, *noise)
    rollout = CachedGenerator(batch_size=512).generate(
        model, ids, mask, uniforms, SamplingParams(MAX_RESPONSE_TOKENS, temperature)
    )
    stops = torch.tensor([tokenizer.eos_token_id, tokenizer.encode("\n")[0]])
    response_mask, ended = mask_through_first_stop(rollout.response_ids, stops)
    response_mask &= rollout.response_mask
    spoken = rollout.response_ids.masked_fill(~response_mask, tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(spoken, skip_special_tokens=True)
    responses = [Response(text.strip(), bool(end)) for text, end in zip(texts, ended)]
    return Completions(responses, spoken, response_mask, rollout.logprobs * response_mask)


def kl_to(reference: PreTrainedModel, tokenizer: Tokenizer, prompts: list[str], completions: Completions) -> float:
    """Return the mean of log π(y|x) - log π_reference(y|x) over responses drawn from π, in nats a response."""
    ids, mask = completions.append_to(prompts, tokenizer)
    width = completions.response_ids.shape[1]

    def of_reference(chunk: Tensor, chunk_mask: Tensor, chunk_width: int) -> Any:
        return response_logprobs(reference, chunk, chunk_mask, chunk_width, SamplingParams(chunk_width))

    logprobs = map_in_chunks(of_reference, ids, mask, width, batch_size=128) * completions.response_mask
    mean = float((completions.logprobs - logprobs).sum(1).mean())
    return round(mean, 6) + 0.0  # rounding noise of a model against itself must not show as -0.00
