"""Cached reward model scores of texts, for best-of-n and judging; refusal of a judge that a policy was trained with."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from lit_rlhf.data.prompt_template import PromptTemplate, encode_texts
from lit_rlhf.data.records import PromptRow
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, hash_texts, iter_length_sorted_batches
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.models.fingerprint import loaded_model_fingerprint, model_fingerprint
from lit_rlhf.models.given import TokenizerSource, check_applies_to, model_name, resolve_tokenizer
from lit_rlhf.models.loading import load_tokenizer, max_positions
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, ScalarSource, load_scalar_model, resolve_scalar_model
from lit_rlhf.models.scoring import score_rows
from lit_rlhf.paths import expand_path


class ScoredText(NamedTuple):
    """A text for the reward model to score."""

    prompt: str  # rendered for the reward model
    completion: Completion
    is_chat: bool = False  # whether a chat template rendered the prompt: its end of turn then ends a finished reply


def render_scored_texts(
    template: PromptTemplate, records: Sequence[PromptRow], completions: Sequence[Completion]
) -> list[ScoredText]:
    """Return one completion of each prompt with the prompt as a reward model's template renders it."""
    return [
        ScoredText(
            template.render(record.prompt, record.fields, record.origin), completion, template.is_chat(record.prompt)
        )
        for record, completion in zip(records, completions)
    ]


