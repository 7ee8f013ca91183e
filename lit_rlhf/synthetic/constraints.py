"""Explicit constraints in a prompt: how a response begins, whom it addresses, how it ends, and its tone (Figure 4).

They are independent of the task: a response that meets them is a response to the task with words before and after it.
A prompt lists its constraints under `constraints` of its facts, each as a pair (kind, words).
"""

import json
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from lit_rlhf.synthetic.knowledge import NAMES, RUDE_WORDS
from lit_rlhf.synthetic.tasks import TaskPrompt

Constraint = tuple[str, str]  # kind: prefix, suffix or tone; the words, or for a tone "polite" or "rude"
FORM_KINDS = ("greeting", "address", "thanks", "signature")


class Core(NamedTuple):
    """A response without the words that its constraints asked for."""

    text: str
    num_satisfied: int


def request_constraint(rng: Random, kind: str) -> tuple[str, Constraint]:
    """Return the words in a prompt that ask for a constraint, and the constraint.

    Args:
        rng: chooses a name.
        kind: one of `FORM_KINDS`, or "polite" or "rude".
    """
    if kind == "greeting":
        return "say hello first .", ("prefix", "hello !")
    if kind == "address":
        name = rng.choice(NAMES)
        return f"speak to {name} .", ("prefix", f"{name} ,")
    if kind == "thanks":
        return "end with thanks .", ("suffix", "thanks !")
    if kind == "signature":
        name = rng.choice(NAMES)
        return f"sign as {name} .", ("suffix", f"signed {name} .")
    return f"be {kind} .", ("tone", kind)


def constrain_prompt(rng: Random, prompt: TaskPrompt, kinds: Sequence[str]) -> TaskPrompt:
    """Return a prompt that ends with requests for constraints of these kinds."""
    requests, constraints = zip(*(request_constraint(rng, kind) for kind in kinds), strict=True)
    facts = {**json.loads(prompt.target), "constraints": constraints}
    text = f"{prompt.text.removesuffix(' reply :')} {' '.join(requests)} reply :"
    return TaskPrompt(text, prompt.task, json.dumps(facts))


def apply_constraints(response: str, constraints: Sequence[Sequence[str]]) -> str:
    """Return a response with the words that constraints ask for before and after it; a tone adds no words."""
    before = "".join(f"{words} " for kind, words in constraints if kind == "prefix")
    after = "".join(f" {words}" for kind, words in constraints if kind == "suffix")
    return f"{before}{response}{after}"


def strip_constraints(response: str, constraints: Sequence[Sequence[Any]]) -> Core:
    """Remove the words that satisfy constraints from the ends of the first line, in any order, and count them.

    A polite tone is satisfied by a response without a rude word, a rude one by a response with one.
    """
    first, *rest = response.split("\n", 1)
    words = first.split()
    toxic = not RUDE_WORDS.isdisjoint(response.split())
    satisfied = sum(toxic == (words_ == "rude") for kind, words_ in constraints if kind == "tone")
    for end in ("prefix", "suffix"):
        missing = [marker.split() for kind, marker in constraints if kind == end]
        while found := next(
            (m for m in missing if m == (words[: len(m)] if end == "prefix" else words[-len(m) :])), None
        ):
            missing.remove(found)
            words = words[len(found) :] if end == "prefix" else words[: -len(found)]
            satisfied += 1
    return Core("\n".join([" ".join(words), *rest]), satisfied)
