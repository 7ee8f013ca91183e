"""Models under evaluation: their settings in a recipe, and cached generation and log-likelihoods."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import fsum, isnan
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, hash_texts, iter_length_sorted_batches
from lit_rlhf.evaluation.models.generation import NEWLINE, Completion, generate_completions
from lit_rlhf.evaluation.models.likelihood import Boundary, LogLikelihood, TextPair, encode_pairs, iter_loglikelihoods
from lit_rlhf.evaluation.models.prefixes import BestPrefix, ScoredPrefix, read_prefixes, select_best_prefix
from lit_rlhf.evaluation.models.reward_scorer import (
    RewardScorer,
    ScoredText,
    read_training_reward_models,
    render_scored_texts,
)
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.fingerprint import loaded_model_fingerprint
from lit_rlhf.models.given import (
    ModelSource,
    TokenizerSource,
    check_applies_to,
    model_name,
    resolve_model,
    resolve_tokenizer,
)
from lit_rlhf.models.loading import check_causal_lm, load_causal_lm, load_stored_tokenizer, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarSource, resolve_scalar_model

PREFIX_NOISE_KEY = (901,)  # keys the sampling noise of the prefix selection


@dataclass
class BestOf:
    """Best-of-n sampling with a reward model (Stiennon et al., 2020; a baseline for PPO).

    Args:
        reward_model: folder or hub name of a reward model, or the model.
        n: completions to choose from.
        temperature: of the sampling; greedy decoding would give n identical completions.
        tokenizer: the reward model's, or the folder of one; by default that of its folder.
    """

    reward_model: ScalarSource | Path
    n: int = 16
    temperature: float = 1.0
    tokenizer: TokenizerSource | None = None

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.n < 1 or self.temperature <= 0:
            raise UserError(f"best_of: n must be 1 or more and temperature above 0, got {self.n}, {self.temperature}")

    def make_scorer(self) -> RewardScorer:
        """Return what scores the completions."""
        return RewardScorer(self.reward_model, tokenizer=self.tokenizer)


@dataclass
class ModelSpec:
    """Settings of a model to evaluate.

    Args:
        path: a transformers folder, a PEFT folder, or a hub name of either; or a language model that was loaded
            already, which is used as it is, in eval mode.
        prefix: text in front of every prompt of the preference suite: a few-shot prompt ("GPT-3 prompted").
        prefixes: several such texts, or a JSON file with a list of them, or with one under "prefixes"; prompt i gets
            text i modulo their number.
        best_prefix: use for every prompt the one of `prefixes` whose completions a reward model scores highest.
        best_of: generate by best-of-n sampling.
        template: prompt template, as `template` of the data modules.
        trained_against: the reward models, or their folders, that this policy was trained against, in addition to those
            in its run's `config.yaml`.
        loading: how to load it.
        tokenizer: its tokenizer, or the folder of one; by default that of the model's folder.
    """

    path: ModelSource | Path
    prefix: str = ""
    prefixes: str | Path | list[str] | None = None
    best_prefix: BestPrefix | None = None
    best_of: BestOf | None = None
    template: str | None = None
    trained_against: list[ScalarSource | Path] = field(default_factory=list)
    loading: ModelLoadingConfig = field(default_factory=ModelLoadingConfig)
    tokenizer: TokenizerSource | None = None


class EvaluatedModel:
    """A model under evaluation. Its weights are loaded when a result is not cached.

    Args:
        name: as in the recipe.
        spec: its settings.
        cache: stores completions and log-likelihoods.
        seed: of the sampling noise.
        batch_size: prompts decoded in one batch.
        max_batch_tokens: maximum tokens per forward pass over given text.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        cache: Cache,
        seed: int = 0,
        batch_size: int = 64,
        max_batch_tokens: int = 16384,
    ) -> None:
        self.name, self.spec, self.cache, self.seed = name, spec, cache, seed
        self.batch_size, self.max_batch_tokens = batch_size, max_batch_tokens
        self.source = resolve_model(spec.path, f"models: {name!r}")
        self.path = model_name(self.source)
        check_applies_to(self.source, spec.loading)
        tokenizer = resolve_tokenizer(spec.tokenizer, self.source)
        self.fingerprint = loaded_model_fingerprint(self.source, spec.loading, cache.hash_file, tokenizer)
        self.tokenizer = load_evaluation_tokenizer(tokenizer, spec.loading)
        self.template = PromptTemplate(self.tokenizer, spec.template)
        self.trained_against = [
            *(resolve_scalar_model(each, "trained_against") for each in spec.trained_against),
            *read_training_reward_models(self.path),
        ]
        self._prefixes = read_prefixes(self.path, spec.prefix, spec.prefixes)
        self._best_of_scorer = None if spec.best_of is None else spec.best_of.make_scorer()
        self._check_reward_models()
        self._model: PreTrainedModel | None = None

    def _check_reward_models(self) -> None:
        """Raise early what best-of-n or the prefix selection would raise later."""
        best_prefix = self.spec.best_prefix
        if self._best_of_scorer is not None:
            self._best_of_scorer.check()
        if best_prefix is not None:
            if self.spec.prefixes is None:
                raise UserError(f"models: {self.name!r} has best_prefix and no prefixes to choose from")
            best_prefix.read_prompts()
            best_prefix.make_scorer().check()

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model, on the GPU if there is one."""
        if self._model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            if not isinstance(self.source, str):
                check_causal_lm(self.source.config, self.path)
                self._model = self.source.to(device).eval()
                return self._model
            with torch.random.fork_rng(devices=[]):  # resized embeddings are initialized at random: fix the seed
                torch.manual_seed(0)
                model = load_causal_lm(self.source, self.tokenizer, self.spec.loading)
            self._model = model.to(device).eval()
        return self._model

    def release(self) -> None:
        """Free the weights, so that one model is in memory at a time."""
        self._model = None
        if self._best_of_scorer is not None:
            self._best_of_scorer.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def prepend_prefix(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts with the few-shot prefixes in front, if there are any."""
        prefixes = [select_best_prefix(self.scored_prefixes).text] if self.scored_prefixes else self._prefixes
        return [prefixes[index % len(prefixes)] + prompt for index, prompt in enumerate(prompts)]

    @cached_property
    def scored_prefixes(self) -> list[ScoredPrefix]:
        """Mean reward of the completions after each few-shot prefix; empty without `best_prefix`."""
        best = self.spec.best_prefix
        if best is None:
            return []
        records, _ = best.read_prompts()
        reward_model = best.make_scorer()
        policy_prompts = [self.template.render(record.prompt, record.fields, record.origin) for record in records]
        sampling = SamplingParams(best.max_new_tokens, best.temperature)
        scored = []
        for prefix in self._prefixes:
            prompts = [prefix + prompt for prompt in policy_prompts]
            completions = self.generate(prompts, sampling, PREFIX_NOISE_KEY, best.stop_strings)
            stripped = [completion._replace(text=completion.text.strip()) for completion in completions]
            scored_texts = render_scored_texts(reward_model.template, records, stripped)
            scores = reward_model.score_finite(scored_texts, self.cache)
            scored.append(ScoredPrefix(prefix, fsum(scores) / len(scores), len(scores)))
        return scored

    def compute_loglikelihoods(self, pairs: Sequence[TextPair], boundary: Boundary = "apart") -> list[LogLikelihood]:
        """Return the log-likelihood of each continuation given its context; prefixes and best-of-n do not apply.

        Raises:
            UserError: some are nan, which would pass for unlikely continuations.
        """
        results = self._compute_loglikelihoods(pairs, boundary)
        num_nan = sum(isnan(result.logprob) for result in results)
        if num_nan:
            raise UserError(
                f"model {self.name!r}: the log-probability of {num_nan:,} of {len(results):,} continuations is nan: "
                "its weights are broken, or overflow in the type they are loaded in"
            )
        return results

    def _compute_loglikelihoods(self, pairs: Sequence[TextPair], boundary: Boundary) -> list[LogLikelihood]:
        key = {"likelihood": self.fingerprint, "boundary": boundary, "of": hash_texts(pairs)}

        def compute(indices: list[int]) -> Iterator[tuple[int, LogLikelihood]]:
            encoded = encode_pairs(self.tokenizer, pairs, boundary)
            pad_id = self.tokenizer.pad_token_id
            return iter_loglikelihoods(self.model, encoded, pad_id, self.max_batch_tokens, set(indices))

        rows = self.cache.get_or_compute_rows(f"{self.name}: likelihood", key, len(pairs), compute)
        return [LogLikelihood(*row) for row in rows]

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingParams,
        noise_key: tuple[int, ...] = (),
        stop_strings: Sequence[str] = NEWLINE,
    ) -> list[Completion]:
        """Generate one completion per prompt, by best-of-n sampling if the model's settings say so.

        Args:
            prompts: texts, as the model sees them.
            sampling: length and temperature.
            noise_key: of the sampling noise; the same key samples the same completions.
            stop_strings: texts at the first of which a completion is truncated.
        """
        best_of, scorer = self.spec.best_of, self._best_of_scorer
        if best_of is None or scorer is None:
            return self._generate(prompts, sampling, noise_key, stop_strings)
        best_of_sampling = SamplingParams(sampling.max_new_tokens, best_of.temperature)
        samples = [
            self._generate(prompts, best_of_sampling, (*noise_key, 7000 + number), stop_strings)
            for number in range(best_of.n)
        ]
        # as in PPO, the reward model reads the end of turn that was sampled; it puts the end token itself
        end = self.tokenizer.eos_token
        texts = [
            ScoredText(prompt, each._replace(text=each.text + each.end.removesuffix(end)))
            for completions in samples
            for prompt, each in zip(prompts, completions)
        ]
        scores = scorer.score_finite(texts, self.cache)
        best = []
        for index in range(len(prompts)):
            prompt_scores = scores[index :: len(prompts)]
            best.append(samples[prompt_scores.index(max(prompt_scores))][index])
        return best

    def _generate(
        self, prompts: Sequence[str], sampling: SamplingParams, noise_key: tuple[int, ...], stop_strings: Sequence[str]
    ) -> list[Completion]:
        is_greedy = sampling.temperature == 0
        key: dict[str, Any] = {
            "answers": self.fingerprint,
            "length": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "stops": list(stop_strings),
            "noise": [] if is_greedy else [self.seed, *noise_key],
            "to": hash_texts(prompts),
        }

        def compute(indices: list[int]) -> Iterator[tuple[int, Completion]]:
            encoded = [ids or [self.tokenizer.eos_token_id] for ids in self.template.encode(prompts)]
            uniforms = sampling_uniforms(len(prompts), sampling.max_new_tokens, self.seed, *noise_key)
            for batch in iter_length_sorted_batches([len(ids) for ids in encoded], self.batch_size, indices):
                completions = generate_completions(
                    self.model,
                    self.tokenizer,
                    [encoded[index] for index in batch],
                    sampling,
                    uniforms[batch],
                    tuple(stop_strings),
                )
                yield from zip(batch, completions)

        rows = self.cache.get_or_compute_rows(f"{self.name}: answers", key, len(prompts), compute)
        return [Completion(*row) for row in rows]


