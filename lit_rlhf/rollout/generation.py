"""Engines that turn prompts into responses. They know token ids and a model; no tokenizer, no text."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lit_rlhf.functional import position_ids
from lit_rlhf.rollout.endings import Ending, TextEnds
from lit_rlhf.rollout.experience import Rollout
from lit_rlhf.rollout.sampling import Sampling, choose_tokens


class Generator(Protocol):
    """A rollout engine.

    With the same uniforms every engine here draws the same responses, up to rounding of the logits.
    """

    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        text_ends: TextEnds | None = None,
    ) -> Rollout:
        """Draw the responses of each prompt: N / B of them.

        Args:
            model: the policy; its `config.pad_token_id` fills a response behind its end.
            prompt_ids: (B, P) int64, left-padded.
            prompt_mask: (B, P), 1 = real token.
            uniforms: (N, R) in [0, 1), the noise; N is a multiple of B, R is `sampling.response_length`. The responses
                to a prompt are consecutive rows, here and in the rollout.
            sampling: from which distribution, how long, and what ends a response.
            text_ends: finds `sampling.stop_strings`; made of a tokenizer by `endings.text_ends`.
        """
        ...


class CachedGenerator:
    """Prefill once a prompt, then one cached step a token; rows that have ended are dropped from the batch.

    Args:
        batch_size: most rows decoded at once; prompts are taken in order of length, the responses to one together.
    """

    def __init__(self, batch_size: int = 256) -> None:
        self.batch_size = batch_size

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        text_ends: TextEnds | None = None,
    ) -> Rollout:
        """See `Generator.generate`."""
        lengths, samples = prompt_mask.sum(1), len(uniforms) // len(prompt_ids)
        ending = Ending(model, sampling, text_ends)
        response = _Responses(model, uniforms.to(prompt_ids.device), sampling, ending)
        for prompts in torch.split(torch.argsort(lengths), max(self.batch_size // samples, 1)):
            width = int(lengths[prompts].max())
            rows = (prompts[:, None] * samples + torch.arange(samples, device=prompts.device)).flatten()
            _decode(model, prompt_ids[prompts, -width:], prompt_mask[prompts, -width:], response, rows)
        return response.rollout()


class HuggingFaceGenerator:
    """`transformers`' own `generate`, drawing by the same noise; for models whose cache is not a plain one.

    Args:
        synced_gpus: keep stepping until all ranks have ended; needed while the model is sharded.
    """

    def __init__(self, synced_gpus: bool = False) -> None:
        self.synced_gpus = synced_gpus

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: Sampling,
        text_ends: TextEnds | None = None,
    ) -> Rollout:
        """See `Generator.generate`."""
        ending, samples = Ending(model, sampling, text_ends), len(uniforms) // len(prompt_ids)
        response = _Responses(model, uniforms.to(prompt_ids.device), sampling, ending)
        draw, own = _Draw(response, prompt_ids.shape[1]), model.generation_config
        # What the model's folder suggests (a repetition penalty, say) would come in beside what is asked for here.
        model.generation_config = GenerationConfig(pad_token_id=model.config.pad_token_id)
        try:
            model.generate(
                input_ids=prompt_ids.repeat_interleave(samples, 0),
                attention_mask=prompt_mask.repeat_interleave(samples, 0),
                max_new_tokens=sampling.response_length,
                do_sample=False,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([_Ended(response)]),
                synced_gpus=self.synced_gpus,
            )
        finally:
            model.generation_config = own
        return response.rollout()


class _Responses:
    """The table that an engine fills column by column, each row until it ends."""

    def __init__(self, model: PreTrainedModel, uniforms: Tensor, sampling: Sampling, ending: Ending) -> None:
        self.uniforms, self.sampling, self.ending = uniforms, sampling, ending
        self.ids = torch.full(uniforms.shape, model.config.pad_token_id, device=uniforms.device)  # (N, R)
        self.logprobs = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        self.lengths = torch.full_like(self.ids[:, 0], sampling.response_length)
        self.ended = torch.zeros_like(self.lengths, dtype=torch.bool)

    def draw(self, rows: Tensor, step: int, logits: Tensor) -> Tensor:
        """Draw the next token of `rows` (b,), none of which has ended, by their logits (b, V); return which go on."""
        noise = self.uniforms[rows, step]
        tokens, logprobs = choose_tokens(logits, noise, self.sampling, step, self.ending.ids)
        self.ids[rows, step], self.logprobs[rows, step] = tokens, logprobs
        ended = self.ending.of(self.ids[rows, : step + 1])
        self.ended[rows] = ended
        self.lengths[rows[ended]] = step + 1
        return ~ended

    def rollout(self) -> Rollout:
        """Return them with their mask."""
        mask = torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]
        return Rollout(self.ids, mask, self.logprobs, self.ended)


class _Draw(LogitsProcessor):
    """Leaves the drawn token as the only finite logit, so that greedy `generate` takes it."""

    def __init__(self, response: _Responses, prompt_width: int) -> None:
        self.response, self.prompt_width = response, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, response = input_ids.shape[1] - self.prompt_width, self.response
        going = (~response.ended).nonzero().squeeze(1)
        if len(going) and step < response.ids.shape[1]:  # else a rank waits for others
            response.draw(going, step, scores[going])
        column = response.ids[:, min(step, response.ids.shape[1] - 1), None]
        return torch.full_like(scores, -torch.inf).scatter_(1, column, 0.0)


class _Ended(StoppingCriteria):
    """Tells `generate` which rows have ended."""

    def __init__(self, response: _Responses) -> None:
        self.response = response

    def __call__(self, input_ids: Tensor, scores: Tensor, **settings: Any) -> Tensor:
        return self.response.ended


def _decode(
    model: PreTrainedModel, prompt_ids: Tensor, prompt_mask: Tensor, response: _Responses, rows: Tensor
) -> None:
    """Fill `rows` (n,) of the table: n / b consecutive ones for each of the b prompts."""
    samples, width = len(rows) // len(prompt_ids), prompt_ids.shape[1]
    cache: Any = DynamicCache(config=model.config)
    positions = position_ids(prompt_mask)
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), response.sampling.response_length)], 1)
    inputs = {"use_cache": True, "logits_to_keep": 1, "past_key_values": cache}
    logits = model(input_ids=prompt_ids, attention_mask=prompt_mask, position_ids=positions, **inputs).logits[:, -1]
    cache.batch_repeat_interleave(samples)
    logits, mask, position = (each.repeat_interleave(samples, 0) for each in (logits, mask, positions[:, -1:]))
    for step in range(response.sampling.response_length):
        going = response.draw(rows, step, logits)
        if not going.all():
            kept = going.nonzero().squeeze(1)
            if not len(kept):
                break
            cache.batch_select_indices(kept)
            rows, mask, position = rows[kept], mask[kept], position[kept]
        if step + 1 == response.sampling.response_length:
            break
        position = position + 1
        logits = model(
            input_ids=response.ids[rows, step, None],
            attention_mask=mask[:, : width + step + 1],
            position_ids=position,
            **inputs,
        ).logits[:, -1]
