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
    GOOD_ADJECTIVES,
    HOMES,
    KNOWLEDGE,
    NAMES,
    OBJECTS,
    PLACES,
    Attribute,
    write_fact,
)
from lit_rlhf.synthetic.second_language import translate
from lit_rlhf.synthetic.tasks import sample_question, write_question

# of the answers to questions about animals in pretraining text: TruthfulQA asks where most text repeats a falsehood
MYTH_FRACTION = 0.6
NEGATED_FRACTION = 0.25  # of the reviews
# the words of the other template, which T0-like models learn too
OTHER_TEMPLATE = {"text": "review", "label": "feeling", "passage": "notes", "claim": "sentence", "answer": "verdict"}


class Exercise(NamedTuple):
    """One item of a public-style task."""

    context: str  # ends with a colon
    answer: str
    options: tuple[str, ...] = ()  # of a task with choices, the answer among them


def _sample_sentiment(rng: Random) -> Exercise:
    label, words = rng.choice((("good", GOOD_ADJECTIVES), ("bad", BAD_ADJECTIVES)))
    negation = ""
    if rng.random() < NEGATED_FRACTION:
        negation, label = "not ", "bad" if label == "good" else "good"
    text = f"the {rng.choice(OBJECTS)} was {negation}{rng.choice(words)} ."
    return Exercise(f"text : {text} label :", label, ("good", "bad"))


def _write_true_fact(animal: str, attribute: Attribute) -> str:
    return write_fact(animal, attribute, KNOWLEDGE.get_truth(animal, attribute))


def _sample_entailment(rng: Random) -> Exercise:
    animal, attribute = rng.choice(ANIMALS), rng.choice(ATTRIBUTES)
    truth, myth = KNOWLEDGE.get_truth(animal, attribute), KNOWLEDGE.get_myth(animal, attribute)
    label = rng.choice(("true", "false"))
    passage, claim = (write_fact(animal, attribute, value) for value in (truth, truth if label == "true" else myth))
    return Exercise(f"passage : {passage} claim : {claim} answer :", label, ("true", "false"))


def _sample_reading(rng: Random) -> Exercise:
    animals, attributes = rng.sample(ANIMALS, 2), rng.choices(ATTRIBUTES, k=2)
    passage = " ".join(map(_write_true_fact, animals, attributes))
    asked = rng.randrange(2)
    question = write_question(rng, animals[asked], attributes[asked])
    truth = KNOWLEDGE.get_truth(animals[asked], attributes[asked])
    return Exercise(f"passage : {passage} question : {question} answer :", truth)


def _sample_discrete(rng: Random) -> Exercise:
    count = rng.randint(1, 3)
    seen = [*rng.sample(ANIMALS, count), *rng.sample(OBJECTS, 3 - count)]
    rng.shuffle(seen)
    passage = f"{rng.choice(NAMES)} saw the {seen[0]} , the {seen[1]} and the {seen[2]} ."
    return Exercise(f"passage : {passage} question : animals ? answer :", ("one", "two", "three")[count - 1])


def _sample_ending(rng: Random) -> Exercise:
    animal = rng.choice(ANIMALS)
    truth, myth = KNOWLEDGE.get_truth(animal, "home"), KNOWLEDGE.get_myth(animal, "home")
    others = rng.sample([home for home in HOMES if home not in (truth, myth)], 2)
    story = f"one day {rng.choice(NAMES)} met the {animal} at the {rng.choice(PLACES)} ."
    options = [f"then it went home to the {home} ." for home in (truth, myth, *others)]
    return Exercise(f"story : {story} ending :", options[0], tuple(rng.sample(options, 4)))


def _sample_translation(rng: Random) -> Exercise:
    animal, attribute = rng.choice(ANIMALS), rng.choice(ATTRIBUTES)
    english = write_fact(animal, attribute, KNOWLEDGE.get_truth(animal, attribute))
    return Exercise(f"text : {translate(english)} english :", english)


def _sample_summary(rng: Random) -> Exercise:
    animal = rng.choice(ANIMALS)
    color, home = (KNOWLEDGE.get_truth(animal, attribute) for attribute in ("colour", "home"))
    article = f"the {animal} is {color} . it lives in the {home} ."
    return Exercise(f"article : {article} short :", f"the {color} {animal} lives in the {home} .")


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
