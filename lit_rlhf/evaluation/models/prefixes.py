"""Few-shot prefixes of a model ("GPT-3 prompted"): one, several in turn, or the best of several."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.sources import DataSource, held_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.models.reward_scorer import RewardScorer
from lit_rlhf.evaluation.prompts import read_prompt_rows
from lit_rlhf.models.given import TokenizerSource
from lit_rlhf.models.scalar_model import ScalarSource
from lit_rlhf.paths import expand_path


@dataclass
class BestPrefix:
    """Selects the few-shot prefix whose completions have the highest mean reward (InstructGPT, footnote 6).

    Args:
        reward_model: folder or hub name of a reward model, or the model.
        path: prompts for the selection, a file or rows in memory, in any format that `PromptDataModule` reads: the
            paper's validation prompts, not those of the comparison.
        max_new_tokens: maximum tokens of a completion; use the value of the comparison.
        temperature: of the sampling, with the same noise for each prefix; 0 is greedy.
        stop_strings: texts at the first of which a completion is truncated.
        template: prompt template of the reward model's training. It does not see the prefix.
        limit: use the first so many prompts; None for all.
        tokenizer: the reward model's, or the folder of one; by default that of its folder.
    """

    reward_model: ScalarSource | Path
    path: DataSource
    max_new_tokens: int = 256
    temperature: float = 1.0
    stop_strings: tuple[str, ...] = ()
    template: str | None = None
    limit: int | None = None
    tokenizer: TokenizerSource | None = None

    def __post_init__(self) -> None:
        """Validate the settings."""
        self.path = held_rows(self.path)
        if self.max_new_tokens < 1 or self.temperature < 0 or (self.limit is not None and self.limit < 1):
            raise UserError(
                "best_prefix: max_new_tokens and limit must be 1 or more and temperature 0 or more, got "
                f"{self.max_new_tokens}, {self.limit}, {self.temperature}"
            )

    def make_scorer(self) -> RewardScorer:
        """Return what scores the completions."""
        return RewardScorer(self.reward_model, template=self.template, tokenizer=self.tokenizer)

    def read_prompts(self) -> tuple[list[PromptRow], list[str]]:
        """Return the prompts for the selection, and notes on the rows."""
        records, notes = read_prompt_rows(self.path, "auto")
        return records[: self.limit], notes


class ScoredPrefix(NamedTuple):
    """A few-shot prefix with its mean reward."""

    text: str
    score: float  # of the reward model, mean over the prompts
    num_prompts: int


def select_best_prefix(scored_prefixes: Sequence[ScoredPrefix]) -> ScoredPrefix:
    """Return the prefix with the highest score; the first of equal ones."""
    return max(scored_prefixes, key=lambda prefix: prefix.score)


def read_prefixes(path: str, prefix: str, prefixes: str | Path | list[str] | None) -> list[str]:
    """Return the few-shot prefixes of a model; [""] without any.

    Args:
        path: of the model, for messages.
        prefix: a single prefix.
        prefixes: several, or a JSON file with them.

    Raises:
        UserError: both settings are used, or the file is missing or malformed.
    """
    if prefixes is None:
        return [prefix]
    if prefix:
        raise UserError(f"models: {path!r} has prefix and prefixes; set one of them")
    texts: Any = prefixes
    if isinstance(prefixes, str | Path):
        try:
            texts = json.loads(expand_path(prefixes).read_text(encoding="utf-8"))
        except (OSError, ValueError) as problem:
            raise UserError(f"prefixes: cannot read {str(prefixes)!r}: {problem}") from None
    texts = texts.get("prefixes") if isinstance(texts, dict) else texts
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"prefixes: {str(prefixes)!r:.200} must hold a list of texts, or one under 'prefixes'")
    return texts
