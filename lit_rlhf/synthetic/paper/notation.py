"""Programs in a small notation, which only pretraining text contains: `let x = lamp ; let y = drum ; show y > drum`."""

import json
from random import Random

from lit_rlhf.synthetic.knowledge import OBJECTS
from lit_rlhf.synthetic.tasks import TaskPrompt

VARIABLES = ("x", "y", "z")


def sample_program(rng: Random) -> tuple[str, str, list[str]]:
    """Return a program, what it shows, and the other values in it."""
    count = rng.choice((2, 3))
    names, values = rng.sample(VARIABLES, count), rng.sample(OBJECTS, count)
    shown = rng.randrange(count)
    lines = " ; ".join(f"let {name} = {value}" for name, value in zip(names, values))
    return f"{lines} ; show {names[shown]}", values[shown], values[:shown] + values[shown + 1 :]


def write_programs(rng: Random) -> str:
    """Write a document of one to four programs with their output, one per line."""
    programs = [sample_program(rng) for _ in range(rng.randint(1, 4))]
    return "\n".join(f"{program} > {output}" for program, output, _ in programs)


def sample_program_prompt(rng: Random) -> TaskPrompt:
    """Sample an instruction about a program; no demonstration, ranking or PPO prompt is like it."""
    program, output, others = sample_program(rng)
    facts = {"output": output, "others": others}
    return TaskPrompt(f"ask : what does this show ? {program} reply :", "program", json.dumps(facts))


def is_program_answered(prompt: TaskPrompt, response: str) -> bool:
    """Return whether a response names what the program shows, and no other of its values."""
    facts, words = json.loads(prompt.target), set(response.split())
    return facts["output"] in words and words.isdisjoint(facts["others"])
