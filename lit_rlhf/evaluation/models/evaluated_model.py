"""The models that are evaluated: what a recipe says of each, and what a suite asks of it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum, isnan
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, chunks_of, digest_of_model, digest_of_texts
from lit_rlhf.evaluation.models.generation import NEWLINE, Answer, generate
from lit_rlhf.evaluation.models.likelihood import Boundary, Likelihood, TextPair, encode_pairs, likelihoods
from lit_rlhf.evaluation.models.prefixes import BestPrefix, Tried, best_of_tried, read_prefixes
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer, trained_against
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading import from_pretrained_quietly, load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig

PREFIX_PLACE = (901,)  # of the sampling noise


@dataclass
class BestOf:
    """The best of n sampled answers, by a reward model (Stiennon et al., 2020; a yardstick for PPO).

    Args:
        reward_model: folder of a reward model.
        n: answers to choose from.
        temperature: of the sampling; greedy decoding would draw n times the same.
    """

    reward_model: str
    n: int = 16
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what leaves no choice."""
        if self.n < 1 or self.temperature <= 0:
            raise UserError(f"best_of: n must be 1 or more and temperature above 0, got {self.n}, {self.temperature}")


@dataclass
class ModelSpec:
    """A model to evaluate.

    Args:
        path: a transformers folder, or a hub name.
        prefix: text in front of every prompt of the preference suite: a few-shot prompt ("GPT-3 prompted").
        prefixes: a JSON file with a list of such texts, or with one under "prefixes"; prompt i gets text i mod their
            number.
        best_prefix: take of `prefixes` the one whose answers a reward model scores highest, for every prompt.
        best_of: answer with the best of n.
        template: how prompts become text, as `template` of the data modules.
        trained_against: folders of the reward models this policy was trained against, beside those that its run's
            `config.yaml` names.
        loading: how to load it.
    """

    path: str
    prefix: str = ""
    prefixes: str | None = None
    best_prefix: BestPrefix | None = None
    best_of: BestOf | None = None
    template: str | None = None
    trained_against: list[str] = field(default_factory=list)
    loading: ModelLoadingConfig = field(default_factory=ModelLoadingConfig)


