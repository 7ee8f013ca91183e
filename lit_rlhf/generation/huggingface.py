"""Generation by `transformers`' own `generate`."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers import StoppingCriteria as HFStoppingCriteria

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.generation.base import GenerationOutput, Generator
from lit_rlhf.generation.generation_buffer import GenerationBuffer
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.progress import report_progress


class HuggingFaceGenerator(Generator):
    """`model.generate`, sampling from the same uniforms; for models whose cache is not a plain one.

    Args:
        synced_gpus: keep stepping until all ranks have finished; needed while the model is sharded.
    """

    def __init__(self, synced_gpus: bool = False) -> None:
        self.synced_gpus = synced_gpus

    @torch.no_grad()
    def generate(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """See `Generator.generate`."""
        stopping, num_samples = (
            StoppingCriteria(model, sampling, matches_stop_string),
            len(uniforms) // len(prompts.input_ids),
        )
        buffer = GenerationBuffer(model, uniforms.to(prompts.input_ids.device), sampling, stopping)
        sampler, own_config = _SampleTokens(buffer, prompts.input_ids.shape[1]), model.generation_config
        # The generation config of the model's folder (a repetition penalty, say) would change the distribution.
        model.generation_config = GenerationConfig(pad_token_id=model.config.pad_token_id)
        try:
            model.generate(
                input_ids=prompts.input_ids.repeat_interleave(num_samples, 0),
                attention_mask=prompts.attention_mask.repeat_interleave(num_samples, 0),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_AllFinished(buffer)]),
                synced_gpus=self.synced_gpus,
            )
        finally:
            model.generation_config = own_config
        return buffer.output()


class _SampleTokens(LogitsProcessor):
    """Leaves the sampled token as the only finite logit, so that greedy `generate` takes it."""

    def __init__(self, buffer: GenerationBuffer, prompt_width: int) -> None:
        self.buffer, self.prompt_width = buffer, prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, buffer = input_ids.shape[1] - self.prompt_width, self.buffer
        active = (~buffer.finished).nonzero().squeeze(1)
        if len(active) and step < len(buffer.token_ids):  # else this rank waits for the others
            buffer.sample(active, step, scores[active])
            buffer.find_finished(active, step, step + 1)
            width, count = buffer.token_ids.shape
            report_progress("generate", count - len(active) * (1 - (step + 1) / width), count)
        tokens = buffer.token_ids[min(step, len(buffer.token_ids) - 1), :, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


class _AllFinished(HFStoppingCriteria):
    """Reports to `generate` which rows have finished."""

    def __init__(self, buffer: GenerationBuffer) -> None:
        self.buffer = buffer

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return self.buffer.finished
