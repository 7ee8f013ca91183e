"""Generation in this process: one prefill per prompt, then one decode step per token. Knows token ids, no text."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.generation.base import GenerationOutput, Generator
from lit_rlhf.generation.generation_buffer import GenerationBuffer
from lit_rlhf.generation.kv_cache import (
    DecodeBatch,
    Decoder,
    DynamicCacheDecoder,
    StaticCacheDecoder,
    keeps_layer_states,
)
from lit_rlhf.generation.llama_decoder import LlamaDecoder, fast_decode_unsupported_reason
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StoppingCriteria, StopStringMatcher
from lit_rlhf.packing.attention_masks import packing_unsupported_reason
from lit_rlhf.progress import report_progress


class CachedGenerator(Generator):
    """Prefill once per prompt, then one cached step per token; finished responses leave the batch.

    Args:
        batch_size: largest number of responses decoded at once. Prompts are taken in order of length, the responses to
            one prompt together.
        compile: compile the decode step (`torch.compile`), once for all lengths and batch sizes. The first rollout
            takes a minute or more longer, so it pays in long runs alone. A model that cannot use a static KV cache
            decodes without, and one line says so.
    """

    def __init__(self, batch_size: int = 256, compile: bool = False) -> None:
        self.batch_size, self.compile = batch_size, compile
        self.compiled: dict[type[Decoder], object] = {}

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
        self.check_model(model.config)
        lengths, num_samples = prompts.attention_mask.sum(1), len(uniforms) // len(prompts.input_ids)
        stopping = StoppingCriteria(model, sampling, matches_stop_string)
        buffer = GenerationBuffer(model, uniforms.to(prompts.input_ids.device), sampling, stopping)
        decoder = self.make_decoder(model, int(lengths.max()) + sampling.max_new_tokens)
        # Dispatch costs less in inference mode. inference_mode(False) would turn gradients on.
        mode = torch.inference_mode() if decoder.allows_inference_mode else torch.no_grad()
        end = 0
        for chunk in torch.split(torch.argsort(lengths), max(self.batch_size // num_samples, 1)):
            width = int(lengths[chunk].max())
            ids, mask = prompts.input_ids[chunk, -width:], prompts.attention_mask[chunk, -width:]
            rows = (chunk[:, None] * num_samples + torch.arange(num_samples, device=chunk.device)).flatten()
            end += len(rows)
            with mode:
                _decode(decoder.start(ids, mask, num_samples, sampling.max_new_tokens), buffer, rows, end)
        return buffer.output()

    def check_model(self, config: PretrainedConfig) -> None:
        """See `Generator.check_model`; also refuse layers with a state, whose rows cannot be repeated and dropped."""
        super().check_model(config)
        if keeps_layer_states(config):
            raise UserError(
                f"generator: CachedGenerator keeps keys and values, and {config.get_text_config().model_type} has "
                "layers with another state; set model.generator to lit_rlhf.generation.HuggingFaceGenerator"
            )

    def make_decoder(self, model: PreTrainedModel, max_length: int) -> Decoder:
        """Return how the model decodes sequences of at most `max_length` tokens, with its weights as they are now."""
        reason = packing_unsupported_reason(model.config, max_length)
        if reason is not None:
            if self.compile:
                rank_zero_warn(f"generator.compile: decoding is not compiled: {reason}")
            return DynamicCacheDecoder(model)
        kind = StaticCacheDecoder if fast_decode_unsupported_reason(model) else LlamaDecoder
        if self.compile and kind not in self.compiled:
            self.compiled[kind] = kind.compile_step()
        return kind(model, self.compiled.get(kind))


def _decode(batch: DecodeBatch, buffer: GenerationBuffer, rows: Tensor, end: int) -> None:
    """Fill the rows (n,) of the buffer from the batch that decodes them; `end` responses are done after it."""
    max_new_tokens, count = buffer.sampling.max_new_tokens, len(buffer.lengths)
    logits = batch.prefill()
    for step in range(max_new_tokens):
        finished = buffer.sample(rows, step, logits)
        if finished.any():
            rows = rows[batch.compact(~finished)]
        report_progress("generate", end - len(rows) * (1 - (step + 1) / max_new_tokens), count)
        if not len(rows) or step + 1 == max_new_tokens:
            return
        logits = batch.step(buffer.token_ids[step][rows])
