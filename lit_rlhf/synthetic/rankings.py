"""Comparison data: K = 4 to 9 completions a prompt, ranked by simulated labelers (§3.5)."""

import json
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.synthetic.labelers import Labeler, Response, ranking
from lit_rlhf.synthetic.sampling import complete
from lit_rlhf.synthetic.tasks import TaskPrompt

FEWEST, MOST = 4, 9
BASE_SHARE = 0.1  # of the completions; the rest is the SFT model's, as most of the paper's were


def read_prompts(path: Path, count: int | None = None) -> list[TaskPrompt]:
    """Return the prompts of a file of the world."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [TaskPrompt(row["prompt"], row["task"], row["target"]) for row in rows]


def sample_candidates(
    prompts: list[TaskPrompt], sft: Path, base: Path, seed: int, place: int
) -> list[tuple[TaskPrompt, list[Response]]]:
    """Return K completions for each prompt, K drawn from 4 to 9, mostly of the SFT model."""
    rng = Random(f"{seed} candidates {place}")
    wanted = [
        (number, rng.random() < BASE_SHARE) for number in range(len(prompts)) for _ in range(rng.randint(FEWEST, MOST))
    ]
    candidates: list[tuple[TaskPrompt, list[Response]]] = [(prompt, []) for prompt in prompts]
    for from_base, folder in ((False, sft), (True, base)):
        tokenizer = load_tokenizer(str(folder), ModelLoadingConfig())
        model = load_causal_lm(str(folder), tokenizer, ModelLoadingConfig()).eval()
        numbers = [number for number, which in wanted if which == from_base]
        texts = [prompts[number].text for number in numbers]
        completions = complete(model, tokenizer, texts, 1.0, seed, place, int(from_base))
        for number, response in zip(numbers, completions.responses):
            candidates[number][1].append(response)
    return candidates


def write_rankings(
    candidates: list[tuple[TaskPrompt, list[Response]]], labelers: list[Labeler], path: Path, seed: int
) -> None:
    """Have one labeler rank each prompt's completions, as most of the paper's comparisons were (§5.3)."""
    rng = Random(f"{seed} labelers")
    rows = []
    for prompt, responses in candidates:
        labeler = rng.choice(labelers)
        rows.append(ranking_row(prompt, responses, labeler))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def ranking_row(prompt: TaskPrompt, responses: list[Response], labeler: Labeler) -> dict[str, Any]:
    """Return one row of a comparison file."""
    return {
        "prompt": prompt.text,
        "completions": [response.text for response in responses],
        "ranks": ranking(labeler, prompt, responses),
        "labeler": labeler.name,
    }
