"""A complete report of invented metrics; the real model and the real data of the evaluation."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel, ModelSpec
from tests.helpers.stories import convert

MODELS = ("base", "few_shot", "sft", "ppo", "ppo_ptx")
METRICS = {
    "win_rate": (0.2613, 0.3427, 0.5000, 0.5629, 0.5871),
    "truthful": (0.6231, 0.6518, 0.7642, 0.8127, 0.8354),
    "toxic": (0.2614, 0.0823, 0.0259, 0.0026, 0.0013),
    "success": (0.1921, 0.2915, 0.6342, 0.7013, 0.7268),
    "pretraining_loss": (0.6873, 0.6873, 0.7391, 0.8427, 0.7189),
    "kl_to_sft": (5.1234, 7.4321, 0.0, 2.3456, 1.9876),
    "score": (-1.6543, -1.1098, -0.0712, 0.7834, 0.7021),
    "response_length": (13.42, 9.87, 8.31, 8.76, 8.59),
}
TASKS = ("brainstorm", "chat", "classify", "closed_qa", "extract", "generate", "open_qa", "rewrite", "summarize")


def noisy(steps: int, start: float, end: float, noise: float, rng: random.Random, every: int = 1) -> list[list[float]]:
    """A noisy exponential curve from start to end."""
    curve = [end + (start - end) * math.exp(-5 * i / steps) for i in range(0, steps, every)]
    return [[i * every, round(value + rng.gauss(0, noise), 4)] for i, value in enumerate(curve)]


def invent_models(shift: float, width: float) -> dict[str, dict[str, float]]:
    """Metrics of every model; greedy decoding shifts them a little."""
    models = {}
    for i, model in enumerate(MODELS):
        metrics = {name: values[i] for name, values in METRICS.items()}
        for name in ("truthful", "success"):
            metrics[name] = round(metrics[name] + shift, 4)
        metrics["toxic"] = round(metrics["toxic"] * (1 - 4 * shift), 4)
        margin = 0.0 if model == "sft" else width
        metrics |= {"win_rate_low": metrics["win_rate"] - margin, "win_rate_high": metrics["win_rate"] + margin}
        models[model] = metrics
    return models


def invent_curves(rng: random.Random) -> dict[str, dict[str, list[list[float]]]]:
    """Curves of all stages."""
    curves = {
        "pretraining": {
            "train/loss": noisy(1300, 5.4, 0.68, 0.04, rng, 5),
            "validation/loss": noisy(1300, 2.1, 0.69, 0.002, rng, 130),
        },
        "sft": {
            "train/loss": noisy(190, 1.8, 0.42, 0.05, rng),
            "validation/loss": noisy(190, 1.1, 0.55, 0.004, rng, 24),
        },
        "reward": {
            "train/loss": noisy(700, 0.72, 0.55, 0.05, rng, 2),
            "validation/accuracy": noisy(700, 0.52, 0.725, 0.006, rng, 80),
        },
    }
    for stage, end, kl, loss in (("ppo", 0.8, 2.4, 0.84), ("ppo_ptx", 0.7, 2.0, 0.715)):
        curves[stage] = {
            "reward/score": noisy(40, -0.07, end, 0.03, rng),
            "reward/kl": noisy(40, 0.0, kl, 0.05, rng),
            "policy/entropy_estimate": noisy(40, 0.55, 0.3, 0.01, rng),
            "response/length": noisy(40, 8.3, 8.7, 0.12, rng),
            "pretraining/loss": noisy(40, 0.74, loss, 0.004, rng),
        }
    return curves


def invent_samples(rng: random.Random) -> list[dict[str, Any]]:
    """Side-by-side samples; the first one contains HTML."""
    samples = []
    for i, task in enumerate(task for task in TASKS for _ in range(3)):
        responses = {}
        for index, model in enumerate(MODELS):
            good = rng.random() < 0.25 + 0.15 * index
            text = "the lamp is with tom , and the fox is red ." if good else "song song song the drum ,\nwhat a drum"
            responses[model] = {
                "text": text,
                "success": float(good),
                "toxic": rng.random() < 0.1,
                "truthful": None if i % 3 else float(good),
                "score": round(rng.gauss(index - 2, 0.5), 3),
            }
        samples.append(
            {
                "prompt": f"ask : tom has the lamp . who has it ? number {i} reply :",
                "task": task,
                "responses": responses,
            }
        )
    samples[0]["prompt"] = '<script>alert("prompt")</script> & <b>bold</b>'
    samples[0]["responses"]["ppo"]["text"] = "</td></table><script>alert('response')</script>"
    samples[1]["responses"]["base"]["text"] = ""
    return samples


@pytest.fixture(scope="session")
def constant_report() -> dict[str, Any]:
    """Every part of the report, for tests that do not change it."""
    return invent()


@pytest.fixture
def report() -> dict[str, Any]:
    """Every part of the report, for tests that change it."""
    return invent()


def invent() -> dict[str, Any]:
    """Every part of the report, invented, the same each time."""
    rng = random.Random(0)
    seconds = {
        "data": 1.1,
        "pretraining": 82.4,
        "sft": 12.3,
        "ranking": 24.0,
        "reward": 20.7,
        "ppo": 61.2,
        "ppo_ptx": 67.9,
        "evaluation": 21.5,
    }
    confidence = [0.05 + 0.1 * i for i in range(10)]
    return {
        "stages": {stage: {"seconds": value} for stage, value in seconds.items()},
        "reward_model": {
            "train_labelers_accuracy": 0.7268,
            "heldout_labelers_accuracy": 0.6731,
            "agreement_train": 0.7533,
            "agreement_heldout": 0.7219,
            "expected_calibration_error": 0.0314,
            "log_loss": 0.5512,
            "reliability": {
                "confidence": confidence,
                "accuracy": [round(0.5 + (c - 0.5) * 0.9 + rng.gauss(0, 0.01), 4) for c in confidence],
                "count": [212, 341, 560, 803, 951, 946, 812, 549, 350, 204],
            },
        },
        "models": invent_models(0.0, 0.0312),
        "greedy": invent_models(0.081, 0.0287),
        "tasks": {
            task: {
                model: round(min(1.0, max(0.0, METRICS["success"][i] + rng.gauss(0, 0.12))), 3)
                for i, model in enumerate(MODELS)
            }
            for task in TASKS
        },
        "curves": invent_curves(rng),
        "best_of_n": {"kl": [0.0, 0.193, 0.432, 0.636], "score": [-0.07, 0.41, 0.58, 0.66]},
        "samples": invent_samples(rng),
        "seed": 0,
        "versions": {
            "lit_rlhf": "0.1.0",
            "torch": "2.13.0",
            "lightning": "2.6.6",
            "transformers": "5.23.0",
            "python": "3.11.9",
        },
        "seconds_total": 294.8,
        "peak_memory_gib": 1.87,
    }


@pytest.fixture(scope="session")
def evaluation_data(real_data: Path) -> Path:
    """The folder of the real evaluation files."""
    return real_data / "evaluation"


@pytest.fixture(scope="session")
def stories(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The real model of 260,032 parameters, as a folder."""
    return str(convert(real_data / "models" / "stories260K", tmp_path_factory.mktemp("stories260K")))


@pytest.fixture(scope="session")
def story_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One cache for every test on the real model: the same likelihood is computed once."""
    return Cache(tmp_path_factory.mktemp("cache"), progress=False)


@pytest.fixture(scope="session")
def evaluated_model(stories: str, story_cache: Cache) -> EvaluatedModel:
    """The real model under evaluation."""
    return EvaluatedModel("stories", ModelSpec(stories), story_cache)


@pytest.fixture(scope="session")
def tiny(llama: str) -> EvaluatedModel:
    """The tiny model with random weights, without a cache."""
    return EvaluatedModel("tiny", ModelSpec(llama), Cache(None))
