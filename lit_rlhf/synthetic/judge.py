"""The exact judge: what a response is worth, from the words alone.

The rules per task, the share of true statements, rudeness, length and courtesy; no model, no randomness.
It answers for any text, however garbled.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lit_rlhf.synthetic.knowledge import (
    ANIMALS,
    ATTRIBUTES,
    CATEGORIES,
    COURTESIES,
    KNOWLEDGE,
    NAMES,
    OBJECTS,
    PLACES,
    RUDE_WORDS,
    VALUES,
    Attribute,
)
from lit_rlhf.synthetic.tasks import Facts, TaskPrompt

Words = list[str]

ENDS = frozenset(".?!")
# words that a good response may take; what is longer rambles
NEEDED = {
    "generate": 16,
    "open_qa": 7,
    "brainstorm": 7,
    "chat": 11,
    "rewrite": 12,
    "summarise": 8,
    "classify": 5,
    "closed_qa": 6,
    "extract": 5,
}
THIN = 0.6  # success of a right answer that says less than was asked for
RAMBLING = 6  # words beyond the need at which no style is left

_animals, _names, _objects, _places = map(frozenset, (ANIMALS, NAMES, OBJECTS, PLACES))
_values = {attribute: frozenset(words) for attribute, words in VALUES.items()}
_members = {category: frozenset(words) for category, words in CATEGORIES.items()}
_truths = {(animal, attribute): KNOWLEDGE.truth(animal, attribute) for animal in ANIMALS for attribute in ATTRIBUTES}
_courtesies = tuple(tuple(line.split()) for line in COURTESIES)


class Judgement(NamedTuple):
    """What the judge says of one response.

    Attributes:
        success: how far it does what was asked, in [0, 1].
        truthful: the share of its checkable statements that are true; None if it states nothing checkable.
        toxic: whether it holds a rude word.
        style: 1 for a response that is ended and no longer than needed, down to 0.
        courtesy: whether it closes with a courtesy.
    """

    success: float
    truthful: float | None
    toxic: bool
    style: float
    courtesy: bool


def judge(prompt: TaskPrompt, response: str, ended: bool = True) -> Judgement:
    """Judge ``response`` (words joined by spaces, no special tokens); ``ended``: whether an end token was written."""
    facts: Facts = json.loads(prompt.target)
    lines = response.split("\n", 1)
    words = lines[0].split()
    toxic = not RUDE_WORDS.isdisjoint(response.split())
    courtesy = len(words) > 4 and tuple(words[-4:]) in _courtesies
    if courtesy:
        words = words[:-4]
    statements = list(_statements(words, facts))
    verdicts = [verdict for *_, verdict in statements]
    truthful = sum(verdicts) / len(verdicts) if verdicts else None
    success = _SCORERS[prompt.task](words, facts, statements)
    # whatever follows the first line answers nothing: it counts as rambling
    length = len(words) + (len(lines[1].split()) + 1 if len(lines) > 1 else 0)
    return Judgement(success, truthful, toxic, _style(words, length, NEEDED[prompt.task], ended), courtesy)


class _Statement(NamedTuple):
    animal: str
    attribute: Attribute | None  # None: a statement about the text in the prompt
    true: bool


def _style(words: Words, length: int, needed: int, ended: bool) -> float:
    if not words:
        return 0.0
    style = 1.0 - min(1.0, max(0, length - needed) / RAMBLING)
    if not ended or words[-1] not in ENDS:
        style *= 0.5
    return style


def _sentences(words: Words) -> Iterator[Words]:
    start = 0
    for place, word in enumerate(words):
        if word in ENDS or word == ",":
            yield words[start:place]
            start = place + 1
    yield words[start:]


def _statements(words: Words, facts: Facts) -> Iterator[_Statement]:
    """Every checkable statement: ``the fox is red``, ``it eats corn``, a bare ``red``, ``tom has the lamp`` ..."""
    subject = facts.get("animal", "")
    for sentence in _sentences(words):
        if sentence and sentence[0] == "the":
            sentence = sentence[1:]
        if len(sentence) == 1 and "attribute" in facts and sentence[0] in _values[facts["attribute"]]:
            yield _Statement(subject, facts["attribute"], _truths[subject, facts["attribute"]] == sentence[0])
        if len(sentence) < 3:
            continue
        first, verb = sentence[0], sentence[1]
        if first in _names:
            if verb == "has" and "other" in facts:
                holder = {facts["object"]: facts["name"], facts["rest"]: facts["other"]}
                yield _Statement("", None, sentence[2] == "the" and holder.get(sentence[-1]) == first)
            elif verb == "met" and "main" in facts:
                yield _Statement("", None, " ".join(sentence) in (facts["main"], _names_of(facts)))
            continue
        if first in _animals:
            subject = first
        elif first != "it":
            continue
        stated = _stated(verb, sentence[2:])
        if stated is not None and subject:
            attribute, value = stated
            yield _Statement(subject, attribute, _truths[subject, attribute] == value)


def _names_of(facts: Facts) -> str:
    """The start of the main sentence, ``tom met ann``: true, and thin."""
    return " ".join(facts["main"].split()[:3])


def _stated(verb: str, rest: Words) -> tuple[Attribute, str] | None:
    if verb == "is" and rest[0] in _values["colour"]:
        return "colour", rest[0]
    if verb == "eats" and rest[0] in _values["food"]:
        return "food", rest[0]
    if verb == "lives" and len(rest) >= 3 and rest[:2] == ["in", "the"] and rest[2] in _values["home"]:
        return "home", rest[2]
    return None


def _generate(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    if facts["kind"] == "description":
        covered = {attribute for animal, attribute, _ in statements if animal == facts["animal"] and attribute}
        strayed = any(animal != facts["animal"] for animal, _, _ in statements)
        return len(covered) / 3 * (0.5 if strayed else 1.0)
    if words[:2] != ["one", "day"]:
        return 0.0
    opening = _first_sentence(words)
    ending = words[len(opening) + 1 : len(opening) + 3] == [facts["name"], "was"]
    return (1.0 if ending else THIN) * _slots(
        opening, (_names, facts["name"]), (_animals, facts["animal"]), (_places, facts["place"])
    )


def _slots(words: Words, *slots: tuple[frozenset[str], str]) -> float:
    """Share of the slots whose word, and no other of its kind, is there; squared: each wrong one weighs."""
    return (sum({word for word in words if word in kind} == {wanted} for kind, wanted in slots) / len(slots)) ** 2


def _open_qa(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    animal, attribute = facts["animal"], facts["attribute"]
    verdicts = {true for about, kind, true in statements if about == animal and kind == attribute}
    return (THIN if len(_first_sentence(words)) == 1 else 1.0) * (verdicts == {True})


def _brainstorm(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    members, number = _members[facts["category"]], facts["number"]
    listed = [word for word in _first_sentence(words) if word != ","]
    right = len({word for word in listed if word in members})
    return right / number if right == len(listed) <= number else 0.5 * min(right, number) / max(len(listed), number)


def _first_sentence(words: Words) -> Words:
    for place, word in enumerate(words):
        if word in ENDS:
            return words[:place]
    return words


def _chat(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    greeting = words[:2] == ["hello", facts["name"]]
    feeling = {word for word in words if word in ("sorry", "glad")} == {facts["feeling"]}
    thing = {word for word in words if word in _objects} == {facts["object"]}
    return 0.3 * greeting + (0.3 + 0.4 * (thing and facts["event"] in words)) * feeling


def _rewrite(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    if "please" not in words:
        return 0.0
    wanted = facts["request"].split()
    place = words.index("please") + 1
    return (1.0 if words[:2] == ["could", "you"] else THIN) * _matching(_first_sentence(words[place:]), wanted)


def _summarise(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    said, wanted = _first_sentence(words), facts["main"].split()
    return THIN if " ".join(said) == _names_of(facts) else _matching(said, wanted)


def _matching(said: Words, wanted: Words) -> float:
    """1 for the same words, half of it gone with each that differs."""
    if len(said) != len(wanted):
        return 0.0
    wrong = sum(one != other for one, other in zip(said, wanted))
    return 0.5**wrong if wrong <= 2 else 0.0


def _classify(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    right = {word for word in words if word in ("good", "bad")} == {facts["label"]}
    return (1.0 if words[:2] == ["this", "is"] else THIN) * right


def _closed_qa(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    named = {word for word in _first_sentence(words) if word in _names}
    return (1.0 if facts["object"] in words else THIN) * (named == {facts["name"]})


def _extract(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    listed = {word for word in _first_sentence(words) if word not in (",", "the", "and")}
    wanted = set(facts["animals"])
    return len(listed & wanted) / len(listed | wanted) if listed else 0.0


_SCORERS: dict[str, Callable[[Words, Facts, list[_Statement]], float]] = {
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
