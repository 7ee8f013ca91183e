"""Engines that turn prompts into responses. They know token ids and a model; no tokenizer, no text."""

from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lit_rlhf.generation.generation_buffer import GenerationBuffer
from lit_rlhf.generation.kv_cache import DecodeBatch, make_decode_batch
from lit_rlhf.generation.llama_decode_batch import DecodeStep, FastDecoder, build_fast_decoder
from lit_rlhf.generation.llama_decoder import (
    compile_decode_step,
    fast_decode_unsupported_reason,
    is_safe_in_inference_mode,
    next_token_logits,
)
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.packing.attention_masks import packing_unsupported_reason
from lit_rlhf.rollout.experience import GenerationOutput


class Generator(Protocol):
    """A rollout engine.

    With the same uniforms the engines of this file draw the same responses, up to rounding of the logits; those of
    `lit_rlhf.generation.vllm.VLLMGenerator` are others, of the same distribution.
    """

    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: SamplingParams,
        stop_string_matcher: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """Draw the responses of each prompt: N / B of them.

        Args:
            model: the policy; its `config.pad_token_id` fills a response behind its end.
            prompt_ids: (B, P) int64, left-padded.
            prompt_mask: (B, P), 1 = real token.
            uniforms: (N, R) in [0, 1), the noise; N is a multiple of B, R is `sampling.max_new_tokens`. The responses
                to a prompt are consecutive rows, here and in the rollout.
            sampling: from which distribution, how long, and what ends a response.
            stop_string_matcher: finds `sampling.stop_strings`; made of a tokenizer by `endings.stop_string_matcher`.
        """
        ...


def checked(generator: Generator, sampling: SamplingParams, logprobs: str) -> Generator:
    """Return the engine; where it has a `check`, it may refuse what it cannot do, before a model is loaded.

    An engine that asks someone else may also have a `reach`, without arguments: `lit-rlhf fit` calls it before
    anything is loaded, and it raises a `UserError` where nobody answers.

    Args:
        generator: the engine; `check(sampling, logprobs)` raises a `UserError`.
        sampling: of the run.
        logprobs: `ppo.old_logprobs`.
    """
    check = getattr(generator, "check", None)
    if check is not None:
        check(sampling, logprobs)
    return generator


class CachedGenerator:
    """Prefill once a prompt, then one cached step a token; rows that have ended are dropped from the batch.

    In float32 on a CPU the weights of plain layers are copied for the rollout, in the order in which they are read.

    Args:
        batch_size: most rows decoded at once; prompts are taken in order of length, the responses to one together.
        compile: compile the step of a token (`torch.compile`), once for all lengths and numbers of rows. The first
            rollout takes a minute or more longer, so it pays in long runs alone. For Llama's architecture, Mistral's
            and Qwen2's; others run as they are, and one line says so.
    """

    def __init__(self, batch_size: int = 256, compile: bool = False) -> None:
        self.batch_size, self.compile = batch_size, compile
        self.decode_step: DecodeStep | None = None

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        sampling: SamplingParams,
        stop_string_matcher: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """See `Generator.generate`."""
        lengths, samples = prompt_mask.sum(1), len(uniforms) // len(prompt_ids)
        ending = StoppingCriteria(model, sampling, stop_string_matcher)
        response = GenerationBuffer(model, uniforms.to(prompt_ids.device), sampling, ending)
        direct = self._build_fast_decoder(model, int(lengths.max()) + sampling.max_new_tokens)
        # what a call costs counts here, and in inference mode it costs less
        light = direct is not None and is_safe_in_inference_mode(model)
        mode = torch.inference_mode() if light else torch.no_grad()  # inference_mode(False) would turn gradients on
        for prompts in torch.split(torch.argsort(lengths), max(self.batch_size // samples, 1)):
            width = int(lengths[prompts].max())
            ids, mask = prompt_ids[prompts, -width:], prompt_mask[prompts, -width:]
            rows = (prompts[:, None] * samples + torch.arange(samples, device=prompts.device)).flatten()
            with mode:
                _decode(make_decode_batch(model, ids, mask, samples, sampling.max_new_tokens, direct), response, rows)
        return response.output()

    def _build_fast_decoder(self, model: PreTrainedModel, longest: int) -> FastDecoder | None:
        """Return the blocks that are called by themselves, for sequences of at most so many tokens; None: the model."""
        config = model.config.get_text_config()
        reason = packing_unsupported_reason(
            config, config._attn_implementation, longest
        ) or fast_decode_unsupported_reason(model)
        if reason and self.compile:
            rank_zero_warn(f"generator.compile: the rollout runs as it is, without being compiled: {reason}")
        if reason:
            return None
        if self.compile and self.decode_step is None:
            self.decode_step = compile_decode_step()
        return build_fast_decoder(model, self.decode_step or next_token_logits)


def _decode(batch: DecodeBatch, response: GenerationBuffer, rows: Tensor) -> None:
    """Fill `rows` (n,) of the table from the batch that holds them."""
    logits = batch.prefill()
    for step in range(response.sampling.max_new_tokens):
        ended = response.sample(rows, step, logits)
        if ended.any():
            rows = rows[batch.compact(~ended)]
        if not len(rows) or step + 1 == response.sampling.max_new_tokens:
            return
        logits = batch.step(response.token_ids[step][rows])


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
        sampling: SamplingParams,
        stop_string_matcher: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """See `Generator.generate`."""
        ending, samples = StoppingCriteria(model, sampling, stop_string_matcher), len(uniforms) // len(prompt_ids)
        response = GenerationBuffer(model, uniforms.to(prompt_ids.device), sampling, ending)
        draw, own = _SampleTokens(response, prompt_ids.shape[1]), model.generation_config
        # What the model's folder suggests (a repetition penalty, say) would come in beside what is asked for here.
        model.generation_config = GenerationConfig(pad_token_id=model.config.pad_token_id)
        try:
            model.generate(
                input_ids=prompt_ids.repeat_interleave(samples, 0),
                attention_mask=prompt_mask.repeat_interleave(samples, 0),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([_AllFinished(response)]),
                synced_gpus=self.synced_gpus,
            )
        finally:
            model.generation_config = own
        return response.output()


class _SampleTokens(LogitsProcessor):
    """Leaves the drawn token as the only finite logit, so that greedy `generate` takes it."""

    def __init__(self, response: GenerationBuffer, prompt_width: int) -> None:
        self.response, self.prompt_width = response, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, response = input_ids.shape[1] - self.prompt_width, self.response
        going = (~response.finished).nonzero().squeeze(1)
        if len(going) and step < len(response.token_ids):  # else a rank waits for others
            response.sample(going, step, scores[going])
        column = response.token_ids[min(step, len(response.token_ids) - 1), :, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, column, 0.0)


class _AllFinished(StoppingCriteria):
    """Tells `generate` which rows have ended."""

    def __init__(self, response: GenerationBuffer) -> None:
        self.response = response

    def __call__(self, input_ids: Tensor, scores: Tensor, **settings: Any) -> Tensor:
        return self.response.finished
