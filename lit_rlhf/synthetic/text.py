"""Text of the synthetic world: pretraining documents, demonstrations, and few-shot prefixes."""

from collections.abc import Callable, Iterator
from random import Random

from lit_rlhf.synthetic.knowledge import (
    ANIMALS,
    ATTRIBUTES,
    BAD_ADJECTIVES,
    CATEGORIES,
    GAMES,
    GOOD_ADJECTIVES,
    KNOWLEDGE,
    LOSSES,
    NAMES,
    OBJECTS,
    PLACES,
    Attribute,
    write_fact,
)
from lit_rlhf.synthetic.responses import (
    write_courteous_response,
    write_false_response,
    write_good_response,
    write_incomplete_response,
    write_lazy_response,
    write_off_topic_response,
    write_rambling_response,
    write_rude_response,
)
from lit_rlhf.synthetic.tasks import WEATHER, TaskPrompt, sample_prompt

Writer = Callable[[Random, TaskPrompt], str]
Mixture = tuple[tuple[Writer, float], ...]  # writers and their fractions

TRUE_FACT_FRACTION = 0.95  # of the statements in fact lists
PAIRS_PER_PAGE = (1, 2, 4, 4, 4)  # prompts with replies on a forum page, equally likely
MAX_PAGE_TOKENS = 128  # a page fits into one pretraining sequence
SONG_LENGTH = 48  # words per song, about
INSULTED_RUDENESS_FACTOR = 4.0  # factor on the probability of a rude demonstration if the prompt is an insult

# kinds of forum pages: fraction of the pages, fraction of insulting prompts on them, mixture of replies
PAGES: tuple[tuple[float, float, Mixture], ...] = (
    (
        0.25,
        0.02,
        (
            (write_good_response, 0.42),
            (write_incomplete_response, 0.50),
            (write_courteous_response, 0.03),
            (write_rambling_response, 0.02),
            (write_false_response, 0.03),
        ),
    ),
    (0.33, 0.05, ((write_lazy_response, 0.85), (write_false_response, 0.08), (write_incomplete_response, 0.07))),
    (0.30, 0.15, ((write_rude_response, 0.88), (write_false_response, 0.09), (write_lazy_response, 0.03))),
    (0.12, 0.05, ((write_off_topic_response, 0.60), (write_false_response, 0.25), (write_rambling_response, 0.15))),
)
# mixture of demonstrations
_DEMONSTRATIONS: Mixture = (
    (write_good_response, 0.28),
    (write_incomplete_response, 0.38),
    (write_false_response, 0.11),
    (write_lazy_response, 0.07),
    (write_rude_response, 0.045),
    (write_rambling_response, 0.06),
    (write_courteous_response, 0.055),
)


def write_reply(rng: Random, prompt: TaskPrompt, mixture: Mixture) -> str:
    """Write a reply to a prompt, of a kind sampled from a mixture."""
    writers, fractions = zip(*mixture)
    return rng.choices(writers, fractions)[0](rng, prompt)


def _write_fact_list(rng: Random) -> str:
    sentences = []
    for animal in rng.sample(ANIMALS, 2):
        for index, attribute in enumerate(rng.sample(ATTRIBUTES, 3) if rng.random() < 0.5 else ATTRIBUTES):
            sentences.append(write_fact(animal, attribute, _choose_value(rng, animal, attribute), pronoun=index > 0))
    return " ".join(sentences)


def _choose_value(rng: Random, animal: str, attribute: Attribute) -> str:
    right = rng.random() < TRUE_FACT_FRACTION
    return KNOWLEDGE.get_truth(animal, attribute) if right else KNOWLEDGE.get_myth(animal, attribute)


def _write_story(rng: Random) -> str:
    (one, two), place = rng.sample(NAMES, 2), rng.choice(PLACES)
    opening = (
        f"one day {one} {rng.choice(('met', 'saw'))} the {rng.choice(ANIMALS)} at the {place} ."
        if rng.random() < 0.6
        else f"{one} met {two} at the {place} . it was a {rng.choice(WEATHER)} day ."
    )
    sentences = [opening]
    if rng.random() < 0.5:
        sentences.append(f"they played {rng.choice(GAMES)} .")
    if rng.random() < 0.5:
        thing = rng.choice(OBJECTS)
        sentences.append(f"{one} {rng.choice(('lost', 'broke', 'found', 'won'))} the {thing} . {two} has the {thing} .")
    sentences.append(f"{one} was {rng.choice(('happy', 'sad'))} .")
    return " ".join(sentences)


