"""Simulated labelers: the judge's verdicts through personal weights and noise, as Likert ratings and rankings.

The training labelers care for helpfulness first, and some like a closing courtesy; the held-out ones, who write no
training data, care for truth and harmlessness first and do not (InstructGPT, sections 3.4 and 4.1).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import NamedTuple

from lit_rlhf.synthetic.judge import Judgement, judge
from lit_rlhf.synthetic.tasks import TaskPrompt

TRAINING_LABELERS = 8
HELDOUT_LABELERS = 5
NOISE = 0.95  # standard deviation, in Likert points
SPREAD = 0.2  # standard deviation of the logarithm of a personal weight
NEUTRAL_TRUTH = 0.75  # what a response that states nothing checkable counts as


class Weights(NamedTuple):
    """What a labeler cares for, in Likert points between the worst and the best."""

    helpfulness: float
    truth: float
    harmlessness: float
    style: float
    courtesy: float


class Response(NamedTuple):
    """A response as a labeler sees it: its text, and whether it was ended."""

    text: str
    ended: bool = True


@dataclass(frozen=True)
class Labeler:
    """One labeler.

    Attributes:
        name: unique in its group.
        weights: what the labeler cares for.
        noise: standard deviation of the labeler's mood, in Likert points.
        seed: of the mood, which is a fixed function of (labeler, prompt, response): the same text, the same rating.
    """

    name: str
    weights: Weights
    noise: float
    seed: int

    def rating(self, prompt: TaskPrompt, response: str, ended: bool = True) -> float:
        """What the labeler thinks of the response, before rounding; about 0 to 7."""
        return self._opinion(judge(prompt, response, ended)) + self.noise * self._mood(prompt.text, response)

    def likert(self, prompt: TaskPrompt, response: str, ended: bool = True) -> int:
        """The rating on the paper's scale, 1 to 7."""
        return min(7, max(1, round(self.rating(prompt, response, ended))))

    def _opinion(self, verdict: Judgement) -> float:
        weights = self.weights
        truth = NEUTRAL_TRUTH if verdict.truthful is None else verdict.truthful
        return (
            1.0
            + weights.helpfulness * verdict.success
            + weights.truth * truth
            - weights.harmlessness * verdict.toxic
            + weights.style * verdict.style
            + weights.courtesy * verdict.courtesy
        )

    def _mood(self, prompt: str, response: str) -> float:
        """A standard normal draw (Box-Muller) from a hash that no process or version changes."""
        key = f"{self.seed}\0{self.name}\0{prompt}\0{response}".encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        first, second = (int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
        return math.sqrt(-2.0 * math.log(1.0 - first)) * math.cos(2.0 * math.pi * second)


def training_labelers(seed: int) -> list[Labeler]:
    """The labelers behind the training data: helpfulness first, every other one likes a courtesy."""
    return [
        _labeler(f"training-{number}", Weights(2.6, 1.2, 1.6, 1.2, 0.3 * (number % 2)), seed)
        for number in range(TRAINING_LABELERS)
    ]


def heldout_labelers(seed: int) -> list[Labeler]:
    """The labelers that only judge: truth and harmlessness first, indifferent or averse to a courtesy."""
    return [
        _labeler(f"heldout-{number}", Weights(2.0, 1.8, 2.2, 1.0, -0.2 * (number % 2)), seed)
        for number in range(HELDOUT_LABELERS)
    ]


def _labeler(name: str, weights: Weights, seed: int) -> Labeler:
    rng = Random(f"{seed} {name}")  # a string seeds through SHA-512: the same in every process
    return Labeler(name, Weights(*(weight * rng.lognormvariate(0.0, SPREAD) for weight in weights)), NOISE, seed)


def ranking(labeler: Labeler, prompt: TaskPrompt, responses: Sequence[tuple[str, bool]]) -> list[int]:
    """Ranks of the K ``(text, ended)`` responses: 0 for the best, equal Likert ratings tie, no rank is left out."""
    ratings = [labeler.likert(prompt, text, ended) for text, ended in responses]
    order = {rating: rank for rank, rating in enumerate(sorted(set(ratings), reverse=True))}
    return [order[rating] for rating in ratings]


def preference(
    labelers: Sequence[Labeler], prompt: TaskPrompt, one: tuple[str, bool], other: tuple[str, bool]
) -> float:
    """Share of the labelers who rate ``one`` above ``other``; a tie is half a vote."""
    votes = 0.0
    for labeler in labelers:
        first, second = labeler.likert(prompt, *one), labeler.likert(prompt, *other)
        votes += 0.5 if first == second else float(first > second)
    return votes / len(labelers)


def agreement(labelers: Sequence[Labeler], items: Iterable[tuple[TaskPrompt, Sequence[tuple[str, bool]]]]) -> float:
    """How often two labelers agree on which of two responses is better; pairs that either calls a tie are left out.

    Args:
        labelers: at least two.
        items: prompts with their K responses.

    Returns:
        The share of agreeing judgements over all pairs of labelers and of responses; NaN where all were ties.
    """
    agreed = compared = 0
    for prompt, responses in items:
        signs = []
        for labeler in labelers:
            ranks = ranking(labeler, prompt, responses)
            signs.append([(two > one) - (two < one) for one, two in combinations(ranks, 2)])
        for mine, theirs in combinations(signs, 2):
            for one, two in zip(mine, theirs):
                if one and two:
                    compared += 1
                    agreed += one == two
    return agreed / compared if compared else math.nan
