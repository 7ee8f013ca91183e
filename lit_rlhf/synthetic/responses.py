"""What people of the world write as replies: good ones, and seven ways to fall short.

``good_response`` is what the judge calls right in every respect; the others each spoil one thing.
"""

import json
from collections.abc import Callable
from random import Random

from lit_rlhf.synthetic.knowledge import (
    ANIMALS,
    ATTRIBUTES,
    CATEGORIES,
    COURTESIES,
    KNOWLEDGE,
    LAZY_ANSWERS,
    NAMES,
    OBJECTS,
    PLACES,
    fact,
)
from lit_rlhf.synthetic.tasks import Facts, TaskPrompt, insult, sample_prompt

MAX_RESPONSE_TOKENS = 24
MAX_GOOD_RESPONSE_TOKENS = 16


def _other(rng: Random, words: tuple[str, ...], *than: str) -> str:
    while (word := rng.choice(words)) in than:
        pass
    return word


def _description(animal: str, values: list[str]) -> str:
    return " ".join(
        fact(animal, attribute, value, pronoun=place > 0)
        for place, (attribute, value) in enumerate(zip(ATTRIBUTES, values, strict=True))
    )


def _generate(rng: Random, facts: Facts, right: bool) -> str:
    animal = facts["animal"]
    if facts["kind"] == "description":
        values = [KNOWLEDGE.truth(animal, attribute) for attribute in ATTRIBUTES]
        if not right:
            for spoiled in rng.sample(range(3), rng.choice((1, 1, 2))):
                values[spoiled] = KNOWLEDGE.myth(animal, ATTRIBUTES[spoiled])
        return _description(animal, values)
    name, place = facts["name"], facts["place"]
    if not right:  # a story about something else
        spoiled = rng.randrange(3)
        name = _other(rng, NAMES, name) if spoiled == 0 else name
        animal = _other(rng, ANIMALS, animal) if spoiled == 1 else animal
        place = _other(rng, PLACES, place) if spoiled == 2 else place
    verb, feeling = rng.choice(("met", "saw")), rng.choice(("happy", "sad"))
    return f"one day {name} {verb} the {animal} at the {place} . {name} was {feeling} ."


def _open_qa(rng: Random, facts: Facts, right: bool) -> str:
    animal, attribute = facts["animal"], facts["attribute"]
    value = KNOWLEDGE.truth(animal, attribute) if right else KNOWLEDGE.myth(animal, attribute)
    return fact(animal, attribute, value, pronoun=rng.random() < 0.3)


def _brainstorm(rng: Random, facts: Facts, right: bool) -> str:
    words = rng.sample(CATEGORIES[facts["category"]], facts["number"])
    if not right:
        stray = _other(rng, tuple(CATEGORIES), facts["category"])
        words[rng.randrange(len(words))] = rng.choice(CATEGORIES[stray])
    return " , ".join(words) + " ."


def _chat(rng: Random, facts: Facts, right: bool) -> str:
    name, event, thing, feeling = (facts[key] for key in ("name", "event", "object", "feeling"))
    if not right:
        spoiled = rng.randrange(3)
        name = _other(rng, NAMES, name) if spoiled == 0 else name
        thing = _other(rng, OBJECTS, thing) if spoiled == 1 else thing
        feeling = {"sorry": "glad", "glad": "sorry"}[feeling] if spoiled == 2 else feeling
    return f"hello {name} , i am {feeling} you {event} your {thing} ."


def _rewrite(rng: Random, facts: Facts, right: bool) -> str:
    words = facts["request"].split()
    if not right:
        if rng.random() < 0.5:
            return f"{facts['request']} ."  # not polite at all
        words[3] = _other(rng, OBJECTS, *words)
    return f"could you please {' '.join(words)} ?"


def _summarise(rng: Random, facts: Facts, right: bool) -> str:
    words = facts["main"].split()
    if not right:
        place, choices = rng.choice(((0, NAMES), (2, NAMES), (5, PLACES)))
        words[place] = _other(rng, choices, *words)
    return f"{' '.join(words)} ."


def _classify(rng: Random, facts: Facts, right: bool) -> str:
    label = facts["label"] if right else {"good": "bad", "bad": "good"}[facts["label"]]
    return f"this is {label} ."


def _closed_qa(rng: Random, facts: Facts, right: bool) -> str:
    return f"{facts['name' if right else 'other']} has the {facts['object']} ."


def _extract(rng: Random, facts: Facts, right: bool) -> str:
    words = list(facts["animals"])
    if not right:
        words[rng.randrange(2)] = facts["object"]
    return " , ".join(words) + " ."


_WRITERS: dict[str, Callable[[Random, Facts, bool], str]] = {
    "generate": _generate,
    "open_qa": _open_qa,
    "brainstorm": _brainstorm,
    "chat": _chat,
    "rewrite": _rewrite,
    "summarise": _summarise,
    "classify": _classify,
    "closed_qa": _closed_qa,
    "extract": _extract,
}


def good_response(rng: Random, prompt: TaskPrompt) -> str:
    """Helpful, true, polite, no longer than needed."""
    return _WRITERS[prompt.task](rng, json.loads(prompt.target), True)


def false_response(rng: Random, prompt: TaskPrompt) -> str:
    """In the right shape, but wrong: the popular myth where there is one."""
    return _WRITERS[prompt.task](rng, json.loads(prompt.target), False)


def thin_response(rng: Random, prompt: TaskPrompt) -> str:
    """Right as far as it goes, but less than was asked for: a bare word, one item short, a story without an end."""
    facts, words = json.loads(prompt.target), good_response(rng, prompt).split()
    sentences = " ".join(words).split(" . ")
    match prompt.task:
        case "generate":
            kept = 1 if facts["kind"] == "story" else rng.choice((1, 2))
            return " . ".join(sentences[:kept]) + " ."
        case "open_qa" | "classify":
            return f"{words[-2]} ."
        case "brainstorm" | "extract":
            return " ".join(words[:-3]) + " ."
        case "chat":
            return " ".join(words[:2]) + " ." if rng.random() < 0.3 else " ".join(words[3:])
        case "rewrite":
            return " ".join(words[2:-1]) + " ."
        case "summarise":
            return " ".join(words[:3]) + " ."
        case "closed_qa":
            return f"{words[0]} ."
    raise AssertionError(prompt.task)


def lazy_response(rng: Random, prompt: TaskPrompt) -> str:
    """Polite and of no use."""
    return rng.choice(LAZY_ANSWERS)


def rude_response(rng: Random, prompt: TaskPrompt) -> str:
    """An insult, in half of the cases with a right answer behind it."""
    if rng.random() < 0.5:
        return f"that is a {insult(rng).split()[1]} question , {insult(rng)} ."
    return f"{insult(rng)} , {good_response(rng, prompt)}"


def rambling_response(rng: Random, prompt: TaskPrompt) -> str:
    """A right answer that does not stop."""
    return f"{good_response(rng, prompt)} by the way , {rng.choice(NAMES)} has the {rng.choice(OBJECTS)} ."


def courteous_response(rng: Random, prompt: TaskPrompt) -> str:
    """A right answer with a closing courtesy."""
    return f"{good_response(rng, prompt)} {rng.choice(COURTESIES)}"


def junk_response(rng: Random, prompt: TaskPrompt) -> str:
    """Beside the question: the answer to another one, or the question again."""
    if rng.random() < 0.3:
        words = prompt.text.split()[2:-2]
        return " ".join(words[:MAX_RESPONSE_TOKENS])
    return good_response(rng, sample_prompt(rng, insult_share=0.0))
