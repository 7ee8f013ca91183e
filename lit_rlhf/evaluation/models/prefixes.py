"""Few-shot text in front of a prompt ("GPT-3 prompted"): one, several in turn, or the best of several."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.records import PromptRow
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError


@dataclass
class BestPrefix:
    """Of several few-shot prefixes the one whose answers a reward model scores highest in the mean (fn 6).

    Args:
        reward_model: folder of a reward model.
        path: prompts to choose by, in any format that `PromptDataModule` reads: the paper's validation prompts, not
            those that are compared.
        max_new_tokens: most tokens of an answer. Decode as the comparison does.
        temperature: of the sampling, with the same noise behind each prefix; 0 is greedy.
        stop_strings: texts that end an answer.
        template: how prompts were put into words in the reward model's training. It does not see the prefix.
        limit: prompts to use, from the first; None for all.
    """

    reward_model: str
    path: str
    max_new_tokens: int = 256
    temperature: float = 1.0
    stop_strings: tuple[str, ...] = ()
    template: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse what decodes nothing."""
        if self.max_new_tokens < 1 or self.temperature < 0 or (self.limit is not None and self.limit < 1):
            raise UserError(
                "best_prefix: max_new_tokens and limit must be 1 or more and temperature 0 or more, got "
                f"{self.max_new_tokens}, {self.limit}, {self.temperature}"
            )

    def prompts(self) -> list[PromptRow]:
        """Return the prompts to choose by."""
        report = DatasetReport(self.path)
        return read_records(read_rows(self.path), "prompt", PromptRow, "auto", report)[: self.limit]


class Tried(NamedTuple):
    """A prefix and what the answers behind it score."""

    text: str
    score: float  # the reward model's, mean over the prompts
    prompts: int


def best_of_tried(tried: Sequence[Tried]) -> Tried:
    """Return the one with the highest score; of equal ones the first."""
    return max(tried, key=lambda each: each.score)


def read_prefixes(path: str, prefix: str, prefixes: str | None) -> list[str]:
    """Return the few-shot prefixes of a candidate, "" where it has none.

    Args:
        path: of the model, for messages.
        prefix: the one text.
        prefixes: the file with several.

    Raises:
        UserError: both settings, no such file, or a file that holds something else.
    """
    if prefixes is None:
        return [prefix]
    if prefix:
        raise UserError(f"models: {path!r} has prefix and prefixes; set one of them")
    try:
        found = json.loads(Path(prefixes).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"prefixes: cannot read {prefixes!r}: {problem}") from None
    found = found.get("prefixes") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found or not all(isinstance(each, str) for each in found):
        raise UserError(f"prefixes: {prefixes!r} must hold a list of texts, or one under 'prefixes'")
    return found
