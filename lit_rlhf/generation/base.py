"""The interface of generation engines.

Shapes: `B` prompts, `N` responses, `P` prompt, `R` response.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.errors import UserError
from lit_rlhf.generation.sampling import SamplingParams
from lit_rlhf.generation.stopping import StopStringMatcher
from lit_rlhf.packing.architectures import left_padding_unsupported_reason


class GenerationOutput(NamedTuple):
    """Sampled responses."""

    response_ids: Tensor  # (N, R) int64, right-padded
    response_mask: Tensor  # (N, R) bool, True through the end token, which is an action
    logprobs: Tensor  # (N, R) float32, of each token under the distribution it was sampled from; 0 outside the mask
    finished: Tensor  # (N,) bool, whether the response ended before the limit


class Generator(ABC):
    """A generation engine: turns prompts into responses.

    `CachedGenerator` and `HuggingFaceGenerator` sample the same responses from the same uniforms, up to rounding of the
    logits. `VLLMGenerator` samples other ones from the same distribution.
    """

    #: whether each rank must hold the full weights while it generates (`strategies.unsharded_parameters`)
    needs_full_weights: bool = True

    @abstractmethod
    def generate(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> GenerationOutput:
        """Sample N / B responses per prompt. The responses to one prompt are consecutive rows.

        Args:
            model: the policy; its `config.pad_token_id` fills a response after its end.
            prompts: B left-padded prompts; tensors on the device of `model`.
            sampling: the distribution, the length limits and what ends a response.
            uniforms: (N, R) in [0, 1), the sampling noise; N is a multiple of B, R is `sampling.max_new_tokens`.
            matches_stop_string: finds `sampling.stop_strings`, see `stop_string_matcher`.
        """

    def check(self, sampling: SamplingParams, old_logprobs: str) -> None:
        """Refuse settings that the engine does not support, before a model is loaded.

        Args:
            sampling: of the run.
            old_logprobs: `ppo.old_logprobs`.

        Raises:
            UserError: names the setting.
        """

    def check_model(self, config: PretrainedConfig) -> None:
        """Refuse an architecture whose outputs change with left padding.

        Args:
            config: of the model, before any weight is loaded.

        Raises:
            UserError: names the architecture.
        """
        reason = left_padding_unsupported_reason(config)
        if reason is not None:
            raise UserError(f"model: {reason}; generation needs another architecture")

    def check_connection(self) -> None:
        """Refuse a service that cannot be reached; `lit-rlhf fit` calls it before anything is loaded.

        Raises:
            UserError: names the service.
        """


class RemoteGenerator(Generator):
    """An engine that computes elsewhere, so that the policy can be updated while it samples."""

    @abstractmethod
    def start(
        self,
        model: PreTrainedModel,
        prompts: PromptBatch,
        sampling: SamplingParams,
        uniforms: Tensor,
        matches_stop_string: StopStringMatcher | None = None,
    ) -> None:
        """Begin to sample from the policy as it is now, see `Generator.generate`; every rank must call it."""

    @abstractmethod
    def ready_output(self, timeout: float | None = None) -> GenerationOutput | None:
        """Wait for the responses that were started, and keep them for `finish`; every rank must call it.

        Args:
            timeout: seconds after which a rank no longer waits for its own; None waits for all.

        Returns:
            None on all ranks if nothing was started, it failed, the engine lost the weights, or the responses of any
            rank were not there in time, which stay waited for.
        """

    @abstractmethod
    def finish(self) -> GenerationOutput | None:
        """Wait for the responses that were started, and return them; every rank must call it.

        None if nothing was started, or the engine lost the weights.

        Raises:
            UserError: it failed.
        """

    @abstractmethod
    def cancel(self) -> None:
        """Drop what was started."""

    def check_overlap(self) -> None:
        """Refuse settings with which responses cannot be sampled during the update.

        Raises:
            UserError: names the setting.
        """
