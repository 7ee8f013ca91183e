"""Nine tasks after the paper's use cases (InstructGPT, Table 1), as prompts in one frame: ``ask : … reply :``."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any

from lit_rlhf.synthetic.knowledge import (
    ANIMALS,
    ATTRIBUTES,
    BAD_ADJECTIVES,
    CATEGORIES,
    GAINS,
    GOOD_ADJECTIVES,
    LOSSES,
    NAMES,
    OBJECTS,
    PLACES,
    REQUESTS,
    RUDE_ADJECTIVES,
    RUDE_NOUNS,
    Attribute,
)

MAX_PROMPT_TOKENS = 32
INSULT_SHARE = 0.08  # of prompts begin with an insult

Facts = dict[str, Any]
WEATHER = ("cold", "hot", "sunny", "rainy", "windy")
NUMBERS = {"two": 2, "three": 3}


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt with what the judge needs.

    Attributes:
        text: the full frame, ``ask : … reply :``.
        task: one of ``TASKS``.
        target: the facts that decide about a response, as JSON.
    """

    text: str
    task: str
    target: str


def _lead(rng: Random) -> str:
    """Who asks: many texts for one question, so that a question of the evaluation need not be a training prompt."""
    draw = rng.random()
    if draw < 0.3:
        return ""
    if draw < 0.6:
        return f"{rng.choice(NAMES)} asks : "
    if draw < 0.9:
        asker, asked = rng.sample(NAMES, 2)
        return f"{asker} asks {asked} : "
    return "please tell me : "


def _generate(rng: Random) -> tuple[str, Facts]:
    animal = rng.choice(ANIMALS)
    if rng.random() < 0.5:
        return f"{_lead(rng)}write about the {animal} .", {"kind": "description", "animal": animal}
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    verb = rng.choice(("write", "tell me"))
    facts = {"kind": "story", "name": name, "animal": animal, "place": place}
    return f"{verb} a story about {name} and the {animal} at the {place} .", facts


_QUESTIONS: dict[Attribute, tuple[str, str]] = {
    "colour": ("what colour is the {} ?", "which colour does the {} have ?"),
    "home": ("where does the {} live ?", "where is the home of the {} ?"),
    "food": ("what does the {} eat ?", "what is the food of the {} ?"),
}


def _open_qa(rng: Random) -> tuple[str, Facts]:
    animal, attribute = rng.choice(ANIMALS), rng.choice(ATTRIBUTES)
    question = rng.choice(_QUESTIONS[attribute]).format(animal)
    return _lead(rng) + question, {"animal": animal, "attribute": attribute}


def _brainstorm(rng: Random) -> tuple[str, Facts]:
    category, number = rng.choice(tuple(CATEGORIES)), rng.choice(tuple(NUMBERS))
    verb = rng.choice(("name", "list"))
    return f"{_lead(rng)}{verb} {number} {category} .", {"category": category, "number": NUMBERS[number]}


def _chat(rng: Random) -> tuple[str, Facts]:
    name, thing, event = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(LOSSES + GAINS)
    greeting = rng.choice(("hello , i am", "hi , my name is"))
    facts = {"name": name, "event": event, "object": thing, "feeling": "sorry" if event in LOSSES else "glad"}
    return f"{greeting} {name} . i {event} my {thing} .", facts


def _rewrite(rng: Random) -> tuple[str, Facts]:
    verb, receiver = rng.choice(REQUESTS), rng.choice(("me", *NAMES))
    first, second = rng.sample(OBJECTS, 2)
    things = f"the {first}" if rng.random() < 0.5 else f"the {first} and the {second}"
    request = f"{verb} {receiver} {things}"
    return f"say politely : {request} .", {"request": request}


def _summarise(rng: Random) -> tuple[str, Facts]:
    first, second = rng.sample(NAMES, 2)
    main = f"{first} met {second} at the {rng.choice(PLACES)}"
    filler = f"it was a {rng.choice(WEATHER)} day ."
    game = f"they played {rng.choice(CATEGORIES['games'])} ."
    text = f"{main} . {filler} {game}" if rng.random() < 0.5 else f"{filler} {main} . {game}"
    return f"sum up : {text}", {"main": main}


def _classify(rng: Random) -> tuple[str, Facts]:
    label, words = rng.choice((("good", GOOD_ADJECTIVES), ("bad", BAD_ADJECTIVES)))
    (one, two), (first, second) = rng.sample(OBJECTS, 2), rng.sample(words, 2)
    return f"good or bad : the {one} was {first} and the {two} was {second} .", {"label": label}


def _closed_qa(rng: Random) -> tuple[str, Facts]:
    owners, things = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2)
    asked = rng.randrange(2)
    text = " ".join(f"{owner} has the {thing} ." for owner, thing in zip(owners, things))
    facts = {"name": owners[asked], "other": owners[1 - asked], "object": things[asked], "rest": things[1 - asked]}
    return f"{text} who has the {things[asked]} ?", facts


def _extract(rng: Random) -> tuple[str, Facts]:
    animals, thing = rng.sample(ANIMALS, 2), rng.choice(OBJECTS)
    items = [*animals, thing]
    rng.shuffle(items)
    text = f"{rng.choice(NAMES)} saw the {items[0]} , the {items[1]} and the {items[2]} ."
    return f"list the animals : {text}", {"animals": [item for item in items if item != thing], "object": thing}


# share of the prompts, about as in the paper's Table 1 (generation less, question answering more, "other" left out)
_SAMPLERS: dict[str, tuple[float, Callable[[Random], tuple[str, Facts]]]] = {
    "generate": (0.34, _generate),
    "open_qa": (0.20, _open_qa),
    "brainstorm": (0.12, _brainstorm),
    "chat": (0.10, _chat),
    "rewrite": (0.07, _rewrite),
    "summarise": (0.05, _summarise),
    "classify": (0.05, _classify),
    "closed_qa": (0.04, _closed_qa),
    "extract": (0.03, _extract),
}
TASKS = tuple(_SAMPLERS)
_CUMULATIVE = list(accumulate(share for share, _ in _SAMPLERS.values()))


def insult(rng: Random) -> str:
    """A mild insult, as an address: ``you silly clown``."""
    return f"you {rng.choice(RUDE_ADJECTIVES)} {rng.choice(RUDE_NOUNS)}"


def sample_prompt(rng: Random, insult_share: float = INSULT_SHARE, task: str | None = None) -> TaskPrompt:
    """One prompt; of any task in the paper's proportions, or of the task named."""
    if task is None:
        task = rng.choices(TASKS, cum_weights=_CUMULATIVE)[0]
    body, facts = _SAMPLERS[task][1](rng)
    if rng.random() < insult_share:
        body = f"{insult(rng)} , {body}"
    return TaskPrompt(f"ask : {body} reply :", task, json.dumps(facts))
