"""Adapter of an evaluated model to lm-eval's model interface, with cached log-likelihoods and completions."""

from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.tasks.metrics import OptionScore
from lit_rlhf.generation.sampling import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 256  # lm-eval's, for a task without a setting


class LMEvalAdapter(LM):
    """An evaluated model as lm-eval's `LM`.

    Attributes:
        num_truncated: number of prompts that were left-truncated.
    """

    def __init__(self, model: EvaluatedModel) -> None:
        super().__init__()
        self.evaluated_model = model
        self.num_truncated = 0

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is greedy."""
        results = self.evaluated_model.compute_loglikelihoods([request.args for request in requests], "joint")
        self.num_truncated += sum(result.num_truncated > 0 for result in results)
        return [OptionScore.make(result.logprob, result.is_greedy, result.num_tokens) for result in results]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse perplexity tasks."""
        raise UserError("tasks: perplexity of full texts is not offered here; `lit-rlhf validate` measures it")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return a greedy completion per request, truncated at the task's stop strings."""
        by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            settings: dict[str, Any] = request.args[1]
            until = settings.get("until") or []
            stop_strings = (until,) if isinstance(until, str) else tuple(until)
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError("tasks: benchmarks are answered greedily here, and this task asks for sampling")
            max_new_tokens = int(settings.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
            by_settings[max_new_tokens, stop_strings].append(index)
        texts = [""] * len(requests)
        for (max_new_tokens, stop_strings), indices in by_settings.items():
            prompts = [str(requests[index].args[0]) for index in indices]
            sampling = SamplingParams(max_new_tokens, 0.0)
            completions = self.evaluated_model.generate(prompts, sampling, stop_strings=stop_strings)
            for index, completion in zip(indices, completions):
                texts[index] = completion.text
                self.num_truncated += completion.num_truncated > 0
        return texts
