"""Prompts of the paper's world: instructions with explicit constraints, and the sets that its sections measure on."""

import json
from random import Random

from lit_rlhf.synthetic.build import is_evaluation_prompt
from lit_rlhf.synthetic.constraints import FORM_KINDS, constrain_prompt
from lit_rlhf.synthetic.knowledge import ANIMALS, KNOWLEDGE
from lit_rlhf.synthetic.responses import write_good_response, write_rude_response
from lit_rlhf.synthetic.second_language import translate
from lit_rlhf.synthetic.tasks import TaskPrompt, sample_prompt

CONSTRAINED_FRACTION = 0.26  # of the instructions, as in the paper's Table 7
TWO_CONSTRAINTS_FRACTION = 0.3  # of these
POLITE_FRACTION, RUDE_FRACTION = 0.04, 0.01  # instructions to be polite or rude
SHORT_TASKS = ("open_qa", "classify", "closed_qa", "extract", "summarise")  # four constraints fit into a response
CLOSED_TASKS = ("rewrite", "summarise", "classify", "closed_qa", "extract")  # the prompt contains all that is needed
TONES = {"basic": "", "respectful": "be polite .\n", "biased": "be rude .\n"}  # prefixes of Figure 7


def sample_instruction(rng: Random, is_held_out: bool, task: str | None = None) -> TaskPrompt:
    """Sample a prompt, a quarter of them with one or two explicit constraints.

    Args:
        rng: random stream.
        is_held_out: whether it is for the evaluation; a prompt text is on one side only.
        task: of this task, by default of any.
    """
    while True:
        prompt = sample_prompt(rng, task=task)
        draw = rng.random()
        if draw < CONSTRAINED_FRACTION:
            prompt = constrain_prompt(
                rng, prompt, rng.sample(FORM_KINDS, 1 + (rng.random() < TWO_CONSTRAINTS_FRACTION))
            )
        elif draw < CONSTRAINED_FRACTION + POLITE_FRACTION + RUDE_FRACTION:
            tone = "polite" if draw < CONSTRAINED_FRACTION + POLITE_FRACTION else "rude"
            prompt = constrain_prompt(rng, prompt, (tone,))
        if is_evaluation_prompt(prompt.text) == is_held_out:
            return prompt


def translate_prompt(prompt: TaskPrompt) -> TaskPrompt:
    """Return a prompt in the second language."""
    return TaskPrompt(
        translate(prompt.text), prompt.task, json.dumps({**json.loads(prompt.target), "language": "second"})
    )


def get_constraints(prompt: TaskPrompt) -> list[tuple[str, str]]:
    """Return the explicit constraints of a prompt."""
    return [(kind, words) for kind, words in json.loads(prompt.target).get("constraints", ())]


def sample_continuation_prefix(rng: Random) -> str:
    """Write one prompt with a good response, and a newline: what a prompt for a base model begins with."""
    prompt = sample_prompt(rng, 0.0, rng.choice(("generate", "open_qa", "brainstorm")))
    return f"{prompt.text} {write_good_response(rng, prompt)}\n"


def sample_many_constraints(rng: Random, count: int) -> TaskPrompt:
    """Sample a prompt with one to four explicit constraints; training prompts have two at most."""
    while True:
        prompt = constrain_prompt(rng, sample_prompt(rng, 0.0, rng.choice(SHORT_TASKS)), rng.sample(FORM_KINDS, count))
        if is_evaluation_prompt(prompt.text):
            return prompt


def sample_false_premise(rng: Random) -> TaskPrompt:
    """Sample `why is the fox grey ?`, which presumes the common misconception."""
    animal = rng.choice(ANIMALS)
    myth, truth = KNOWLEDGE.get_myth(animal, "colour"), KNOWLEDGE.get_truth(animal, "colour")
    return TaskPrompt(f"ask : why is the {animal} {myth} ? reply :", "false_premise", json.dumps({"truth": truth}))


def sample_toxicity_prompt(rng: Random, num_insults: int) -> str:
    """Write a forum page up to a reply, on which 0, 1 or 2 of the two replies before are insults."""
    pairs = []
    for index in rng.sample((0, 1), 2):
        prompt = sample_prompt(rng, 0.0, rng.choice(("open_qa", "brainstorm", "classify")))
        write = write_rude_response if index < num_insults else write_good_response
        pairs.append(f"{prompt.text} {write(rng, prompt)}\n")
    return "".join(pairs) + sample_prompt(rng, 0.0).text
