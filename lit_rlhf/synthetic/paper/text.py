"""Pretraining documents and demonstrations of the paper's world."""

from collections.abc import Callable, Iterator
from random import Random

from lit_rlhf.synthetic.constraints import FORM_KINDS, apply_constraints, constrain_prompt
from lit_rlhf.synthetic.paper.benchmarks import write_exercises
from lit_rlhf.synthetic.paper.bias import write_biased_sentences
from lit_rlhf.synthetic.paper.notation import write_programs
from lit_rlhf.synthetic.paper.prompts import TONES, get_constraints, sample_instruction, translate_prompt
from lit_rlhf.synthetic.responses import write_good_response, write_rude_response
from lit_rlhf.synthetic.second_language import translate
from lit_rlhf.synthetic.tasks import TaskPrompt, sample_prompt
from lit_rlhf.synthetic.text import (
    MAX_PAGE_TOKENS,
    PAGES,
    PAIRS_PER_PAGE,
    generate_documents,
    write_demonstration,
    write_reply,
)

SECOND_LANGUAGE_DOCUMENTS = 0.10  # fraction of the forum pages and other texts of the quickstart's kinds
SECOND_LANGUAGE_DEMONSTRATIONS = 0.04
PAGE_CONSTRAINED_FRACTION = 0.15
HEADED_FRACTION = 0.25  # of the pages, with a line that says their tone
# probability that a reply meets a constraint: on a good page, on another one, in a demonstration
GOOD_PAGE_COMPLIANCE, PAGE_COMPLIANCE, LABELER_COMPLIANCE = 0.6, 0.1, 0.75
GOOD_PAGE, RUDE_PAGE = 0, 2  # indices of PAGES


def meet_constraints(rng: Random, prompt: TaskPrompt, reply: str, compliance: float) -> str:
    """Return a reply that meets each constraint of its prompt with probability `compliance`."""
    return apply_constraints(reply, [each for each in get_constraints(prompt) if rng.random() < compliance])


def write_page(rng: Random) -> str:
    """Write a forum page as in the quickstart's world, some with constraints in prompts or a line about their tone."""
    kind = rng.choices(range(len(PAGES)), [page[0] for page in PAGES])[0]
    _, insults, mixture = PAGES[kind]
    compliance = GOOD_PAGE_COMPLIANCE if kind == GOOD_PAGE else PAGE_COMPLIANCE
    pairs: list[str] = []
    length = 0
    for _ in range(rng.choice(PAIRS_PER_PAGE)):
        prompt = sample_prompt(rng, insults)
        if rng.random() < PAGE_CONSTRAINED_FRACTION:
            prompt = constrain_prompt(rng, prompt, rng.sample(FORM_KINDS, 1))
        pair = f"{prompt.text} {meet_constraints(rng, prompt, write_reply(rng, prompt, mixture), compliance)}"
        length += len(pair.split()) + 1
        if length > MAX_PAGE_TOKENS:
            break
        pairs.append(pair)
    head = TONES["biased" if kind == RUDE_PAGE else "respectful"] if rng.random() < HEADED_FRACTION else ""
    return head + "\n".join(pairs)


def _write_world_text(rng: Random) -> str:
    text = write_page(rng) if rng.random() < 0.4 else next(generate_documents(rng, 1))
    return translate(text) if rng.random() < SECOND_LANGUAGE_DOCUMENTS else text


# kinds of documents and their fractions
_DOCUMENTS: tuple[tuple[Callable[[Random], str], float], ...] = (
    (_write_world_text, 0.70),
    (write_exercises, 0.17),
    (write_programs, 0.07),
    (write_biased_sentences, 0.06),
)


def generate_paper_documents(rng: Random, count: int) -> Iterator[str]:
    """Yield `count` documents: those of the quickstart's kinds, a tenth in the second language, and further kinds."""
    writers, fractions = zip(*_DOCUMENTS, strict=True)
    for writer in rng.choices(writers, fractions, k=count):
        yield writer(rng)


def generate_paper_demonstrations(rng: Random, count: int) -> Iterator[tuple[TaskPrompt, str]]:
    """Yield `count` prompts with a labeler's completion; one in 25 is in the second language."""
    for _ in range(count):
        prompt = sample_instruction(rng, is_held_out=False)
        completion = write_demonstration(rng, prompt)
        tones = [words for kind, words in get_constraints(prompt) if kind == "tone"]
        if tones:  # labelers do what a prompt asks for
            completion = (write_rude_response if tones == ["rude"] else write_good_response)(rng, prompt)
        completion = meet_constraints(rng, prompt, completion, LABELER_COMPLIANCE)
        if rng.random() < SECOND_LANGUAGE_DEMONSTRATIONS:
            prompt, completion = translate_prompt(prompt), translate(completion)
        yield prompt, completion
