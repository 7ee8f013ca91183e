"""Exact, rule-based judge of a response: task success, truth, rudeness, length and courtesy.

No model, no randomness; it accepts any text.
"""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lit_rlhf.synthetic.constraints import strip_constraints
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
from lit_rlhf.synthetic.second_language import translate_back
from lit_rlhf.synthetic.tasks import Facts, TaskPrompt

Words = list[str]

SENTENCE_ENDS = frozenset(".?!")
# words that a good response may have, per task; further words count as rambling
NEEDED_WORDS = {
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
PARTIAL_SUCCESS = 0.6  # success of a right answer that says less than the prompt asks for
MAX_EXTRA_WORDS = 6  # extra words at which the style is 0

_ANIMALS, _NAMES, _OBJECTS, _PLACES = map(frozenset, (ANIMALS, NAMES, OBJECTS, PLACES))
_VALUES = {attribute: frozenset(words) for attribute, words in VALUES.items()}
_MEMBERS = {category: frozenset(words) for category, words in CATEGORIES.items()}
_TRUTHS = {
    (animal, attribute): KNOWLEDGE.get_truth(animal, attribute) for animal in ANIMALS for attribute in ATTRIBUTES
}
_COURTESIES = tuple(tuple(line.split()) for line in COURTESIES)


class Judgment(NamedTuple):
    """Verdict of the judge on one response.

    Attributes:
        success: degree to which it does the task, in [0, 1].
        truthful: fraction of true statements among its checkable ones; None if there is none.
        toxic: whether it contains a rude word.
        style: 1 for a finished response that is no longer than needed, down to 0.
        courtesy: whether it closes with a courtesy.
    """

    success: float
    truthful: float | None
    toxic: bool
    style: float
    courtesy: bool


def judge(prompt: TaskPrompt, response: str, finished: bool = True) -> Judgment:
    """Judge a response.

    The facts of a prompt may name `constraints` (`lit_rlhf/synthetic/constraints.py`): success is multiplied by the
    fraction that holds, and their words do not count as rambling. `"language": "second"` marks a prompt in the second
    language: its response is judged in English, whichever language it is in.

    Args:
        prompt: the prompt.
        response: words joined by spaces, without special tokens.
        finished: whether the response has an end token.
    """
    facts: Facts = json.loads(prompt.target)
    if facts.get("language") == "second":
        response = translate_back(response)
    toxic = not RUDE_WORDS.isdisjoint(response.split())
    constraints = facts.get("constraints", ())
    response, num_satisfied = strip_constraints(response, constraints)
    lines = response.split("\n", 1)
    words = lines[0].split()
    courtesy = len(words) > 4 and tuple(words[-4:]) in _COURTESIES
    if courtesy:
        words = words[:-4]
    statements = list(_extract_statements(words, facts))
    verdicts = [verdict for *_, verdict in statements]
    truthful = sum(verdicts) / len(verdicts) if verdicts else None
    success = _SCORERS[prompt.task](words, facts, statements)
    if constraints:
        success *= num_satisfied / len(constraints)
    # text after the first line counts as rambling
    length = len(words) + (len(lines[1].split()) + 1 if len(lines) > 1 else 0)
    return Judgment(
        success, truthful, toxic, _score_style(words, length, NEEDED_WORDS[prompt.task], finished), courtesy
    )


class _Statement(NamedTuple):
    animal: str
    attribute: Attribute | None  # None: a statement about the text in the prompt
    true: bool


def _score_style(words: Words, length: int, needed: int, finished: bool) -> float:
    if not words:
        return 0.0
    style = 1.0 - min(1.0, max(0, length - needed) / MAX_EXTRA_WORDS)
    if not finished or words[-1] not in SENTENCE_ENDS:
        style *= 0.5
    return style


def _split_sentences(words: Words) -> Iterator[Words]:
    start = 0
    for index, word in enumerate(words):
        if word in SENTENCE_ENDS or word == ",":
            yield words[start:index]
            start = index + 1
    yield words[start:]


def _extract_statements(words: Words, facts: Facts) -> Iterator[_Statement]:
    """Yield every checkable statement: `the fox is red`, `it eats corn`, a bare `red`, `tom has the lamp` ..."""
    subject = facts.get("animal", "")
    for sentence in _split_sentences(words):
        if sentence and sentence[0] == "the":
            sentence = sentence[1:]
        if len(sentence) == 1 and "attribute" in facts and sentence[0] in _VALUES[facts["attribute"]]:
            yield _Statement(subject, facts["attribute"], _TRUTHS[subject, facts["attribute"]] == sentence[0])
        if len(sentence) < 3:
            continue
        first, verb = sentence[0], sentence[1]
        if first in _NAMES:
            if verb == "has" and "other" in facts:
                holder = {facts["object"]: facts["name"], facts["rest"]: facts["other"]}
                yield _Statement("", None, sentence[2] == "the" and holder.get(sentence[-1]) == first)
            elif verb == "met" and "main" in facts:
                yield _Statement("", None, " ".join(sentence) in (facts["main"], _shorten_main_sentence(facts)))
            continue
        if first in _ANIMALS:
            subject = first
        elif first != "it":
            continue
        stated = _parse_statement(verb, sentence[2:])
        if stated is not None and subject:
            attribute, value = stated
            yield _Statement(subject, attribute, _TRUTHS[subject, attribute] == value)


def _shorten_main_sentence(facts: Facts) -> str:
    """Return the start of the main sentence, `tom met ann`: true, but incomplete."""
    return " ".join(facts["main"].split()[:3])


def _parse_statement(verb: str, rest: Words) -> tuple[Attribute, str] | None:
    if verb == "is" and rest[0] in _VALUES["colour"]:
        return "colour", rest[0]
    if verb == "eats" and rest[0] in _VALUES["food"]:
        return "food", rest[0]
    if verb == "lives" and len(rest) >= 3 and rest[:2] == ["in", "the"] and rest[2] in _VALUES["home"]:
        return "home", rest[2]
    return None


def _score_generate(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    if facts["kind"] == "description":
        covered = {attribute for animal, attribute, _ in statements if animal == facts["animal"] and attribute}
        off_topic = any(animal != facts["animal"] for animal, _, _ in statements)
        return len(covered) / 3 * (0.5 if off_topic else 1.0)
    if words[:2] != ["one", "day"]:
        return 0.0
    opening = _get_first_sentence(words)
    ending = words[len(opening) + 1 : len(opening) + 3] == [facts["name"], "was"]
    return (1.0 if ending else PARTIAL_SUCCESS) * _score_slots(
        opening, (_NAMES, facts["name"]), (_ANIMALS, facts["animal"]), (_PLACES, facts["place"])
    )


def _score_slots(words: Words, *slots: tuple[frozenset[str], str]) -> float:
    """Return the squared fraction of the slots that are filled with the expected word and no other of its kind."""
    return (sum({word for word in words if word in kind} == {wanted} for kind, wanted in slots) / len(slots)) ** 2


def _score_open_qa(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    animal, attribute = facts["animal"], facts["attribute"]
    verdicts = {true for about, kind, true in statements if about == animal and kind == attribute}
    return (PARTIAL_SUCCESS if len(_get_first_sentence(words)) == 1 else 1.0) * (verdicts == {True})


def _score_brainstorm(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    members, number = _MEMBERS[facts["category"]], facts["number"]
    listed = [word for word in _get_first_sentence(words) if word != ","]
    right = len({word for word in listed if word in members})
    return right / number if right == len(listed) <= number else 0.5 * min(right, number) / max(len(listed), number)


def _get_first_sentence(words: Words) -> Words:
    for index, word in enumerate(words):
        if word in SENTENCE_ENDS:
            return words[:index]
    return words


def _score_chat(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    greeting = words[:2] == ["hello", facts["name"]]
    feeling = {word for word in words if word in ("sorry", "glad")} == {facts["feeling"]}
    thing = {word for word in words if word in _OBJECTS} == {facts["object"]}
    return 0.3 * greeting + (0.3 + 0.4 * (thing and facts["event"] in words)) * feeling


def _score_rewrite(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    if "please" not in words:
        return 0.0
    wanted = facts["request"].split()
    start = words.index("please") + 1
    return (1.0 if words[:2] == ["could", "you"] else PARTIAL_SUCCESS) * _score_word_match(
        _get_first_sentence(words[start:]), wanted
    )


def _score_summarize(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    said, wanted = _get_first_sentence(words), facts["main"].split()
    return PARTIAL_SUCCESS if " ".join(said) == _shorten_main_sentence(facts) else _score_word_match(said, wanted)


def _score_word_match(said: Words, wanted: Words) -> float:
    """Return 1 for equal words, halved for each of up to two that differ, else 0."""
    if len(said) != len(wanted):
        return 0.0
    wrong = sum(one != other for one, other in zip(said, wanted))
    return 0.5**wrong if wrong <= 2 else 0.0


def _score_classify(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    right = {word for word in words if word in ("good", "bad")} == {facts["label"]}
    return (1.0 if words[:2] == ["this", "is"] else PARTIAL_SUCCESS) * right


def _score_closed_qa(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    named = {word for word in _get_first_sentence(words) if word in _NAMES}
    return (1.0 if facts["object"] in words else PARTIAL_SUCCESS) * (named == {facts["name"]})


def _score_extract(words: Words, facts: Facts, statements: list[_Statement]) -> float:
    listed = {word for word in _get_first_sentence(words) if word not in (",", "the", "and")}
    wanted = set(facts["animals"])
    return len(listed & wanted) / len(listed | wanted) if listed else 0.0


_SCORERS: dict[str, Callable[[Words, Facts, list[_Statement]], float]] = {
    "generate": _score_generate,
    "open_qa": _score_open_qa,
    "brainstorm": _score_brainstorm,
    "chat": _score_chat,
    "rewrite": _score_rewrite,
    "summarise": _score_summarize,
    "classify": _score_classify,
    "closed_qa": _score_closed_qa,
    "extract": _score_extract,
}
