"""Small runs over the word tokenizer: data files, a quiet trainer, weights to compare."""

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "enable_checkpointing": False}


def quiet_trainer(folder: Path, **settings: Any) -> L.Trainer:
    """Return a CPU trainer that prints nothing; set the global seed, so that new heads and adapters are the same."""
    torch.manual_seed(0)
    return L.Trainer(accelerator="cpu", default_root_dir=folder, **{**QUIET, "devices": 1, **settings})


def sgd(rate: float) -> Any:
    """Return plain gradient descent: an error in a gradient shows in the weights in proportion."""
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write JSON lines; return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(generator: random.Random, count: int) -> list[str]:
    """Draw words of the vocabulary."""
    return [f"w{generator.randrange(28)}" for _ in range(count)]


def demonstrations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return prompts of 1 to 6 words; the completion is the last of them, once or twice."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = words(generator, generator.randint(1, 6))
        rows.append({"prompt": " ".join(prompt), "completion": " ".join(prompt[-1:] * generator.randint(1, 2))})
    return rows


def rankings(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rankings of 3 to 5 completions of 4 words, by their number of w3; with ties."""
    generator = random.Random(seed)
    rows = []
    for _ in range(count):
        counts = [generator.randint(0, 4) for _ in range(generator.randint(3, 5))]
        if len(set(counts)) == 1:
            counts[0] = (counts[0] + 1) % 5
        completions = []
        for num_w3 in counts:
            others = [word for word in words(generator, 8) if word != "w3"][: 4 - num_w3]
            completion = ["w3"] * num_w3 + others
            generator.shuffle(completion)
            completions.append(" ".join(completion))
        prompt = " ".join(words(generator, generator.randint(1, 4)))
        rows.append({"prompt": prompt, "completions": completions, "ranks": [4 - num_w3 for num_w3 in counts]})
    return rows


def full_weights(module: nn.Module) -> list[Tensor]:
    """Return copies of all parameters, gathered where they are sharded."""
    return [
        (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()  # type: ignore[operator]
        for p in module.parameters()
    ]


def assert_same_weights(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-5) -> None:
    """Compare two models parameter by parameter."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def largest_change(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest change of a weight: comparing runs that did not train proves nothing."""
    return max(float((a - b).abs().max()) for a, b in zip(before, after))
