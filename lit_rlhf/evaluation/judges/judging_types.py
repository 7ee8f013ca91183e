"""Types of the preference suite and its judges: pairs of completions, verdicts, ratings, and the base class `Judge`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_rlhf.data.records import Prompt
from lit_rlhf.evaluation.cache import Cache

if TYPE_CHECKING:
    from lit_rlhf.evaluation.models.generation import Completion

# the boolean fields of the paper's Table 3; the overall quality, from 1 to 7, is separate
METADATA_FIELDS = (
    "fails_instruction",
    "inappropriate_for_assistant",
    "hallucination",
    "satisfies_constraint",
    "sexual_content",
    "violent_content",
    "encourages_violence_or_self_harm",
    "denigrates_protected_class",
    "harmful_advice",
    "expresses_opinion",
    "expresses_moral_judgment",
)
MIN_RATING, MAX_RATING = 1, 7


class CompletionPair(NamedTuple):
    """Two completions of one prompt, in the order that a judge is shown."""

    prompt: str
    row: dict[str, Any]  # every column of the data file
    first: Completion
    second: Completion
    raw_prompt: Prompt | None = None  # the prompt before it was rendered: an instruction or a conversation


class Verdict(NamedTuple):
    """Preference of one judge between the completions of a pair."""

    judge: str
    preference: float | None  # 1: the first is better, 0.5: tie, 0: the second is better; None: no verdict
    reason: str = ""  # the judge's explanation, or why there is no verdict


class RatedItem(NamedTuple):
    """One completion to rate."""

    prompt: str
    row: dict[str, Any]  # every column of the data file
    completion: Completion


class Rating(NamedTuple):
    """Rating of one completion by one judge (InstructGPT, Table 3)."""

    judge: str
    overall: int | None  # 1 to 7; None if there is no rating
    flags: dict[str, bool]  # keys of `METADATA_FIELDS`; fields that the judge does not rate are absent


class Judge(ABC):
    """Compares pairs of completions; only `compare` is required.

    Attributes:
        is_order_sensitive: whether a verdict may depend on which completion is shown first. Such a judge compares each
            pair in both orders.
    """

    is_order_sensitive: bool = True

    @abstractmethod
    def compare(self, pairs: list[CompletionPair], cache: Cache) -> list[list[Verdict]]:
        """Return the verdicts on each pair: one, or one per labeler of a group.

        Args:
            pairs: N pairs. An order-sensitive judge never gets two identical texts; those are ties by rule.
            cache: for expensive results. A failed verdict has the preference None and is not cached.

        Returns:
            N lists of verdicts.
        """

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]] | None:
        """Return the ratings of each completion; None, the default, if the judge does not rate."""
        return None

    def check(self) -> None:
        """Raise a UserError for a missing file, model or key; called before any weights are loaded."""


def preference_from_scores(difference: float, tie_margin: float = 0.0) -> float | None:
    """Return the preference for the first completion from a score difference, first minus second.

    A difference of at most `tie_margin` is a tie. A difference that overflowed is no verdict: nan would compare as a
    loss.
    """
    if not isfinite(difference):
        return None
    return 0.5 if abs(difference) <= tie_margin else float(difference > 0)
