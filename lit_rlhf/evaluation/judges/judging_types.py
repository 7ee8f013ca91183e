"""What is compared, by whom, and what they say: the types that preference and its judges share."""

from math import isfinite
from typing import Any, NamedTuple, Protocol

from lit_rlhf.data.records import Prompt
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.generation import Answer

# the paper's Table 3, beside the overall quality from 1 to 7; each is yes or no
METADATA = (
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
LOWEST, HIGHEST = 1, 7


class AnswerPair(NamedTuple):
    """Two answers to one prompt, in the order in which a judge sees them."""

    prompt: str
    row: dict[str, Any]  # every column of the data file
    first: Answer
    second: Answer
    source: Prompt | None = None  # the prompt before it became text: an instruction, a conversation


class Verdict(NamedTuple):
    """What one judge says of a pair."""

    judge: str
    preference: float | None  # of the first answer: 1 better, 0.5 tie, 0 worse; None where there is no verdict
    reason: str = ""  # in the judge's words, or why there is no verdict


class RatedItem(NamedTuple):
    """One answer to be rated."""

    prompt: str
    row: dict[str, Any]
    answer: Answer


class Rating(NamedTuple):
    """What one judge says of one answer, after the paper's Table 3."""

    judge: str
    overall: int | None  # 1 to 7; None where there is no rating
    flags: dict[str, bool]  # names of `METADATA`; those that the judge does not speak of are absent


class Judge(Protocol):
    """Compares answers.

    A judge whose verdict may depend on which answer it sees first is asked in both orders, unless it says
    `sees_order = False`. One that can also rate has a method `rate` (see `Rater`).
    """

    def compare(self, pairs: list[AnswerPair], cache: Cache) -> list[list[Verdict]]:
        """Return the opinions on each pair: one, or one of each of several labelers.

        Args:
            pairs: no two answers of a pair are the same text; those are ties by rule.
            cache: for what is costly. A verdict that did not come is an `Opinion` without preference, and is not
                cached.
        """
        ...


class Rater(Protocol):
    """Rates single answers."""

    def rate(self, items: list[RatedItem], cache: Cache) -> list[list[Rating]]:
        """Return the ratings of each answer."""
        ...


def check_rating(rating: Rating) -> Rating:
    """Return a rating that is on the paper's scale.

    Raises:
        UserError: it is not, or it names an unknown field.
    """
    if rating.overall is not None and not LOWEST <= rating.overall <= HIGHEST:
        raise UserError(f"{rating.judge}: an overall quality of {rating.overall} is not from {LOWEST} to {HIGHEST}")
    unknown = sorted(set(rating.flags) - set(METADATA))
    if unknown:
        raise UserError(f"{rating.judge}: unknown field {unknown[0]!r}; there are {', '.join(METADATA)}")
    return rating


def of_difference(difference: float, tie: float = 0.0) -> float | None:
    """Return the preference for the first from the difference of two scores; a tie where it is within `tie`.

    Scores that overflowed give no verdict: nan would compare as a loss.
    """
    if not isfinite(difference):
        return None
    return 0.5 if abs(difference) <= tie else float(difference > 0)
