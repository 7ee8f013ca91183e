"""Engines that turn prompts into responses. They know token ids and a model; no tokenizer, no text."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lit_rlhf.functional import position_ids, through_first
from lit_rlhf.rollout.experience import Rollout
from lit_rlhf.rollout.sampling import Sampling, choose_tokens


class Generator(Protocol):
    """A rollout engine.

    With the same uniforms every engine here draws the same responses, up to rounding of the logits.
    """

    def generate(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, sampling: Sampling
    ) -> Rollout:
        """Draw one response a prompt.

        Args:
            model: the policy; its `config.eos_token_id` and `config.pad_token_id` end and fill a response.
            prompt_ids: (B, P) int64, left-padded.
            prompt_mask: (B, P), 1 = real token.
            uniforms: (B, R) in [0, 1), the noise; R is `sampling.response_length`.
            sampling: temperature and length.
        """
        ...


class CachedGenerator:
    """Prefill once, then one cached step a token; rows that have ended are dropped from the batch.

    Args:
        batch_size: most rows decoded at once; prompts are taken in order of length.
    """

    def __init__(self, batch_size: int = 256) -> None:
        self.batch_size = batch_size

    @torch.no_grad()
    def generate(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, sampling: Sampling
    ) -> Rollout:
        """See `Generator.generate`."""
        lengths = prompt_mask.sum(1)
        order = torch.argsort(lengths)
        pieces = []
        for rows in torch.split(order, self.batch_size):
            width = int(lengths[rows].max())
            pieces.append(
                _decode(model, prompt_ids[rows, -width:], prompt_mask[rows, -width:], uniforms[rows.cpu()], sampling)
            )
        back = torch.argsort(order)
        ids, logprobs = (torch.cat(parts)[back] for parts in zip(*pieces))
        return _finish(model, ids, logprobs)


class HuggingFaceGenerator:
    """`transformers`' own `generate`, drawing by the same noise; for models whose cache is not a plain one.

    Args:
        synced_gpus: keep stepping until all ranks have ended; needed while the model is sharded.
    """

    def __init__(self, synced_gpus: bool = False) -> None:
        self.synced_gpus = synced_gpus

    @torch.no_grad()
    def generate(
        self, model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, sampling: Sampling
    ) -> Rollout:
        """See `Generator.generate`."""
        recorder = _Draw(uniforms, prompt_ids.shape[1], sampling.temperature)
        output = model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            max_new_tokens=sampling.response_length,
            do_sample=False,
            logits_processor=LogitsProcessorList([recorder]),
            synced_gpus=self.synced_gpus,
        )
        ids = output[:, prompt_ids.shape[1] :]
        logprobs = torch.stack(recorder.logprobs, dim=1)[:, : ids.shape[1]]
        missing = sampling.response_length - ids.shape[1]
        ids = torch.nn.functional.pad(ids, (0, missing), value=model.config.pad_token_id)
        return _finish(model, ids, torch.nn.functional.pad(logprobs, (0, missing)))


class _Draw(LogitsProcessor):
    """Leaves the drawn token as the only finite logit, so that greedy `generate` takes it."""

    def __init__(self, uniforms: Tensor, prompt_width: int, temperature: float) -> None:
        self.uniforms, self.prompt_width, self.temperature = uniforms, prompt_width, temperature
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_width
        tokens, logprobs = choose_tokens(scores, self.uniforms[:, step].to(scores.device), self.temperature)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _decode(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, uniforms: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Return response ids (B, R), padded after the end token, and log-probs (B, R)."""
    rows, width = prompt_ids.shape
    device, steps = prompt_ids.device, sampling.response_length
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    ids = torch.full((rows, steps), pad, device=device)
    logprobs = torch.zeros((rows, steps), device=device)
    noise = uniforms.to(device)
    attention = torch.cat([prompt_mask, prompt_mask.new_ones(rows, steps)], dim=1)
    positions = position_ids(prompt_mask)  # (B, P)
    alive = torch.arange(rows, device=device)
    cache: Any = DynamicCache(config=model.config)
    feed, feed_positions = prompt_ids, positions
    for step in range(steps):
        logits = model(
            input_ids=feed,
            attention_mask=attention[alive, : width + step],
            position_ids=feed_positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens, chosen = choose_tokens(logits, noise[alive, step], sampling.temperature)
        ids[alive, step] = tokens
        logprobs[alive, step] = chosen
        going = tokens != eos
        if not going.any():
            break
        if not going.all():
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            alive, tokens, feed_positions = alive[kept], tokens[kept], feed_positions[kept]
        feed, feed_positions = tokens[:, None], feed_positions[:, -1:] + 1
    return ids, logprobs


def _finish(model: PreTrainedModel, ids: Tensor, logprobs: Tensor) -> Rollout:
    """Mask through the end token; nothing after it counts."""
    mask, ended = through_first(ids, torch.tensor([model.config.eos_token_id], device=ids.device))
    return Rollout(
        response_ids=ids.masked_fill(~mask, model.config.pad_token_id),
        response_mask=mask,
        logprobs=logprobs.masked_fill(~mask, 0.0),
        ended=ended,
    )