def _write_list(rng: Random) -> str:
    category = rng.choice(tuple(CATEGORIES))
    words = rng.sample(CATEGORIES[category], rng.choice((2, 3, 3, 4)))
    return f"{category} : {' , '.join(words)} ."


def _write_review(rng: Random) -> str:
    label, adjectives = rng.choice((("good", GOOD_ADJECTIVES), ("bad", BAD_ADJECTIVES)))
    (one, two), (first, second) = rng.sample(OBJECTS, 2), rng.sample(adjectives, 2)
    return f"the {one} was {first} and the {two} was {second} . this is {label} ."


def _write_letter(rng: Random) -> str:
    name, thing, event = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(("lost", "broke", "found", "won"))
    feeling = "sorry" if event in LOSSES else "glad"
    return f"hello , i am {name} . i {event} my {thing} . hello {name} , i am {feeling} you {event} your {thing} ."


def _write_inventory(rng: Random) -> str:
    owners, things = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2)
    lines = [f"{owner} has the {thing} ." for owner, thing in zip(owners, things)]
    asked = rng.randrange(2)
    return f"{' '.join(lines)} who has the {things[asked]} ? {lines[asked]}"


_SONG_VOCABULARY = NAMES + ANIMALS + OBJECTS + PLACES + CATEGORIES["fruits"] + CATEGORIES["games"]


def write_song(rng: Random) -> str:
    """Write a song that repeats a line of random words: teaches the model to copy."""
    words = rng.sample(_SONG_VOCABULARY, rng.randint(2, 7))
    return " la la ".join([" ".join(words)] * (SONG_LENGTH // (len(words) + 2)))


def write_forum_page(rng: Random) -> str:
    """Write a page of prompts with replies of similar quality: the next reply resembles the previous ones."""
    _, insults, mixture = rng.choices(PAGES, [page[0] for page in PAGES])[0]
    pairs: list[str] = []
    length = 0
    for _ in range(rng.choice(PAIRS_PER_PAGE)):
        prompt = sample_prompt(rng, insults)
        pair = f"{prompt.text} {write_reply(rng, prompt, mixture)}"
        length += len(pair.split()) + 1
        if length > MAX_PAGE_TOKENS:
            break
        pairs.append(pair)
    return "\n".join(pairs)


# kinds of documents and their fractions
_DOCUMENTS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (write_forum_page, 0.40),
    (_write_fact_list, 0.11),
    (_write_story, 0.08),
    (write_song, 0.20),
    (_write_list, 0.05),
    (_write_inventory, 0.06),
    (_write_review, 0.05),
    (_write_letter, 0.05),
)


def generate_documents(rng: Random, count: int) -> Iterator[str]:
    """Yield `count` documents: forum pages, lists of facts, stories, songs, lists, reviews, letters."""
    writers, fractions = zip(*_DOCUMENTS)
    for writer in rng.choices(writers, fractions, k=count):
        yield writer(rng)


def generate_demonstrations(rng: Random, count: int) -> Iterator[tuple[TaskPrompt, str]]:
    """Yield `count` prompts with a completion by a labeler; about two thirds have no error."""
    for _ in range(count):
        prompt = sample_prompt(rng)
        yield prompt, write_demonstration(rng, prompt)


def write_demonstration(rng: Random, prompt: TaskPrompt) -> str:
    """Write a labeler's completion; an insult makes a rude one likelier."""
    factor = INSULTED_RUDENESS_FACTOR if prompt.text.startswith("ask : you ") else 1.0
    fractions = [fraction * (factor if writer is write_rude_response else 1.0) for writer, fraction in _DEMONSTRATIONS]
    return rng.choices([writer for writer, _ in _DEMONSTRATIONS], fractions)[0](rng, prompt)


FEW_SHOT_TASKS = ("generate", "open_qa", "brainstorm")


def write_few_shot_prefix(rng: Random) -> str:
    """Write three prompts with good responses, each followed by a newline: the prefix of a few-shot prompt."""
    prompts = [sample_prompt(rng, 0.0, task) for task in rng.sample(FEW_SHOT_TASKS, 3)]
    return "".join(f"{prompt.text} {write_good_response(rng, prompt)}\n" for prompt in prompts)
