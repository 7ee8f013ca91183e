"""The quickstart: the whole procedure of the paper in the synthetic world, by the recipes that a user would run.

The recipes are copied into the run's folder with its paths written in, and each stage is `lit-rlhf fit -c` on its
copy, so that any stage can be repeated, changed or resumed by hand afterwards.
"""

import csv
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.evaluation.reports.quickstart_report import format_table, write_report
from lit_rlhf.models.export import make_directory
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.synthetic.build import WorldPaths, write_world
from lit_rlhf.synthetic.evaluate import Panel, best_of_n, evaluate_models, evaluate_reward_model, read_prefixes
from lit_rlhf.synthetic.labelers import Response, heldout_labelers, training_labelers
from lit_rlhf.synthetic.rankings import read_prompts, sample_candidates, write_rankings
from lit_rlhf.synthetic.tasks import TaskPrompt

DEFAULT_OUT = "runs/quickstart"  # what the shipped recipes say
UNSEEN_RANKINGS = 300
CURVES = {
    "pretraining": {"train/loss_step": "train/loss", "train/loss": "train/loss", "validation/loss": "validation/loss"},
    "sft": {"train/loss": "train/loss", "validation/loss": "validation/loss", "pretraining/loss": "pretraining/loss"},
    "reward": {"train/loss": "train/loss", "validation/accuracy": "validation/accuracy"},
}
PPO_CURVES = (
    "reward/score",
    "reward/kl",
    "reward/kl_coefficient",
    "policy/entropy_estimate",
    "policy/clip_fraction",
    "value/explained_variance",
    "response/length",
    "pretraining/loss",
)


def run(out: Path, seed: int) -> int:
    """Run every stage, write `report.json` and `report.html` into `out`, print the table; return the exit code."""
    stages: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    recipes, fresh = train_models(out, seed, stages)
    paths, base = WorldPaths.under(out / "world"), out / "pretraining" / "model"
    fit(recipes, "ppo", seed, stages)
    fit(recipes, "ppo_ptx", seed, stages)
    report: dict[str, Any] = {"seed": seed, "stages": stages, "versions": versions()}
    with timed("evaluation", stages, "compare base, few-shot, SFT, PPO and PPO-ptx on unseen prompts"):
        report["reward_model"] = evaluate_reward_model(
            out / "reward" / "model", fresh, training_labelers(seed), heldout_labelers(seed)
        )
        report["models"], report["greedy"], report["tasks"], report["samples"] = evaluate_models(
            panel(out, paths, seed),
            {"base": base, "few_shot": base} | {n: out / n / "model" for n in ("sft", "ppo", "ppo_ptx")},
            paths.pretraining_validation,
        )
        report["best_of_n"] = best_of_n(out, paths.ppo_prompts, seed)
    report["curves"] = {
        stage: read_curves(out / stage, stage) for stage in ("pretraining", "sft", "reward", "ppo", "ppo_ptx")
    }
    report["seconds_total"] = time.perf_counter() - start
    # ru_maxrss counts bytes on macOS and kibibytes elsewhere
    report["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**30 if sys.platform == "darwin" else 2**20
    )
    write_report(report, out / "report.json", out / "report.html")
    print(format_table(report))
    print(f"\nreport: {out / 'report.html'}")
    return 0


def train_models(
    out: Path, seed: int, stages: dict[str, dict[str, float]]
) -> tuple[dict[str, Path], list[tuple[TaskPrompt, list[Response]]]]:
    """Run the stages up to the reward model; return the run's recipes, and the completions of unseen rankings."""
    make_directory(out)
    paths = WorldPaths.under(out / "world")
    with timed("data", stages, "write a world: text, demonstrations, prompts, labelers"):
        write_world(out / "world", seed)
        recipes = copy_recipes(out)
    fit(recipes, "pretraining", seed, stages)
    fit(recipes, "sft", seed, stages)
    with timed("ranking", stages, "sample completions and have labelers rank them"):
        labelers, folders = training_labelers(seed), (out / "sft" / "model", out / "pretraining" / "model")
        seen = sample_candidates(read_prompts(paths.reward_prompts), *folders, seed, 1)
        write_rankings(seen, labelers, out / "world" / "rankings.jsonl", seed)
        fresh = sample_candidates(read_prompts(paths.evaluation_prompts, UNSEEN_RANKINGS), *folders, seed, 2)
        write_rankings(fresh, labelers, out / "world" / "rankings_validation.jsonl", seed + 1)
    fit(recipes, "reward", seed, stages)
    return recipes, fresh


def copy_recipes(out: Path) -> dict[str, Path]:
    """Copy the quickstart's recipes into the run's folder, with its paths in place of the default ones."""
    make_directory(out / "recipes")
    copies = {}
    for source in (files("lit_rlhf") / "recipes" / "quickstart").iterdir():
        target = out / "recipes" / source.name
        target.write_text(source.read_text().replace(DEFAULT_OUT, str(out)))
        copies[target.stem] = target
    return copies


def fit(recipes: dict[str, Path], stage: str, seed: int, stages: dict[str, dict[str, float]]) -> None:
    """Run one stage through the public command."""
    from lit_rlhf.cli import main

    arguments = command(recipes[stage], seed)
    with timed(stage, stages, f"lit-rlhf {' '.join(arguments)}"):
        code = main(arguments)
        if code:
            raise SystemExit(code)


def command(recipe: Path, seed: int) -> list[str]:
    """Return the arguments of `lit-rlhf` that run a stage."""
    return ["fit", "-c", str(recipe), f"--seed_everything={seed}", f"--data.seed={seed}"]


@contextmanager
def timed(stage: str, stages: dict[str, dict[str, float]], what: str) -> Iterator[None]:
    """Say what happens and keep its seconds."""
    print(f"\n== {stage}: {what}", flush=True)
    start = time.perf_counter()
    yield
    stages[stage] = {"seconds": time.perf_counter() - start}
    print(f"== {stage}: {stages[stage]['seconds']:.0f} s", flush=True)


def panel(out: Path, paths: WorldPaths, seed: int) -> Panel:
    """Load what the models are compared with."""
    sft = str(out / "sft" / "model")
    tokenizer = load_tokenizer(sft, ModelLoadingConfig())
    return Panel(
        prompts=read_prompts(paths.evaluation_prompts),
        prefixes=read_prefixes(paths.few_shot),
        labelers=heldout_labelers(seed),
        tokenizer=tokenizer,
        sft=load_causal_lm(sft, tokenizer, ModelLoadingConfig()).eval(),
        reward_model=load_scalar_model(str(out / "reward" / "model"), tokenizer, ModelLoadingConfig()).eval(),
        seed=seed,
    )


def read_curves(folder: Path, stage: str) -> dict[str, list[list[float]]]:
    """Return `metric: [[step, value], …]` from the stage's metrics.csv, at most about 200 points a curve."""
    names = CURVES.get(stage) or {name: name for name in PPO_CURVES}
    place = "step" if stage in CURVES else "epoch"  # an epoch of PPO is an iteration
    curves: dict[str, list[list[float]]] = defaultdict(list)
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for column, name in names.items():
                if row.get(column):
                    curves[name].append([float(row[place]), float(row[column])])
    return {name: points[:: max(len(points) // 200, 1)] for name, points in curves.items()}


def versions() -> dict[str, str]:
    """Return what the figures were made with."""
    packages = ("lit-rlhf", "torch", "lightning", "transformers")
    return {"python": platform.python_version(), "threads": str(torch.get_num_threads())} | {
        p: version(p) for p in packages
    }
