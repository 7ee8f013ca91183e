"""Judges that are models: a reward model, a language model behind an address, a local language model."""

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.chat_completions import ChatCompletions, json_object
from lit_rlhf.evaluation.judges.judging_types import METADATA, AnswerPair, RatedItem, Rating, Verdict, of_difference
from lit_rlhf.evaluation.models.evaluated_model import ModelSpec, log_odds, tokenizer_of
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer
from lit_rlhf.http import RequestFailed
from lit_rlhf.models.loading_config import ModelLoadingConfig


class RewardModelJudge:
    """Prefers what a reward model scores higher.

    Args:
        model: the reward model's folder. One that a model under evaluation was trained against is refused.
        force: take it all the same.
        tie: scores this near to each other are a tie.
        template: how prompts were put into words in its training, as `template` of the data modules.
        loading: how to load it.
    """

    sees_order = False

    def __init__(
        self,
        model: str,
        force: bool = False,
        tie: float = 0.0,
        template: str | None = None,
        loading: ModelLoadingConfig | None = None,
    ) -> None:
        self.model, self.force, self.tie = model, force, tie
        self._reward_model = RewardScorer(model, loading, template)

    def compare(self, pairs: list[AnswerPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        prompts = [self._reward_model.template.render(pair.source or pair.prompt, pair.row) for pair in pairs]
        rated = [(prompt, answer) for prompt, pair in zip(prompts, pairs) for answer in (pair.first, pair.second)]
        scores = self._reward_model.scores(rated, cache)
        return [
            [Verdict("reward model", of_difference(first - second, self.tie), f"{first:.3f} against {second:.3f}")]
            for first, second in zip(scores[::2], scores[1::2])
        ]

    def check(self) -> None:
        """See `lit_rlhf.evaluation.results.check_early`."""
        self._reward_model.check()


class EndpointJudge:
    """A language model behind an OpenAI-compatible HTTP address.

    Args:
        endpoint: where it is.
        name: of the judge in the report; by default the model's.
    """

    def __init__(self, endpoint: ChatCompletions, name: str | None = None) -> None:
        self.endpoint, self.name = endpoint, name or endpoint.model

    def check(self) -> None:
        """See `lit_rlhf.evaluation.results.check_early`."""
        self.endpoint.check()

    def compare(self, pairs: list[AnswerPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        ask = (
            'Which is better? Reply with one JSON object and nothing else: {"better": "A", "B" or "tie", "reason": "…"}'
        )
        questions = [question_on(pair) + ask for pair in pairs]
        rows = self.endpoint.rows("judge: compare", questions, read_verdict, cache)
        return [
            [Verdict(self.name, None, row.reason) if isinstance(row, RequestFailed) else Verdict(self.name, *row)]
            for row in rows
        ]

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]]:
        """See `Rater.rate`."""
        fields = ", ".join(f'"{name}": true or false' for name in METADATA)
        questions = [
            f"You rate an answer to a prompt.\n\nPrompt:\n{item.prompt}\n\nAnswer:\n{item.answer.text}\n\nReply with "
            f'one JSON object alone: {{"overall": whole number from 1 (worst) to 7 (best), {fields}}}'
            for item in items
        ]
        rows = self.endpoint.rows("judge: rate", questions, read_rating, cache)
        return [
            [Rating(self.name, None, {}) if isinstance(row, RequestFailed) else Rating(self.name, *row)] for row in rows
        ]


class HuggingFaceJudge:
    """A local language model: the likelier of the words A and B behind the question, each order asked.

    Args:
        model: folder or hub name.
        tie: log-probabilities this near to each other are a tie, in nats.
        loading: how to load it.
    """

    def __init__(self, model: str, tie: float = 0.0, loading: ModelLoadingConfig | None = None) -> None:
        self.model, self.tie, self.loading = model, tie, loading or ModelLoadingConfig()

    def compare(self, pairs: list[AnswerPair], cache: Cache) -> list[list[Verdict]]:
        """See `Judge.compare`."""
        questions = [question_on(pair) + "The better answer is answer" for pair in pairs]
        found = log_odds(ModelSpec(self.model, loading=self.loading), questions, (" A", " B"), cache)
        return [[Verdict(self.model, of_difference(odds, self.tie))] for odds in found]

    def check(self) -> None:
        """See `lit_rlhf.evaluation.results.check_early`."""
        tokenizer_of(self.model, self.loading)


def question_on(pair: AnswerPair) -> str:
    """Return what a language model is told of a pair."""
    return (
        "You compare two answers to a prompt. Prefer the one that is more helpful, true and harmless; length and style "
        f"alone are no merit.\n\nPrompt:\n{pair.prompt}\n\nAnswer A:\n{pair.first.text}\n\n"
        f"Answer B:\n{pair.second.text}\n\n"
    )


def read_verdict(text: str) -> tuple[float, str]:
    """Read a comparison; ValueError where it is none."""
    found = json_object(text)
    verdict = str(found.get("better")).strip().upper()
    if verdict not in ("A", "B", "TIE"):
        raise ValueError(f"better is {found.get('better')!r}")
    return {"A": 1.0, "B": 0.0, "TIE": 0.5}[verdict], str(found.get("reason", ""))


def read_rating(text: str) -> tuple[int, dict[str, bool]]:
    """Read a rating; ValueError where it is none or off the scale."""
    found = json_object(text)
    overall = found.get("overall")
    if isinstance(overall, bool) or not isinstance(overall, int) or not 1 <= overall <= 7:
        raise ValueError(f"overall is {overall!r}")
    return overall, {name: value for name in METADATA if isinstance(value := found.get(name), bool)}


def own_rewards(judge: object) -> str | None:
    """Return the reward model that a judge relies on and that must not be a policy's own, None for other judges."""
    if isinstance(judge, RewardModelJudge) and not judge.force:
        if not judge.model:
            raise UserError("judge: a reward model judge needs the folder of a reward model")
        return judge.model
    return None