class RewardScorer:
    """Scores texts with a reward model, which is loaded when a score is not cached.

    Args:
        model: folder or hub name of a reward model; or one that was loaded or trained already, which is used as it is,
            in eval mode.
        loading: how to load it.
        template: prompt template of its training.
        batch_size: texts per forward pass.
        tokenizer: its tokenizer, or the folder of one; by default that of the model's folder.
    """

    def __init__(
        self,
        model: ScalarSource | Path,
        loading: ModelLoadingConfig | None = None,
        template: str | None = None,
        batch_size: int = 64,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        self.source = resolve_scalar_model(model, "reward model")
        self.name, self.loading, self.batch_size = model_name(self.source), loading or ModelLoadingConfig(), batch_size
        check_applies_to(self.source, self.loading)
        self._tokenizer, self._template = resolve_tokenizer(tokenizer, self.source), template
        self._loaded: ScalarModel | None = None

    @cached_property
    def template(self) -> PromptTemplate:
        """The prompt template of the reward model's training."""
        return PromptTemplate(load_tokenizer(self._tokenizer, self.loading), self._template)

    def check(self) -> None:
        """Raise a UserError if the folder is missing; loads no weights."""
        load_tokenizer(self._tokenizer, self.loading)

    @property
    def _model(self) -> ScalarModel:
        if self._loaded is None:
            model = load_scalar_model(self.source, self.template.tokenizer, self.loading)
            self._loaded = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        return self._loaded

    def release(self) -> None:
        """Free the weights; they are loaded again when a score is not cached."""
        self._loaded = None

    def score(self, texts: Sequence[ScoredText], cache: Cache) -> list[float]:
        """Return a score per text: prompt, completion and, if it is finished, what ends it in training.

        That is the end token, and before it a chat template's end of turn.

        Each distinct text is scored once, so that equal texts have bitwise equal scores. A score that overflows in half
        precision is not finite.
        """
        keys = [(prompt, completion.text, completion.finished, is_chat) for prompt, completion, is_chat in texts]
        unique = list(dict.fromkeys(keys))
        source = self.source if isinstance(self.source, str) else self._model  # loading changes the object's config
        fingerprint = loaded_model_fingerprint(source, self.loading, cache.hash_file, self._tokenizer)
        cache_key = {"score": fingerprint, "of": hash_texts(unique)}
        rows = cache.get_or_compute_rows(
            "score", cache_key, len(unique), lambda indices: self._compute(unique, indices)
        )
        score_by_key = dict(zip(unique, rows))
        return [score_by_key[key] for key in keys]

    def score_finite(self, texts: Sequence[ScoredText], cache: Cache) -> list[float]:
        """Return the scores, all of them finite.

        Raises:
            UserError: some are not finite; a comparison with them would be arbitrary.
        """
        scores = self.score(texts, cache)
        num_lost = sum(not isfinite(score) for score in scores)
        if num_lost:
            raise UserError(
                f"reward model {self.name!r}: {num_lost:,} of {len(scores):,} scores are not finite; nothing can be "
                "chosen by them"
            )
        return scores

    def _compute(self, texts: Sequence[tuple[str, str, bool, bool]], indices: list[int]) -> Iterator[tuple[int, float]]:
        tokenizer = self.template.tokenizer
        eos_id, limit = tokenizer.eos_token_id, max_positions(self._model.model.config) or 10**9
        prompts = self.template.encode([prompt for prompt, *_ in texts])
        # the text holds the end of turn where the tokenizer has no special token for it
        turns = [self.template.end_of_turn if finished and is_chat else "" for *_, finished, is_chat in texts]
        replies = [completion.removesuffix(turn) for (_, completion, *_), turn in zip(texts, turns)]
        rows = []
        for prompt, reply, turn, (_, _, finished, _) in zip(
            prompts, encode_texts(tokenizer, replies), encode_texts(tokenizer, turns), texts
        ):
            end = [*turn, eos_id] if turn[-1:] != [eos_id] else turn  # the end token once
            rows.append([*prompt, *reply, *(end if finished else [])] or [eos_id])
        num_truncated = sum(len(row) > limit for row in rows)
        if num_truncated:
            print(f"{self.name}: {num_truncated:,} of {len(rows):,} texts exceed its context and are left-truncated")
        rows = [row[-limit:] for row in rows]
        for batch in iter_length_sorted_batches([len(row) for row in rows], self.batch_size, indices):
            scores = score_rows(self._model, [rows[index] for index in batch], tokenizer.pad_token_id, len(batch))
            yield from zip(batch, scores.tolist())


def read_training_reward_models(model: str) -> list[str]:
    """Return the reward models that a policy was trained against, according to its run.

    A run of `lit-rlhf fit` writes its `config.yaml` next to the folder `model`.
    """
    config = expand_path(model).parent / "config.yaml"
    if not config.is_file():
        return []
    try:
        recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    model_settings = recipe.get("model") if isinstance(recipe, dict) else None
    reward = (model_settings.get("init_args") or {}).get("reward") if isinstance(model_settings, dict) else None
    return collect_model_paths(reward)


def collect_model_paths(settings: object) -> list[str]:
    """Return the folders of all reward models in a reward's settings, recursively: a weighted sum has several.

    A part whose weight is 0 is only watched, and trains nothing. Of an adapter's checkpoint it is the folder that its
    run exported.
    """
    if isinstance(settings, dict):
        paths = [value for key, value in settings.items() if key == "model" and isinstance(value, str)]
        if isinstance(settings.get("checkpoint"), str):
            paths.append(str(Path(settings["checkpoint"]).parent.parent / "model"))
        parts, weights = settings.get("rewards"), settings.get("weights")
        if isinstance(parts, list) and isinstance(weights, list) and len(parts) == len(weights):
            settings = settings | {"rewards": [part for part, weight in zip(parts, weights) if weight]}
        return paths + [path for value in settings.values() for path in collect_model_paths(value)]
    if isinstance(settings, list):
        return [path for value in settings for path in collect_model_paths(value)]
    return []


def check_judge_is_independent(judge: ScalarSource, policies: dict[str, list[ScalarSource]], cache: Cache) -> None:
    """Refuse a reward model as judge of a policy that was trained against it.

    Args:
        judge: the judge, or its folder.
        policies: name of each policy -> the reward models it was trained against.
        cache: stores file hashes.

    Raises:
        UserError: the same folder or object, or others with the same weights. A folder and an object are not compared.
    """
    fingerprint = _weights_fingerprint(judge, cache)
    for name, rewards in policies.items():
        for reward in rewards:
            is_same = _same_path(reward, judge)
            if not is_same and not (isinstance(reward, str) and not expand_path(reward).is_dir()):
                is_same = _weights_fingerprint(reward, cache) == fingerprint
            if is_same:
                raise UserError(
                    f"judge: {model_name(judge)!r} is the reward model that {name!r} was trained against "
                    f"({model_name(reward)}): its verdict would measure over-optimization as success. Use another "
                    "judge, or set force: true"
                )


def _same_path(one: ScalarSource, other: ScalarSource) -> bool:
    if not isinstance(one, str) or not isinstance(other, str):
        return one is other
    return expand_path(one).resolve() == expand_path(other).resolve()


def _weights_fingerprint(model: ScalarSource, cache: Cache) -> str:
    """Return what two reward models with the same weights have in common; of an object, with or without its wrapper."""
    if isinstance(model, str):
        return loaded_model_fingerprint(model, ModelLoadingConfig(), cache.hash_file)
    return model_fingerprint(model.model if isinstance(model, ScalarModel) else model, ModelLoadingConfig())
