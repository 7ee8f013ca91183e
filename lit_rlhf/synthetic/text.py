"""The written text of the world: what the base model reads, what labelers demonstrate, and the few-shot prompt."""

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
    fact,
)
from lit_rlhf.synthetic.responses import (
    courteous_response,
    false_response,
    good_response,
    junk_response,
    lazy_response,
    rambling_response,
    rude_response,
    thin_response,
)
from lit_rlhf.synthetic.tasks import WEATHER, TaskPrompt, sample_prompt

Writer = Callable[[Random, TaskPrompt], str]
Mixture = tuple[tuple[Writer, float], ...]  # ways to write, and the share of each

TRUE_FACTS = 0.95  # share of true statements in fact lists
PAGE_PAIRS = (1, 2, 4, 4, 4)  # pairs of a forum page, each as likely
PAGE_TOKENS = 128  # a page fits a packed row
SONG_WORDS = 48  # about, of a whole song
INSULTED_RUDENESS = 4.0  # how much likelier a demonstration is rude if the prompt was

# kinds of forum page: share of the pages, insulting share of its prompts, and how its replies come out
_PAGES: tuple[tuple[float, float, Mixture], ...] = (
    (
        0.25,
        0.02,
        (
            (good_response, 0.42),
            (thin_response, 0.50),
            (courteous_response, 0.03),
            (rambling_response, 0.02),
            (false_response, 0.03),
        ),
    ),
    (0.33, 0.05, ((lazy_response, 0.85), (false_response, 0.08), (thin_response, 0.07))),
    (0.30, 0.15, ((rude_response, 0.88), (false_response, 0.09), (lazy_response, 0.03))),
    (0.12, 0.05, ((junk_response, 0.60), (false_response, 0.25), (rambling_response, 0.15))),
)
# how a labeler's demonstration comes out
_DEMONSTRATIONS: Mixture = (
    (good_response, 0.28),
    (thin_response, 0.38),
    (false_response, 0.11),
    (lazy_response, 0.07),
    (rude_response, 0.045),
    (rambling_response, 0.06),
    (courteous_response, 0.055),
)


def _write(rng: Random, prompt: TaskPrompt, mixture: Mixture) -> str:
    writers, shares = zip(*mixture)
    return rng.choices(writers, shares)[0](rng, prompt)


def _fact_list(rng: Random) -> str:
    sentences = []
    for animal in rng.sample(ANIMALS, 2):
        for place, attribute in enumerate(rng.sample(ATTRIBUTES, 3) if rng.random() < 0.5 else ATTRIBUTES):
            sentences.append(fact(animal, attribute, _believed(rng, animal, attribute), pronoun=place > 0))
    return " ".join(sentences)


def _believed(rng: Random, animal: str, attribute: Attribute) -> str:
    right = rng.random() < TRUE_FACTS
    return KNOWLEDGE.truth(animal, attribute) if right else KNOWLEDGE.myth(animal, attribute)


def _story(rng: Random) -> str:
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


def _list(rng: Random) -> str:
    category = rng.choice(tuple(CATEGORIES))
    words = rng.sample(CATEGORIES[category], rng.choice((2, 3, 3, 4)))
    return f"{category} : {' , '.join(words)} ."


def _review(rng: Random) -> str:
    label, adjectives = rng.choice((("good", GOOD_ADJECTIVES), ("bad", BAD_ADJECTIVES)))
    (one, two), (first, second) = rng.sample(OBJECTS, 2), rng.sample(adjectives, 2)
    return f"the {one} was {first} and the {two} was {second} . this is {label} ."


def _letter(rng: Random) -> str:
    name, thing, event = rng.choice(NAMES), rng.choice(OBJECTS), rng.choice(("lost", "broke", "found", "won"))
    feeling = "sorry" if event in LOSSES else "glad"
    return f"hello , i am {name} . i {event} my {thing} . hello {name} , i am {feeling} you {event} your {thing} ."


def _inventory(rng: Random) -> str:
    owners, things = rng.sample(NAMES, 2), rng.sample(OBJECTS, 2)
    lines = [f"{owner} has the {thing} ." for owner, thing in zip(owners, things)]
    asked = rng.randrange(2)
    return f"{' '.join(lines)} who has the {things[asked]} ? {lines[asked]}"


_SONG_WORDS = NAMES + ANIMALS + OBJECTS + PLACES + CATEGORIES["fruits"] + CATEGORIES["games"]


def song(rng: Random) -> str:
    """A line of random words sung again and again: the shortest way to learn to copy."""
    words = rng.sample(_SONG_WORDS, rng.randint(2, 7))
    return " la la ".join([" ".join(words)] * (SONG_WORDS // (len(words) + 2)))


def forum_page(rng: Random) -> str:
    """Some prompts with replies, all of about one quality: the next reply will be like the last ones."""
    _, insults, mixture = rng.choices(_PAGES, [page[0] for page in _PAGES])[0]
    pairs: list[str] = []
    length = 0
    for _ in range(rng.choice(PAGE_PAIRS)):
        prompt = sample_prompt(rng, insults)
        pair = f"{prompt.text} {_write(rng, prompt, mixture)}"
        length += len(pair.split()) + 1
        if length > PAGE_TOKENS:
            break
        pairs.append(pair)
    return "\n".join(pairs)


# kinds of document and their share
_DOCUMENTS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (forum_page, 0.40),
    (_fact_list, 0.11),
    (_story, 0.08),
    (song, 0.20),
    (_list, 0.05),
    (_inventory, 0.06),
    (_review, 0.05),
    (_letter, 0.05),
)


def pretraining_documents(rng: Random, count: int) -> Iterator[str]:
    """``count`` documents: forum pages, lists of facts, stories, songs, lists, reviews, letters."""
    writers, shares = zip(*_DOCUMENTS)
    for writer in rng.choices(writers, shares, k=count):
        yield writer(rng)


def demonstrations(rng: Random, count: int) -> Iterator[tuple[TaskPrompt, str]]:
    """``count`` prompts with what a labeler wrote: about two thirds without fault, as people are."""
    writers, shares = zip(*_DEMONSTRATIONS)
    rude = [share * (INSULTED_RUDENESS if writer is rude_response else 1.0) for writer, share in _DEMONSTRATIONS]
    for _ in range(count):
        prompt = sample_prompt(rng)
        insulted = prompt.text.startswith("ask : you ")
        yield prompt, rng.choices(writers, rude if insulted else shares)[0](rng, prompt)


FEW_SHOT_TASKS = ("generate", "open_qa", "brainstorm")


def few_shot_prefix(rng: Random) -> str:
    """Three good pairs in the frame of a forum page, a newline behind each: the next prompt goes right after it."""
    prompts = [sample_prompt(rng, 0.0, task) for task in rng.sample(FEW_SHOT_TASKS, 3)]
    return "".join(f"{prompt.text} {good_response(rng, prompt)}\n" for prompt in prompts)
