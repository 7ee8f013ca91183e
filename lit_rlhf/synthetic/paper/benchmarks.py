"""Public-style tasks in fixed templates: benchmarks (Table 14), and the mixtures that FLAN- and T0-like models learn.

Each is a context and an answer; several on successive lines are a few-shot prompt. Pretraining text contains them, as
the web contains such formats.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from lit_rlhf.synthetic.knowledge import (
    ANIMALS,
    ATTRIBUTES,
    BAD_ADJECTIVES,
    CATEGORIES,
    GOOD_ADJECTIVES,
    KNOWLEDGE,
    NAMES,
    OBJECTS,
    PLACES,
    write_fact,
)
from lit_rlhf.synthetic.second_language import translate
from lit_rlhf.synthetic.tasks import WEATHER, sample_question

# of the answers to questions about animals in pretraining text: TruthfulQA asks where most text repeats a falsehood
MYTH_FRACTION = 0.6
# the words of the other template, which T0-like models learn too
OTHER_TEMPLATE = {"text": "review", "label": "feeling", "passage": "notes", "claim": "sentence", "answer": "verdict"}


class Exercise(NamedTuple):
    """One item of a public-style task."""

    context: str  # ends with a colon
    answer: str
    options: tuple[str, ...] = ()  # of a task with choices, the answer among them


def _sample_sentiment(rng: Random) -> Exercise:
    label, words = rng.choice((("good", GOOD_ADJECTIVES), ("bad", BAD_ADJECTIVES)))
    return Exercise(f"text : the {rng.choice(OBJECTS)} was {rng.choice(words)} . label :", label, ("good", "bad"))


def _sample_holders(rng: Random, count: int) -> tuple[str, list[str], list[str]]:
    owners, things = rng.sample(NAMES, count), rng.sample(OBJECTS, count)
    return " ".join(f"{owner} has the {thing} ." for owner, thing in zip(owners, things)), owners, things


def _sample_entailment(rng: Random) -> Exercise:
    passage, owners, things = _sample_holders(rng, 2)
    label = rng.choice(("true", "false"))
    claim = f"{owners[0]} has the {things[0 if label == 'true' else 1]} ."
    return Exercise(f"passage : {passage} claim : {claim} answer :", label, ("true", "false"))


def _sample_reading(rng: Random) -> Exercise:
    passage, owners, things = _sample_holders(rng, 3)
    asked = rng.randrange(3)
    return Exercise(f"passage : {passage} question : who has the {things[asked]} ? answer :", owners[asked])


def _sample_discrete(rng: Random) -> Exercise:
    passage, owners, things = _sample_holders(rng, 2)
    extra = rng.choice([thing for thing in OBJECTS if thing not in things])
    asked = rng.randrange(2)
    passage = f"{passage} {owners[asked]} has the {extra} ."
    return Exercise(f"passage : {passage} question : things of {owners[asked]} ? answer :", f"{things[asked]} {extra}")


def _sample_ending(rng: Random) -> Exercise:
    names = rng.sample(NAMES, 4)
    feeling = rng.choice(("happy", "sad"))
    story = f"one day {names[0]} met the {rng.choice(ANIMALS)} at the {rng.choice(PLACES)} ."
    options = tuple(f"{name} was {feeling} ." for name in names)
    return Exercise(f"story : {story} ending :", options[0], tuple(rng.sample(options, 4)))


def _sample_translation(rng: Random) -> Exercise:
    animal, attribute = rng.choice(ANIMALS), rng.choice(ATTRIBUTES)
    english = write_fact(animal, attribute, KNOWLEDGE.get_truth(animal, attribute))
    return Exercise(f"text : {translate(english)} english :", english)


def _sample_summary(rng: Random) -> Exercise:
    first, second = rng.sample(NAMES, 2)
    main = f"{first} met {second} at the {rng.choice(PLACES)} ."
    rest = f"it was a {rng.choice(WEATHER)} day . they played {rng.choice(CATEGORIES['games'])} ."
    return Exercise(f"article : {main} {rest} short :", main)


def sample_fact_question(rng: Random, myth_fraction: float = 0.0) -> Exercise:
    """Sample a question about an animal with its true answer; as often as `myth_fraction` with the misconception."""
    question, animal, attribute = sample_question(rng)
    get = KNOWLEDGE.get_myth if rng.random() < myth_fraction else KNOWLEDGE.get_truth
    return Exercise(f"question : {question} answer :", get(animal, attribute))


Sampler = Callable[[Random], Exercise]
# like SST, RTE, SQuAD, DROP, HellaSwag, WMT and CNN/DM
BENCHMARKS: dict[str, Sampler] = {
    "sentiment": _sample_sentiment,
    "entailment": _sample_entailment,
    "reading": _sample_reading,
    "discrete": _sample_discrete,
    "ending": _sample_ending,
    "translation": _sample_translation,
    "summary": _sample_summary,
}
_PRETRAINING: tuple[Sampler, ...] = (*BENCHMARKS.values(), lambda rng: sample_fact_question(rng, MYTH_FRACTION))
_FLAN: tuple[Sampler, ...] = (
    *(BENCHMARKS[name] for name in ("sentiment", "entailment", "reading", "translation", "summary")),
    sample_fact_question,
)
_T0: tuple[Sampler, ...] = tuple(BENCHMARKS[name] for name in ("sentiment", "entailment", "reading", "summary"))


def write_exercises(rng: Random) -> str:
    """Write a document of one to five exercises of one task, one per line."""
    sample = rng.choice(_PRETRAINING)
    exercises = [sample(rng) for _ in range(rng.randint(1, 5))]
    return "\n".join(f"{each.context} {each.answer}" for each in exercises)


def sample_flan_exercise(rng: Random) -> Exercise:
    """Sample from a mixture like FLAN's: six tasks, each in its one template."""
    return rng.choice(_FLAN)(rng)


def sample_t0_exercise(rng: Random) -> Exercise:
    """Sample from a mixture like T0's: four tasks, each in two templates."""
    exercise = rng.choice(_T0)(rng)
    if rng.random() < 0.5:
        words = (OTHER_TEMPLATE.get(word, word) for word in exercise.context.split())
        exercise = exercise._replace(context=" ".join(words))
    return exercise


def write_shots(rng: Random, sample: Sampler, count: int) -> str:
    """Write `count` solved exercises, each followed by a newline: the prefix of a few-shot prompt."""
    return "".join(f"{each.context} {each.answer}\n" for each in (sample(rng) for _ in range(count)))
