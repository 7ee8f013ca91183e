"""Judges that are models: a reward model, a language model behind an HTTP endpoint, a local language model."""

from pathlib import Path

from lit_rlhf.data.records import PromptRow
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions, parse_json_object
from lit_rlhf.evaluation.judges.judging_types import (
    MAX_RATING,
    METADATA_FIELDS,
    MIN_RATING,
    CompletionPair,
    Judge,
    RatedItem,
    Rating,
    Verdict,
    preference_from_scores,
)
from lit_rlhf.evaluation.models.evaluated_model import ModelSpec, check_spec, compute_log_odds
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer, render_scored_texts
from lit_rlhf.http import RequestFailed
from lit_rlhf.models.given import ModelSource, TokenizerSource, model_name, resolve_model
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarSource


class RewardModelJudge(Judge):
    """Prefers the completion that a reward model scores higher.

    Args:
        model: the reward model's folder or hub name; or a reward model that was loaded or trained already, which is
            used as it is, in eval mode. One that an evaluated model was trained against is refused.
        force: accept it nevertheless.
        tie_margin: a score difference up to this is a tie.
        template: prompt template of its training, as `template` of the data modules.
        loading: how to load it.
        tokenizer: its tokenizer, or the folder of one; by default that of the model's folder.
    """

    is_order_sensitive = False

    def __init__(
        self,
        model: ScalarSource | Path,
        force: bool = False,
        tie_margin: float = 0.0,
        template: str | None = None,
        loading: ModelLoadingConfig | None = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        if isinstance(model, str) and not model:
            raise UserError("judge: a reward model judge needs the folder of a reward model")
        self._scorer = RewardScorer(model, loading, template, tokenizer=tokenizer)
        self.model, self.force, self.tie_margin = self._scorer.source, force, tie_margin

    def compare(self, pairs: list[CompletionPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        records = [PromptRow(pair.raw_prompt or pair.prompt, pair.row) for pair in pairs for _ in range(2)]
        completions = [completion for pair in pairs for completion in (pair.first, pair.second)]
        scores = self._scorer.score(render_scored_texts(self._scorer.template, records, completions), cache)
        verdicts = []
        for first, second in zip(scores[::2], scores[1::2]):
            preference = preference_from_scores(first - second, self.tie_margin)
            verdicts.append([Verdict("reward model", preference, f"{first:.3f} against {second:.3f}")])
        return verdicts

    def check(self) -> None:
        """See `Judge.check`."""
        self._scorer.check()


class EndpointJudge(Judge):
    """A language model behind an OpenAI-compatible HTTP endpoint.

    Args:
        endpoint: the service and model.
        name: of the judge in the report; by default the model's name.
    """

    def __init__(self, endpoint: ChatCompletions, name: str | None = None) -> None:
        self.endpoint, self.name = endpoint, name or endpoint.model

    def check(self) -> None:
        """See `Judge.check`."""
        self.endpoint.check()

    def compare(self, pairs: list[CompletionPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        instruction = (
            'Which is better? Reply with one JSON object and nothing else: {"better": "A", "B" or "tie", "reason": "…"}'
        )
        prompts = [build_comparison_prompt(pair) + instruction for pair in pairs]
        rows = self.endpoint.request_all("judge: compare", prompts, parse_verdict, cache)
        return [
            [Verdict(self.name, None, row.reason) if isinstance(row, RequestFailed) else Verdict(self.name, *row)]
            for row in rows
        ]

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]]:
        """See `Judge.rate`."""
        fields = ", ".join(f'"{name}": true or false' for name in METADATA_FIELDS)
        prompts = [
            f"You rate an answer to a prompt.\n\nPrompt:\n{item.prompt}\n\nAnswer:\n{item.completion.text}\n\n"
            f'Reply with one JSON object alone: {{"overall": whole number from 1 (worst) to 7 (best), {fields}}}'
            for item in items
        ]
        rows = self.endpoint.request_all("judge: rate", prompts, parse_rating, cache)
        return [
            [Rating(self.name, None, {}) if isinstance(row, RequestFailed) else Rating(self.name, *row)] for row in rows
        ]


class HuggingFaceJudge(Judge):
    """A local language model that prefers the completion whose letter, A or B, is the likelier next token.

    Args:
        model: folder or hub name; or a language model that was loaded already, which is used as it is, in eval mode.
        tie_margin: a difference of log-probabilities up to this is a tie, in nats.
        loading: how to load it.
        tokenizer: its tokenizer, or the folder of one; by default that of the model's folder.
    """

    def __init__(
        self,
        model: ModelSource | Path,
        tie_margin: float = 0.0,
        loading: ModelLoadingConfig | None = None,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        self.spec, self.tie_margin = (
            ModelSpec(model, loading=loading or ModelLoadingConfig(), tokenizer=tokenizer),
            tie_margin,
        )
        self.name = model_name(resolve_model(model, "judge"))

    def compare(self, pairs: list[CompletionPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        prompts = [build_comparison_prompt(pair) + "The better answer is answer" for pair in pairs]
        log_odds = compute_log_odds(self.spec, prompts, (" A", " B"), cache)
        return [[Verdict(self.name, preference_from_scores(each, self.tie_margin))] for each in log_odds]

    def check(self) -> None:
        """See `Judge.check`."""
        check_spec(self.spec)


def build_comparison_prompt(pair: CompletionPair) -> str:
    """Return the prompt for a judging language model, without the final instruction."""
    return (
        "You compare two answers to a prompt. Prefer the one that is more helpful, true and harmless; length and style "
        f"alone are no merit.\n\nPrompt:\n{pair.prompt}\n\nAnswer A:\n{pair.first.text}\n\n"
        f"Answer B:\n{pair.second.text}\n\n"
    )


def parse_verdict(text: str) -> tuple[float, str]:
    """Parse a comparison as (preference, reason); ValueError if it is malformed."""
    reply = parse_json_object(text)
    verdict = str(reply.get("better")).strip().upper()
    if verdict not in ("A", "B", "TIE"):
        raise ValueError(f"better is {reply.get('better')!r}")
    return {"A": 1.0, "B": 0.0, "TIE": 0.5}[verdict], str(reply.get("reason", ""))


def parse_rating(text: str) -> tuple[int, dict[str, bool]]:
    """Parse a rating as (overall, flags); ValueError if it is malformed or off the scale."""
    reply = parse_json_object(text)
    overall = reply.get("overall")
    if isinstance(overall, bool) or not isinstance(overall, int) or not MIN_RATING <= overall <= MAX_RATING:
        raise ValueError(f"overall is {overall!r}")
    return overall, {name: value for name in METADATA_FIELDS if isinstance(value := reply.get(name), bool)}
