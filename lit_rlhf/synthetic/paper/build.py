"""Write the data of the paper's world to a folder: `python -m lit_rlhf.synthetic.paper.build FOLDER --seed 0`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.synthetic.build import (
    FEW_SHOT_PREFIXES,
    ModelShape,
    SyntheticDataPaths,
    make_rng,
    write_initial_model,
    write_rows,
)
from lit_rlhf.synthetic.knowledge import build_paper_vocabulary
from lit_rlhf.synthetic.paper.benchmarks import Sampler, sample_flan_exercise, sample_t0_exercise
from lit_rlhf.synthetic.paper.prompts import sample_instruction
from lit_rlhf.synthetic.paper.text import generate_paper_demonstrations, generate_paper_documents
from lit_rlhf.synthetic.second_language import build_second_vocabulary
from lit_rlhf.synthetic.tasks import TaskPrompt
from lit_rlhf.synthetic.text import write_few_shot_prefix
from lit_rlhf.synthetic.tokenizer import build_tokenizer

MAX_POSITIONS = 256  # few-shot prompts of the benchmarks
SHAPES = {  # about 0.1, 0.4 and 1.6 million parameters
    "small": ModelShape(64, 160),
    "medium": ModelShape(128, 320),
    "large": ModelShape(256, 640),
}
REWARD_SIZE = "medium"  # one reward model for all policies, of the middle size, as the paper's of 6B


@dataclass(frozen=True)
class PaperDataSizes:
    """The numbers of rows of the paper's world."""

    pretraining_documents: int = 60_000  # about 2.5 M tokens
    pretraining_validation_documents: int = 600
    demonstrations: int = 3_000
    demonstrations_validation: int = 256
    reward_prompts: int = 4_000
    ppo_prompts: int = 8_000
    evaluation_prompts: int = 512  # also the prompts of every other set of a section: an interval of about 0.04
    public_tasks: int = 3_000  # exercises of each public-style mixture


TINY_SIZES = PaperDataSizes(4_000, 60, 300, 32, 200, 256, 48, 300)
SIZES = {"full": PaperDataSizes(), "tiny": TINY_SIZES}


def build_paper_tokenizer() -> Any:
    """Build the tokenizer of the paper's world, with the words of both languages."""
    english = build_paper_vocabulary()
    return build_tokenizer([*english, *build_second_vocabulary(english)], MAX_POSITIONS)


def write_paper_data(out: Path, seed: int, sizes: PaperDataSizes = PaperDataSizes()) -> SyntheticDataPaths:
    """Write the data of `seed` into the folder `out`; the same seed and sizes give the same bytes.

    Besides the files of the quickstart's world: `flan.jsonl` and `t0.jsonl`, and a base model `base_init_SIZE` of each
    size of `SHAPES` (instead of `base_init`).
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = SyntheticDataPaths.in_folder(out)

    def documents(purpose: str, count: int) -> Iterator[dict[str, Any]]:
        return ({"text": text} for text in generate_paper_documents(make_rng(seed, purpose), count))

    def demonstrations(purpose: str, count: int) -> Iterator[dict[str, Any]]:
        for prompt, completion in generate_paper_demonstrations(make_rng(seed, purpose), count):
            yield {"prompt": prompt.text, "completion": completion, "task": prompt.task}

    def prompts(purpose: str, count: int, is_held_out: bool) -> Iterator[dict[str, Any]]:
        rng, texts = make_rng(seed, purpose), set[str]()
        while count:
            prompt = sample_instruction(rng, is_held_out)
            if not is_held_out or prompt.text not in texts:
                texts.add(prompt.text)
                count -= 1
                yield to_row(prompt)

    write_rows(paths.pretraining, documents("paper pretraining", sizes.pretraining_documents))
    write_rows(
        paths.pretraining_validation,
        documents("paper pretraining validation", sizes.pretraining_validation_documents),
    )
    write_rows(paths.demonstrations, demonstrations("paper demonstrations", sizes.demonstrations))
    write_rows(paths.demonstrations_validation, demonstrations("paper validation", sizes.demonstrations_validation))
    write_rows(paths.reward_prompts, prompts("paper reward", sizes.reward_prompts, False))
    write_rows(paths.ppo_prompts, prompts("paper ppo", sizes.ppo_prompts, False))
    write_rows(paths.evaluation_prompts, prompts("paper evaluation", sizes.evaluation_prompts, True))
    for name, sample in (("flan", sample_flan_exercise), ("t0", sample_t0_exercise)):
        write_rows(out / f"{name}.jsonl", generate_exercise_rows(make_rng(seed, name), sample, sizes.public_tasks))
    rng = make_rng(seed, "few shot")
    prefixes = [write_few_shot_prefix(rng) for _ in range(FEW_SHOT_PREFIXES)]
    paths.few_shot.write_text(json.dumps({"prefixes": prefixes}, indent=1) + "\n")
    tokenizer = build_paper_tokenizer()
    for size, shape in SHAPES.items():
        write_initial_model(out / f"base_init_{size}", seed, tokenizer, shape)
    return paths


def generate_exercise_rows(rng: Random, sample: Sampler, count: int) -> Iterator[dict[str, Any]]:
    """Yield exercises as demonstrations."""
    for _ in range(count):
        exercise = sample(rng)
        yield {"prompt": exercise.context, "completion": exercise.answer}


def to_row(prompt: TaskPrompt) -> dict[str, Any]:
    """Return a row of a prompt file."""
    return {"prompt": prompt.text, "task": prompt.task, "target": prompt.target}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write the data of the paper's world")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", choices=sorted(SIZES), default="full")
    arguments = parser.parse_args()
    write_paper_data(arguments.out, arguments.seed, SIZES[arguments.scale])
