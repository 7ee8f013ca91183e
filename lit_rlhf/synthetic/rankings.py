"""Comparison data: K = 4 to 9 completions per prompt, ranked by simulated labelers (§3.5)."""

import json
from pathlib import Path
from random import Random
from typing import Any

from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.synthetic.labelers import Labeler, Response, rank_responses
from lit_rlhf.synthetic.sampling import complete_prompts
from lit_rlhf.synthetic.tasks import TaskPrompt

MIN_COMPLETIONS, MAX_COMPLETIONS = 4, 9
BASE_MODEL_FRACTION = 0.1  # of the completions; the others are from the SFT model, as most of the paper's are


def read_prompts(path: Path, count: int | None = None) -> list[TaskPrompt]:
    """Read the first `count` prompts of a synthetic prompt file, by default all."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [TaskPrompt(row["prompt"], row["task"], row["target"]) for row in rows]


def sample_completions(
    prompts: list[TaskPrompt], sft: Path, base: Path, seed: int, stream: int
) -> list[tuple[TaskPrompt, list[Response]]]:
    """Sample K completions for each prompt, K from 4 to 9, mostly with the SFT model.

    Args:
        prompts: the prompts.
        sft: folder of the SFT model.
        base: folder of the base model, which writes the other completions.
        seed: of K, of the choice of model and of sampling.
        stream: number of the random stream; calls with different prompts use different ones.
    """
    rng = Random(f"{seed} candidates {stream}")
    sources = [
        (number, rng.random() < BASE_MODEL_FRACTION)
        for number in range(len(prompts))
        for _ in range(rng.randint(MIN_COMPLETIONS, MAX_COMPLETIONS))
    ]
    candidates: list[tuple[TaskPrompt, list[Response]]] = [(prompt, []) for prompt in prompts]
    for from_base, folder in ((False, sft), (True, base)):
        tokenizer = load_tokenizer(str(folder), ModelLoadingConfig())
        model = load_causal_lm(str(folder), tokenizer, ModelLoadingConfig()).eval()
        numbers = [number for number, is_base in sources if is_base == from_base]
        texts = [prompts[number].text for number in numbers]
        completions = complete_prompts(model, tokenizer, texts, 1.0, seed, stream, int(from_base))
        for number, response in zip(numbers, completions.responses):
            candidates[number][1].append(response)
    return candidates


def write_rankings(
    candidates: list[tuple[TaskPrompt, list[Response]]], labelers: list[Labeler], path: Path, seed: int
) -> None:
    """Write one ranking per prompt, by a random labeler, as for most comparisons of the paper (§5.3)."""
    rng = Random(f"{seed} labelers")
    rows = []
    for prompt, responses in candidates:
        labeler = rng.choice(labelers)
        rows.append(make_ranking_row(prompt, responses, labeler))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_ranking_row(prompt: TaskPrompt, responses: list[Response], labeler: Labeler) -> dict[str, Any]:
    """Return one row of a comparison file: the completions and their ranks by `labeler`."""
    return {
        "prompt": prompt.text,
        "completions": [response.text for response in responses],
        "ranks": rank_responses(labeler, prompt, responses),
        "labeler": labeler.name,
    }
