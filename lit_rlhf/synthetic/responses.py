"""Simulated human replies: a good one, with the best verdict of the judge, and seven kinds with one defect each."""

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
    write_fact,
)
from lit_rlhf.synthetic.tasks import Facts, TaskPrompt, sample_insult, sample_prompt

MAX_RESPONSE_TOKENS = 24
MAX_GOOD_RESPONSE_TOKENS = 16


def _choose_other(rng: Random, words: tuple[str, ...], *than: str) -> str:
    while (word := rng.choice(words)) in than:
        pass
    return word


def _describe(animal: str, values: list[str]) -> str:
    return " ".join(
        write_fact(animal, attribute, value, pronoun=index > 0)
        for index, (attribute, value) in enumerate(zip(ATTRIBUTES, values, strict=True))
    )


def _write_generate(rng: Random, facts: Facts, right: bool) -> str:
    animal = facts["animal"]
    if facts["kind"] == "description":
        values = [KNOWLEDGE.get_truth(animal, attribute) for attribute in ATTRIBUTES]
        if not right:
            for spoiled in rng.sample(range(3), rng.choice((1, 1, 2))):
                values[spoiled] = KNOWLEDGE.get_myth(animal, ATTRIBUTES[spoiled])
        return _describe(animal, values)
    name, place = facts["name"], facts["place"]
    if not right:  # a story about something else
        spoiled = rng.randrange(3)
        name = _choose_other(rng, NAMES, name) if spoiled == 0 else name
        animal = _choose_other(rng, ANIMALS, animal) if spoiled == 1 else animal
        place = _choose_other(rng, PLACES, place) if spoiled == 2 else place
    verb, feeling = rng.choice(("met", "saw")), rng.choice(("happy", "sad"))
    return f"one day {name} {verb} the {animal} at the {place} . {name} was {feeling} ."


def _write_open_qa(rng: Random, facts: Facts, right: bool) -> str:
    animal, attribute = facts["animal"], facts["attribute"]
    value = KNOWLEDGE.get_truth(animal, attribute) if right else KNOWLEDGE.get_myth(animal, attribute)
    return write_fact(animal, attribute, value, pronoun=rng.random() < 0.3)


def _write_brainstorm(rng: Random, facts: Facts, right: bool) -> str:
    words = rng.sample(CATEGORIES[facts["category"]], facts["number"])
    if not right:
        stray = _choose_other(rng, tuple(CATEGORIES), facts["category"])
        words[rng.randrange(len(words))] = rng.choice(CATEGORIES[stray])
    return " , ".join(words) + " ."


def _write_chat(rng: Random, facts: Facts, right: bool) -> str:
    name, event, thing, feeling = (facts[key] for key in ("name", "event", "object", "feeling"))
    if not right:
        spoiled = rng.randrange(3)
        name = _choose_other(rng, NAMES, name) if spoiled == 0 else name
        thing = _choose_other(rng, OBJECTS, thing) if spoiled == 1 else thing
        feeling = {"sorry": "glad", "glad": "sorry"}[feeling] if spoiled == 2 else feeling
    return f"hello {name} , i am {feeling} you {event} your {thing} ."


def _write_rewrite(rng: Random, facts: Facts, right: bool) -> str:
    words = facts["request"].split()
    if not right:
        if rng.random() < 0.5:
            return f"{facts['request']} ."  # not polite at all
        words[3] = _choose_other(rng, OBJECTS, *words)
    return f"could you please {' '.join(words)} ?"


def _write_summarize(rng: Random, facts: Facts, right: bool) -> str:
    words = facts["main"].split()
    if not right:
        index, choices = rng.choice(((0, NAMES), (2, NAMES), (5, PLACES)))
        words[index] = _choose_other(rng, choices, *words)
    return f"{' '.join(words)} ."


def _write_classify(rng: Random, facts: Facts, right: bool) -> str:
    label = facts["label"] if right else {"good": "bad", "bad": "good"}[facts["label"]]
    return f"this is {label} ."


def _write_closed_qa(rng: Random, facts: Facts, right: bool) -> str:
    return f"{facts['name' if right else 'other']} has the {facts['object']} ."


def _write_extract(rng: Random, facts: Facts, right: bool) -> str:
    words = list(facts["animals"])
    if not right:
        words[rng.randrange(2)] = facts["object"]
    return " , ".join(words) + " ."


_WRITERS: dict[str, Callable[[Random, Facts, bool], str]] = {
    "generate": _write_generate,
    "open_qa": _write_open_qa,
    "brainstorm": _write_brainstorm,
    "chat": _write_chat,
    "rewrite": _write_rewrite,
    "summarise": _write_summarize,
    "classify": _write_classify,
    "closed_qa": _write_closed_qa,
    "extract": _write_extract,
}


def write_good_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write a helpful, true and polite response that is no longer than needed."""
    return _WRITERS[prompt.task](rng, json.loads(prompt.target), True)


def write_false_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write a wrong response of the right form: the common misconception where there is one."""
    return _WRITERS[prompt.task](rng, json.loads(prompt.target), False)


def write_incomplete_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write a correct but incomplete response: a bare word, one item less, a story without an end."""
    facts, words = json.loads(prompt.target), write_good_response(rng, prompt).split()
    sentences = " ".join(words).split(" . ")
    match prompt.task:
        case "generate":
            count = 1 if facts["kind"] == "story" else rng.choice((1, 2))
            return " . ".join(sentences[:count]) + " ."
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


def write_lazy_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write a polite and useless response."""
    return rng.choice(LAZY_ANSWERS)


def write_rude_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write an insult, in half of the cases followed by a right answer."""
    if rng.random() < 0.5:
        return f"that is a {sample_insult(rng).split()[1]} question , {sample_insult(rng)} ."
    return f"{sample_insult(rng)} , {write_good_response(rng, prompt)}"


def write_rambling_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write a right answer followed by unrelated text."""
    return f"{write_good_response(rng, prompt)} by the way , {rng.choice(NAMES)} has the {rng.choice(OBJECTS)} ."


def write_courteous_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write a right answer with a closing courtesy."""
    return f"{write_good_response(rng, prompt)} {rng.choice(COURTESIES)}"


def write_off_topic_response(rng: Random, prompt: TaskPrompt) -> str:
    """Write the answer to another prompt, or repeat the prompt."""
    if rng.random() < 0.3:
        words = prompt.text.split()[2:-2]
        return " ".join(words[:MAX_RESPONSE_TOKENS])
    return write_good_response(rng, sample_prompt(rng, insult_fraction=0.0))
