"""Nine tasks after the use cases of the paper (Table 1), as prompts of one template: `ask : … reply :`."""

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
INSULT_FRACTION = 0.08  # fraction of prompts that begin with an insult

Facts = dict[str, Any]
WEATHER = ("cold", "hot", "sunny", "rainy", "windy")
NUMBERS = {"two": 2, "three": 3}


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt and the facts to judge a response by.

    Attributes:
        text: the full prompt, `ask : … reply :`.
        task: one of `TASKS`.
        target: the facts, as JSON.
    """

    text: str
    task: str
    target: str


def _sample_asker(rng: Random) -> str:
    """Sample the beginning of a prompt: who asks. So one question has many texts, some of them held out."""
    draw = rng.random()
    if draw < 0.3:
        return ""
    if draw < 0.6:
        return f"{rng.choice(NAMES)} asks : "
    if draw < 0.9:
        asker, asked = rng.sample(NAMES, 2)
        return f"{asker} asks {asked} : "
    return "please tell me : "


def _sample_generate(rng: Random) -> tuple[str, Facts]:
    animal = rng.choice(ANIMALS)
    if rng.random() < 0.5:
        return f"{_sample_asker(rng)}write about the {animal} .", {"kind": "description", "animal": animal}
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    verb = rng.choice(("write", "tell me"))
    facts = {"kind": "story", "name": name, "animal": animal, "place": place}
    return f"{verb} a story about {name} and the {animal} at the {place} .", facts


_QUESTIONS: dict[Attribute, tuple[str, str]] = {
    "colour": ("what colour is the {} ?", "which colour does the {} have ?"),
    "home": ("where does the {} live ?", "where is the home of the {} ?"),
    "food": ("what does the {} eat ?", "what is the food of the {} ?"),
}


def write_question(rng: Random, animal: str, attribute: Attribute) -> str:
    """Write a question about an attribute of an animal."""
    return rng.choice(_QUESTIONS[attribute]).format(animal)


def sample_question(rng: Random) -> tuple[str, str, Attribute]:
    """Sample a question about an animal; return it with the animal and the attribute that it asks for."""
    animal, attribute = rng.choice(ANIMALS), rng.choice(ATTRIBUTES)
    return write_question(rng, animal, attribute), animal, attribute


def _sample_open_qa(rng: Random) -> tuple[str, Facts]:
    question, animal, attribute = sample_question(rng)
    return _sample_asker(rng) + question, {"animal": animal, "attribute": attribute}


def _sample_brainstorm(rng: Random) -> tuple[str, Facts]:
    category, number = rng.choice(tuple(CATEGORIES)), rng.choice(tuple(NUMBERS))
    verb = rng.choice(("name", "list"))
    return f"{_sample_asker(rng)}{verb} {number} {category} .", {"category": category, "number": NUMBERS[number]}


def _sample_chat(rng: Random) -> tuple[str, Facts]:
    name, thing, event = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(LOSSES + GAINS)
    greeting = rng.choice(("hello , i am", "hi , my name is"))
    facts = {"name": name, "event": event, "object": thing, "feeling": "sorry" if event in LOSSES else "glad"}
    return f"{greeting} {name} . i {event} my {thing} .", facts


def _sample_rewrite(rng: Random) -> tuple[str, Facts]:
    verb, receiver = rng.choice(REQUESTS), rng.choice(("me", *NAMES))
    first, second = rng.sample(OBJECTS, 2)
    things = f"the {first}" if rng.random() < 0.5 else f"the {first} and the {second}"
    request = f"{verb} {receiver} {things}"
    return f"say politely : {request} .", {"request": request}


def _sample_summarize(rng: Random) -> tuple[str, Facts]:
    first, second = rng.sample(NAMES, 2)
    main = f"{first} met {second} at the {rng.choice(PLACES)}"
    filler = f"it was a {rng.choice(WEATHER)} day ."
    game = f"they played {rng.choice(CATEGORIES['games'])} ."
    text = f"{main} . {filler} {game}" if rng.random() < 0.5 else f"{filler} {main} . {game}"
    return f"sum up : {text}", {"main": main}


def _sample_classify(rng: Random) -> tuple[str, Facts]:
    label, words = rng.choice((("good", GOOD_ADJECTIVES), ("bad", BAD_ADJECTIVES)))
    (one, two), (first, second) = rng.sample(OBJECTS, 2), rng.sample(words, 2)
    return f"good or bad : the {one} was {first} and the {two} was {second} .", {"label": label}


def _sample_closed_qa(rng: Random) -> tuple[str, Facts]:
    owners, things = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2)
    asked = rng.randrange(2)
    text = " ".join(f"{owner} has the {thing} ." for owner, thing in zip(owners, things))
    facts = {"name": owners[asked], "other": owners[1 - asked], "object": things[asked], "rest": things[1 - asked]}
    return f"{text} who has the {things[asked]} ?", facts


def _sample_extract(rng: Random) -> tuple[str, Facts]:
    animals, thing = rng.sample(ANIMALS, 2), rng.choice(OBJECTS)
    items = [*animals, thing]
    rng.shuffle(items)
    text = f"{rng.choice(NAMES)} saw the {items[0]} , the {items[1]} and the {items[2]} ."
    return f"list the animals : {text}", {"animals": [item for item in items if item != thing], "object": thing}


# fraction of the prompts, about as in Table 1 of the paper (less generation, more question answering, no "other")
_SAMPLERS: dict[str, tuple[float, Callable[[Random], tuple[str, Facts]]]] = {
    "generate": (0.34, _sample_generate),
    "open_qa": (0.20, _sample_open_qa),
    "brainstorm": (0.12, _sample_brainstorm),
    "chat": (0.10, _sample_chat),
    "rewrite": (0.07, _sample_rewrite),
    "summarise": (0.05, _sample_summarize),
    "classify": (0.05, _sample_classify),
    "closed_qa": (0.04, _sample_closed_qa),
    "extract": (0.03, _sample_extract),
}
TASKS = tuple(_SAMPLERS)
_CUMULATIVE = list(accumulate(fraction for fraction, _ in _SAMPLERS.values()))


def sample_insult(rng: Random) -> str:
    """Sample a mild insult: `you silly clown`."""
    return f"you {rng.choice(RUDE_ADJECTIVES)} {rng.choice(RUDE_NOUNS)}"


def sample_prompt(rng: Random, insult_fraction: float = INSULT_FRACTION, task: str | None = None) -> TaskPrompt:
    """Sample one prompt: of `task`, or of any task in the proportions of the paper."""
    if task is None:
        task = rng.choices(TASKS, cum_weights=_CUMULATIVE)[0]
    body, facts = _SAMPLERS[task][1](rng)
    if rng.random() < insult_fraction:
        body = f"{sample_insult(rng)} , {body}"
    return TaskPrompt(f"ask : {body} reply :", task, json.dumps(facts))
