"""A subject as lm-eval's model: its own likelihoods and answers, from the cache where they are known."""

from collections import defaultdict
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel
from lit_rlhf.evaluation.tasks.metrics import OptionScore
from lit_rlhf.generation.sampling import SamplingParams

DEFAULT_MAX_NEW_TOKENS = 256  # lm-eval's, for a task that says none


class LMEvalAdapter(LM):
    """See the module. `cut` counts prompts that were cut in front."""

    def __init__(self, model: EvaluatedModel) -> None:
        super().__init__()
        self.evaluated_model = model
        self.num_truncated = 0

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether all its tokens are likeliest."""
        found = self.evaluated_model.compute_loglikelihoods([request.args for request in requests], "joint")
        self.num_truncated += sum(each.num_truncated > 0 for each in found)
        return [OptionScore.make(each.logprob, each.is_greedy, each.num_tokens) for each in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Of whole texts: not offered."""
        raise UserError("tasks: perplexity of whole texts is not offered here; `lit-rlhf validate` measures it")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer greedily, up to each task's stop texts."""
        kinds: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            settings: dict[str, Any] = request.args[1]
            until = settings.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError("tasks: benchmarks are answered greedily here, and this task asks for sampling")
            kinds[int(settings.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS)), stops].append(place)
        answers = [""] * len(requests)
        for (length, stops), places in kinds.items():
            prompts = [str(requests[place].args[0]) for place in places]
            for place, answer in zip(places, self.evaluated_model.generate(prompts, SamplingParams(length, 0.0), stop_strings=stops)):
                answers[place] = answer.text
                self.num_truncated += answer.num_truncated > 0
        return answers