class EvaluatedModel:
    """A candidate at work. Weights are loaded when something is asked that the cache does not know.

    Args:
        name: as the recipe has it.
        candidate: what it is.
        cache: keeps what was computed.
        seed: of the sampling noise.
        batch_size: prompts decoded at once.
        max_batch_tokens: most tokens of a forward pass.
    """

    def __init__(
        self,
        name: str,
        candidate: ModelSpec,
        cache: Cache,
        seed: int = 0,
        batch_size: int = 64,
        max_batch_tokens: int = 16384,
    ) -> None:
        self.name, self.candidate, self.cache, self.seed = name, candidate, cache, seed
        self.batch_size, self.max_batch_tokens = batch_size, max_batch_tokens
        self.identity = digest_of_model(candidate.path, candidate.loading, cache)
        self.tokenizer = tokenizer_of(candidate.path, candidate.loading)
        self.template = PromptTemplate(self.tokenizer, candidate.template)
        self.trained_against = [*candidate.trained_against, *trained_against(candidate.path)]
        self._prefixes = read_prefixes(candidate.path, candidate.prefix, candidate.prefixes)
        self._check_choice()
        self._model: PreTrainedModel | None = None

    def _check_choice(self) -> None:
        """Refuse early what a choice by a reward model would fail on."""
        best_prefix, best_of = self.candidate.best_prefix, self.candidate.best_of
        if best_of is not None:
            RewardScorer(best_of.reward_model).check()
        if best_prefix is not None:
            if self.candidate.prefixes is None:
                raise UserError(f"models: {self.name!r} has best_prefix and no prefixes to choose from")
            best_prefix.prompts()
            RewardScorer(best_prefix.reward_model).check()

    @property
    def model(self) -> PreTrainedModel:
        """The weights, on the accelerator where there is one."""
        if self._model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            with torch.random.fork_rng(devices=[]):  # an embedding that is grown is drawn: always alike
                torch.manual_seed(0)
                model = load_causal_lm(self.candidate.path, self.tokenizer, self.candidate.loading)
            self._model = model.to(device).eval()
        return self._model

    def release(self) -> None:
        """Let the weights go: one model in memory at a time."""
        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def with_prefix(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts behind the candidate's few-shot prefixes, if it has any."""
        prefixes = [best_of_tried(self.tried_prefixes).text] if self.tried_prefixes else self._prefixes
        return [prefixes[place % len(prefixes)] + prompt for place, prompt in enumerate(prompts)]

    @cached_property
    def tried_prefixes(self) -> list[Tried]:
        """What the answers behind each few-shot prefix score, where the best is taken; empty where none is chosen."""
        best = self.candidate.best_prefix
        if best is None:
            return []
        records = best.prompts()
        reward_model = RewardScorer(best.reward_model, template=best.template)
        own, rated = (
            [template.render(record.prompt, record.fields, record.origin) for record in records]
            for template in (self.template, reward_model.template)
        )
        sampling = SamplingParams(best.max_new_tokens, best.temperature)
        tried = []
        for prefix in self._prefixes:
            answers = self.answers([prefix + prompt for prompt in own], sampling, PREFIX_PLACE, best.stop_strings)
            stripped = [answer._replace(text=answer.text.strip()) for answer in answers]
            scores = reward_model.finite_scores(list(zip(rated, stripped)), self.cache)
            tried.append(Tried(prefix, fsum(scores) / len(scores), len(scores)))
        return tried

    def likelihoods(self, pairs: Sequence[TextPair], boundary: Boundary = "apart") -> list[Likelihood]:
        """Return how likely each continuation is behind its context. No prefix, no best-of: the model's own.

        Raises:
            UserError: some have no number, which would pass for unlikely ones.
        """
        found = self._likelihoods(pairs, boundary)
        lost = sum(isnan(each.logprob) for each in found)
        if lost:
            raise UserError(
                f"model {self.name!r}: the log-probability of {lost:,} of {len(found):,} continuations is nan: its "
                "weights are broken, or overflow in the type they are loaded in"
            )
        return found

    def _likelihoods(self, pairs: Sequence[TextPair], boundary: Boundary) -> list[Likelihood]:
        key = {"likelihood": self.identity, "boundary": boundary}

        def compute(places: list[int]) -> Iterator[tuple[int, Likelihood]]:
            encoded = encode_pairs(self.tokenizer, pairs, boundary)
            return likelihoods(self.model, encoded, self.tokenizer.pad_token_id, self.max_batch_tokens, set(places))

        label = f"{self.name}: likelihood"
        rows = self.cache.rows(label, {**key, "of": digest_of_texts(pairs)}, len(pairs), compute)
        return [Likelihood(*row) for row in rows]

    def answers(
        self,
        prompts: Sequence[str],
        sampling: SamplingParams,
        place: tuple[int, ...] = (),
        stops: Sequence[str] = NEWLINE,
    ) -> list[Answer]:
        """Answer each prompt, by the best of n where the candidate says so.

        Args:
            prompts: texts, as the model sees them.
            sampling: length and temperature.
            place: of the sampling noise; the same place draws the same answers.
            stops: texts that end an answer.
        """
        best_of = self.candidate.best_of
        if best_of is None:
            return self._draw(prompts, sampling, place, stops)
        warm = SamplingParams(sampling.max_new_tokens, best_of.temperature)
        drawn = [self._draw(prompts, warm, (*place, 7000 + number), stops) for number in range(best_of.n)]
        reward_model = RewardScorer(best_of.reward_model)
        rated = [(prompt, answer) for answers in drawn for prompt, answer in zip(prompts, answers)]
        scores = reward_model.finite_scores(rated, self.cache)
        best = []
        for number in range(len(prompts)):
            own = scores[number :: len(prompts)]
            best.append(drawn[own.index(max(own))][number])
        return best

    def _draw(
        self, prompts: Sequence[str], sampling: SamplingParams, place: tuple[int, ...], stops: Sequence[str]
    ) -> list[Answer]:
        greedy = sampling.temperature == 0
        key: dict[str, Any] = {
            "answers": self.identity,
            "length": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stops": list(stops),
            "noise": [] if greedy else [self.seed, *place],
            "to": digest_of_texts(prompts),
        }

        def compute(places: list[int]) -> Iterator[tuple[int, Answer]]:
            encoded = [ids or [self.tokenizer.eos_token_id] for ids in self.template.encode(prompts)]
            noise = sampling_uniforms(len(prompts), sampling.max_new_tokens, self.seed, *place)
            for chunk in chunks_of([len(ids) for ids in encoded], self.batch_size, places):
                rows = [encoded[number] for number in chunk]
                made = generate(self.model, self.tokenizer, rows, sampling, noise[chunk], tuple(stops), len(rows))
                yield from zip(chunk, made)

        rows = self.cache.rows(f"{self.name}: answers", key, len(prompts), compute)
        return [Answer(*row) for row in rows]


def log_odds(judge: ModelSpec, questions: Sequence[str], words: tuple[str, str], cache: Cache) -> list[float]:
    """Return by how many nats a model holds the first word likelier than the second behind each question.

    A judge whose numbers overflow gives nan, which is no verdict.
    """
    subject = EvaluatedModel("judge", judge, cache)
    found = subject._likelihoods([(each, word) for each in questions for word in words], "apart")
    subject.release()
    cut = sum(each.cut > 0 for each in found[::2])
    if cut:
        print(f"judge {judge.path}: {cut:,} of {len(questions):,} questions cut in front, longer than its positions")
    return [first.logprob - second.logprob for first, second in zip(found[::2], found[1::2])]


def tokenizer_of(path: str, loading: ModelLoadingConfig) -> Tokenizer:
    """Return a model's tokenizer. Where it has no padding token, its end token fills rows: the mask alone counts here.

    A padding token of its own, as training needs one, would add a row to the vocabulary that no data ever trained and
    that takes a share of the probability.
    """
    if loading.pad_token is not None:
        return load_tokenizer(path, loading)
    tokenizer: Tokenizer = from_pretrained_quietly(AutoTokenizer.from_pretrained, path, loading)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer of {path!r} has no end-of-sequence token: set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