def compute_log_odds(spec: ModelSpec, prompts: Sequence[str], words: tuple[str, str], cache: Cache) -> list[float]:
    """Return log P(first word) - log P(second word) after each prompt, in nats; nan if the logits overflow.

    Args:
        spec: the judging model.
        prompts: N texts.
        words: the two continuations.
        cache: stores the log-likelihoods.
    """
    judge = EvaluatedModel("judge", spec, cache)
    results = judge._compute_loglikelihoods([(prompt, word) for prompt in prompts for word in words], "apart")
    judge.release()
    num_truncated = sum(result.num_truncated > 0 for result in results[::2])
    if num_truncated:
        counts = f"{num_truncated:,} of {len(prompts):,}"
        print(f"judge {judge.path}: {counts} prompts exceed its context and are left-truncated")
    return [first.logprob - second.logprob for first, second in zip(results[::2], results[1::2])]


def check_spec(spec: ModelSpec) -> None:
    """Refuse a judging model that is missing, and an object that is none; reads its tokenizer alone."""
    source = resolve_model(spec.path, "judge")
    check_applies_to(source, spec.loading)
    load_evaluation_tokenizer(resolve_tokenizer(spec.tokenizer, source), spec.loading)


def load_evaluation_tokenizer(source: str | Tokenizer, loading: ModelLoadingConfig) -> Tokenizer:
    """Return a model's tokenizer, of an object a copy; without a padding token of its own, it pads with the end token.

    A new padding token, as training needs one, would add an untrained row to the vocabulary that takes probability from
    the others. Here the attention mask alone distinguishes padding.
    """
    if loading.pad_token is not None:
        return load_tokenizer(copy.deepcopy(source), loading)
    tokenizer = load_stored_tokenizer(copy.deepcopy(source), loading)
    if tokenizer.eos_token_id is None:
        path = source if isinstance(source, str) else source.name_or_path
        raise UserError(f"tokenizer of {path!r} has no end-of-sequence token: set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
