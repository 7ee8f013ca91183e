"""Generation in this process: one prefill per prompt, then one decode step per token. Knows token ids, no text."""

from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.generation.base import GenerationOutput, Generator
from lit_rlhf.generation.cuda_graph import CapturedStep, can_capture_steps
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

DECODE_BATCH_SIZE = 256  # responses at once, unless told otherwise
_FINISH_CHECK_INTERVAL = 16  # captured steps between two checks for finished rows
_COMPACT_BELOW = 0.75  # fraction of unfinished rows at which a captured batch is made smaller


class CachedGenerator(Generator):
    """Prefill once per prompt, then one cached step per token; finished responses leave the batch.

    Args:
        batch_size: largest number of responses decoded at once. Prompts are taken in order of length, the responses to
            one prompt together.
        compile: compile the decode step (`torch.compile`), once for all lengths and batch sizes. The first rollout
            takes a minute or more longer, so it pays in long runs alone. A model that cannot use a static KV cache
            decodes without, and one line says so.
    """

    def __init__(self, batch_size: int = DECODE_BATCH_SIZE, compile: bool = False) -> None:
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
                batch = decoder.start(ids, mask, num_samples, sampling.max_new_tokens)
                _decode(batch, buffer, rows, end, decoder.captures_steps)
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
        fast = fast_decode_unsupported_reason(model) is None and not can_capture_steps(model)
        kind = LlamaDecoder if fast else StaticCacheDecoder
        if self.compile and kind not in self.compiled:
            self.compiled[kind] = kind.compile_step()
        return kind(model, self.compiled.get(kind))


def _decode(batch: DecodeBatch, buffer: GenerationBuffer, rows: Tensor, end: int, captures_steps: bool) -> None:
    """Fill the rows (n,) of the buffer from the batch that decodes them; `end` responses are done after it.

    Between two checks for finished rows the host waits for nothing. A check at every step would cost a GPU more than
    the finished rows do, and a batch of another size costs a new graph; on a CPU, and where stop strings are searched
    by the host, every finished row leaves at once.
    """
    sampling, count = buffer.sampling, len(buffer.lengths)
    interval = _FINISH_CHECK_INTERVAL if captures_steps and buffer.stopping.matches_stop_string is None else 1
    tokens = buffer.sample(rows, 0, batch.prefill())
    seen, step = 0, 1
    run: Callable[[int], None] | None = None
    while True:
        finished = buffer.find_finished(rows, seen, step)
        seen = step
        if finished is not None and (~finished).sum() <= len(rows) * (_COMPACT_BELOW if captures_steps else 1):
            order = batch.compact(~finished)
            rows, tokens, run = rows[order], tokens[order], None
        report_progress("generate", end - len(rows) * (1 - step / sampling.max_new_tokens), count)
        if not len(rows) or step == sampling.max_new_tokens:
            return
        # launches differ until the first end token may be sampled
        limit = sampling.max_new_tokens if step + 1 >= sampling.min_new_tokens else sampling.min_new_tokens - 1
        last = min(step + interval, limit)
        if batch.reserve(last - step) or run is None or step + 1 == sampling.min_new_tokens:
            advance = partial(_advance, batch, buffer, rows, tokens)
            run = CapturedStep(advance) if captures_steps else advance
        for index in range(step, last):
            run(index)
        step = last


def _advance(batch: DecodeBatch, buffer: GenerationBuffer, rows: Tensor, tokens: Tensor, step: int) -> None:
    """Decode `tokens` (n,) and sample the next ones in their place."""
    tokens.copy_(buffer.sample(rows, step, batch.step(tokens)))
