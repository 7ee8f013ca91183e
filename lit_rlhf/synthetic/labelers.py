"""Simulated labelers: a weighted sum of the judge's verdict plus noise, as Likert ratings and rankings (§3.4, §4.1).

Training labelers weigh helpfulness most, and some like a closing courtesy. Held-out labelers, who rank no training
data, weigh truth and harmlessness most and do not like courtesies.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import NamedTuple

from lit_rlhf.evaluation.agreement import match_decisions
from lit_rlhf.synthetic.judge import Judgment, judge
from lit_rlhf.synthetic.tasks import TaskPrompt

NUM_TRAINING_LABELERS = 8
NUM_HELDOUT_LABELERS = 5
RATING_NOISE_STD = 0.95  # in Likert points
WEIGHT_LOG_STD = 0.2  # standard deviation of the logarithm of a labeler's weight
DEFAULT_TRUTH = 0.75  # truth of a response without a checkable statement


class LabelerWeights(NamedTuple):
    """Weight of each quality, in Likert points between its worst and its best value."""

    helpfulness: float
    truth: float
    harmlessness: float
    style: float
    courtesy: float


class Response(NamedTuple):
    """Text of a response, and whether it has an end token."""

    text: str
    finished: bool = True


@dataclass(frozen=True)
class Labeler:
    """One labeler.

    Attributes:
        name: unique in its group.
        weights: weight of each quality.
        noise: standard deviation of the rating noise, in Likert points.
        seed: of the noise, a fixed function of (labeler, prompt, response): the same text gets the same rating.
    """

    name: str
    weights: LabelerWeights
    noise: float
    seed: int

    def rate(self, prompt: TaskPrompt, response: str, finished: bool = True) -> float:
        """Return the rating before rounding, about 0 to 7."""
        return self._weigh(judge(prompt, response, finished)) + self.noise * self._hash_to_normal(prompt.text, response)

    def rate_likert(self, prompt: TaskPrompt, response: str, finished: bool = True) -> int:
        """Return the rating on the scale of the paper, 1 to 7."""
        return min(7, max(1, round(self.rate(prompt, response, finished))))

    def _weigh(self, verdict: Judgment) -> float:
        weights = self.weights
        truth = DEFAULT_TRUTH if verdict.truthful is None else verdict.truthful
        return (
            1.0
            + weights.helpfulness * verdict.success
            + weights.truth * truth
            - weights.harmlessness * verdict.toxic
            + weights.style * verdict.style
            + weights.courtesy * verdict.courtesy
        )

    def _hash_to_normal(self, prompt: str, response: str) -> float:
        """Return a standard normal sample (Box-Muller) from a hash, the same in every process and Python version."""
        key = f"{self.seed}\0{self.name}\0{prompt}\0{response}".encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        first, second = (int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
        return math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)


def build_training_labelers(seed: int) -> list[Labeler]:
    """Build the labelers of the training data: helpfulness first, every second one likes a courtesy."""
    return [
        _build_labeler(f"training-{number}", LabelerWeights(2.6, 1.2, 1.6, 1.2, 0.3 * (number % 2)), seed)
        for number in range(NUM_TRAINING_LABELERS)
    ]


def build_heldout_labelers(seed: int) -> list[Labeler]:
    """Build the labelers of the evaluation: truth and harmlessness first, indifferent or averse to a courtesy."""
    return [
        _build_labeler(f"heldout-{number}", LabelerWeights(2.0, 1.8, 2.2, 1.0, -0.2 * (number % 2)), seed)
        for number in range(NUM_HELDOUT_LABELERS)
    ]


def _build_labeler(name: str, weights: LabelerWeights, seed: int) -> Labeler:
    rng = Random(f"{seed} {name}")  # a string seeds through SHA-512: the same in every process
    return Labeler(
        name,
        LabelerWeights(*(weight * rng.lognormvariate(0.0, WEIGHT_LOG_STD) for weight in weights)),
        RATING_NOISE_STD,
        seed,
    )


def rank_responses(labeler: Labeler, prompt: TaskPrompt, responses: Sequence[tuple[str, bool]]) -> list[int]:
    """Return the dense ranks of K `(text, finished)` responses: 0 for the best; equal Likert ratings tie."""
    ratings = [labeler.rate_likert(prompt, text, finished) for text, finished in responses]
    order = {rating: rank for rank, rating in enumerate(sorted(set(ratings), reverse=True))}
    return [order[rating] for rating in ratings]


def compute_preference(
    labelers: Sequence[Labeler], prompt: TaskPrompt, one: tuple[str, bool], other: tuple[str, bool]
) -> float:
    """Return the fraction of the labelers who rate `one` above `other`; a tie counts half."""
    votes = 0.0
    for labeler in labelers:
        first, second = labeler.rate_likert(prompt, *one), labeler.rate_likert(prompt, *other)
        votes += 0.5 if first == second else float(first > second)
    return votes / len(labelers)


def compute_agreement(
    labelers: Sequence[Labeler], items: Iterable[tuple[TaskPrompt, Sequence[tuple[str, bool]]]]
) -> float:
    """Return how often two labelers agree on which of two responses is better, without pairs that either rates equal.

    Args:
        labelers: at least two.
        items: prompts with their K responses.

    Returns:
        the fraction of agreements over all pairs of labelers and pairs of responses; NaN if all are ties.
    """
    agreed = compared = 0
    for prompt, responses in items:
        preferences = []
        for labeler in labelers:
            pairs = combinations(rank_responses(labeler, prompt, responses), 2)
            preferences.append({i: 0.5 if one == two else float(one < two) for i, (one, two) in enumerate(pairs)})
        for first, second in combinations(preferences, 2):
            decided, _ = match_decisions(first, second)
            compared += len(decided)
            agreed += sum(decision.agrees for decision in decided)
    return agreed / compared if compared else math.nan
