"""Scores of a reward model for texts: for best-of-n and as a judge."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from math import isfinite
from pathlib import Path

import torch
import yaml

from lit_rlhf.data.prompt_template import PromptTemplate, encode_texts
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache, chunks_of, digest_of_model, digest_of_texts
from lit_rlhf.evaluation.models.generation import Answer
from lit_rlhf.functional import pad_right
from lit_rlhf.models.loading import load_tokenizer, max_positions
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model

ScoredText = tuple[str, Answer]  # the prompt as the reward model sees it, and an answer


class RewardScorer:
    """A reward model's folder, loaded when the first score is not in the cache.

    Args:
        folder: what `lit-rlhf fit` of a reward model wrote.
        loading: how to load it.
        template: how prompts were put into words in its training.
        batch_size: texts a forward pass.
    """

    def __init__(
        self, folder: str, loading: ModelLoadingConfig | None = None, template: str | None = None, batch_size: int = 64
    ) -> None:
        self.folder, self.loading, self.batch_size = folder, loading or ModelLoadingConfig(), batch_size
        self._template = template

    @cached_property
    def template(self) -> PromptTemplate:
        """Puts prompts into the words that it was trained on."""
        return PromptTemplate(load_tokenizer(self.folder, self.loading), self._template)

    def check(self) -> None:
        """Raise early, without the weights, where there is no such folder."""
        load_tokenizer(self.folder, self.loading)

    @cached_property
    def _model(self) -> ScalarModel:
        model = load_scalar_model(self.folder, self.template.tokenizer, self.loading)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def scores(self, rated: Sequence[ScoredText], cache: Cache) -> list[float]:
        """Return the score of each answer: prompt, answer and, where it ended, the end token, as in training.

        Each different text is scored once, so that equal ones have equal scores to the last bit. A score that
        overflowed in half precision is not finite.
        """
        texts = [(prompt, answer.text, answer.ended) for prompt, answer in rated]
        unique = list(dict.fromkeys(texts))
        key = {"score": digest_of_model(self.folder, self.loading, cache), "of": digest_of_texts(unique)}
        scores = cache.rows("score", key, len(unique), lambda places: self._compute(unique, places))
        by_text = dict(zip(unique, scores))
        return [by_text[text] for text in texts]

    def finite_scores(self, rated: Sequence[ScoredText], cache: Cache) -> list[float]:
        """Return the scores to choose by.

        Raises:
            UserError: some are not finite, and would decide for or against an answer by accident.
        """
        scores = self.scores(rated, cache)
        lost = sum(not isfinite(score) for score in scores)
        if lost:
            raise UserError(
                f"reward model {self.folder!r}: {lost:,} of {len(scores):,} scores are not finite; nothing can be "
                "chosen by them"
            )
        return scores

    def _compute(self, texts: Sequence[tuple[str, str, bool]], places: list[int]) -> Iterator[tuple[int, float]]:
        tokenizer = self.template.tokenizer
        end, limit = tokenizer.eos_token_id, max_positions(self._model.model.config) or 10**9
        prompts = self.template.encode([prompt for prompt, _, _ in texts])
        answers = encode_texts(tokenizer, [answer for _, answer, _ in texts])
        rows = [
            [*prompt, *answer, *([end] if ended else [])] or [end]
            for prompt, answer, (_, _, ended) in zip(prompts, answers, texts)
        ]
        cut = sum(len(row) > limit for row in rows)
        if cut:
            print(f"{self.folder}: {cut:,} of {len(rows):,} texts cut in front, longer than its positions")
        rows = [row[-limit:] for row in rows]
        place = self._model.shift.device
        for chunk in chunks_of([len(row) for row in rows], self.batch_size, places):
            ids, mask = pad_right([rows[number] for number in chunk], tokenizer.pad_token_id)
            with torch.no_grad():
                scores = self._model.score(ids.to(place), mask.to(place)).tolist()
            yield from zip(chunk, scores)


def trained_against(model: str) -> list[str]:
    """Return the reward models that a policy's folder was trained against, as far as its run says so.

    A run of `lit-rlhf fit` writes its `config.yaml` beside the folder `model`.
    """
    config = Path(model).expanduser().parent / "config.yaml"
    if not config.is_file():
        return []
    try:
        recipe = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []
    model_settings = recipe.get("model") if isinstance(recipe, dict) else None
    reward = (model_settings.get("init_args") or {}).get("reward") if isinstance(model_settings, dict) else None
    return folders_in(reward)


def folders_in(settings: object) -> list[str]:
    """Return every value of a key `model` within a reward's settings: a weighted sum has several."""
    if isinstance(settings, dict):
        own = [value for key, value in settings.items() if key == "model" and isinstance(value, str)]
        return own + [folder for value in settings.values() for folder in folders_in(value)]
    if isinstance(settings, list):
        return [folder for value in settings for folder in folders_in(value)]
    return []


def refuse_own_reward(judge: str, policies: dict[str, list[str]], cache: Cache) -> None:
    """Refuse a reward model as judge of a policy that was trained against it.

    Args:
        judge: the judge's folder.
        policies: name of each policy -> the reward models it was trained against.
        cache: keeps the hashes.

    Raises:
        UserError: the same folder, or other folders with the same weights.
    """
    identity = digest_of_model(judge, ModelLoadingConfig(), cache)
    for name, rewards in policies.items():
        for reward in rewards:
            same = Path(reward).expanduser().resolve() == Path(judge).expanduser().resolve()
            known = Path(reward).expanduser().is_dir()
            if same or (known and digest_of_model(reward, ModelLoadingConfig(), cache) == identity):
                raise UserError(
                    f"judge: {judge!r} is the reward model that {name!r} was trained against ({reward}): its verdict "
                    "would measure over-optimisation as success. Use another judge, or set force: true"
                )
