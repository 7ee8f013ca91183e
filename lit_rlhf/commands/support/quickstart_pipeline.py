"""The quickstart: all stages of the paper on synthetic data, with the shipped recipes.

The recipes are copied into the folder of the run, with its paths in them, and each stage is `lit-rlhf fit -c` on its
copy. So every stage can be repeated, changed or resumed by hand.
"""

import csv
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.callbacks.throughput import read_peak_memory
from lit_rlhf.commands.support.report_runs import make_loggers, open_run, read_loggers
from lit_rlhf.evaluation.reports.quickstart_report import format_table, write_report
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input
from lit_rlhf.lineage.writing import Start, make_record, write_output_record
from lit_rlhf.loggers import log_page, log_table
from lit_rlhf.models.export import make_directory
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.synthetic.build import SyntheticDataPaths, write_synthetic_data
from lit_rlhf.synthetic.evaluate import (
    EvaluationContext,
    evaluate_best_of_n,
    evaluate_models,
    evaluate_reward_model,
    read_few_shot_prefixes,
)
from lit_rlhf.synthetic.labelers import Response, build_heldout_labelers, build_training_labelers
from lit_rlhf.synthetic.rankings import read_prompts, sample_completions, write_rankings
from lit_rlhf.synthetic.tasks import TaskPrompt

DEFAULT_OUT = "runs/quickstart"  # the folder in the shipped recipes
STAGES = ("pretraining", "sft", "reward", "ppo", "ppo-ptx")  # training stages: recipes and folders of the run
NUM_UNSEEN_RANKINGS = 300
# metric in metrics.csv -> metric in the report, per stage that logs by step
CURVES = {
    "pretraining": {"train/loss_step": "train/loss", "train/loss": "train/loss", "validation/loss": "validation/loss"},
    "sft": {"train/loss": "train/loss", "validation/loss": "validation/loss", "pretraining/loss": "pretraining/loss"},
    "reward": {"train/loss": "train/loss", "validation/accuracy": "validation/accuracy"},
}
PPO_CURVES = (  # logged by iteration
    "reward/score",
    "reward/kl",
    "reward/kl_coefficient",
    "policy/entropy_estimate",
    "policy/clip_fraction",
    "value/explained_variance",
    "response/length",
    "pretraining/loss",
)


def run(out: Path, seed: int, overlays: Sequence[str] = ()) -> int:
    """Run every stage, write `report.json` and `report.html` to `out`, print the table; return the exit code.

    Args:
        out: folder of the run.
        seed: of data, models and runs.
        overlays: recipes for one more `-c` of every stage.
    """
    seconds: dict[str, dict[str, float]] = {}
    start = time.perf_counter()
    recipes, unseen_rankings = train_models(out, seed, seconds, overlays)
    paths, base = SyntheticDataPaths.in_folder(out / "world"), out / "pretraining" / "model"
    fit_stage(recipes, "ppo", seed, seconds, overlays)
    fit_stage(recipes, "ppo-ptx", seed, seconds, overlays)
    report: dict[str, Any] = {"seed": seed, "stages": seconds, "versions": collect_versions()}
    with time_stage("evaluation", seconds, "compare base, few-shot, SFT, PPO and PPO-ptx on unseen prompts"):
        report["reward_model"] = evaluate_reward_model(
            out / "reward" / "model", unseen_rankings, build_training_labelers(seed), build_heldout_labelers(seed)
        )
        report["models"], report["greedy"], report["tasks"], report["samples"] = evaluate_models(
            load_evaluation_context(out, paths, seed),
            {"base": base, "few_shot": base}
            | {to_report_key(stage): out / stage / "model" for stage in ("sft", "ppo", "ppo-ptx")},
            paths.pretraining_validation,
        )
        report["best_of_n"] = evaluate_best_of_n(out, paths.ppo_prompts, seed)
    report["curves"] = {to_report_key(stage): read_curves(out / stage, stage) for stage in STAGES}
    report["seconds_total"] = time.perf_counter() - start
    report["peak_memory_gib"] = read_peak_memory(torch.device("cpu"))
    write_report(report, out / "report.json", out / "report.html")
    log_quickstart(report, out, read_loggers([str(recipes["ppo"]), *overlays]))
    print(format_table(report))
    print(f"\nreport: {out / 'report.html'}")
    return 0


def log_quickstart(report: dict[str, Any], out: Path, setting: Any) -> None:
    """Log the comparison of the models, their samples and the page, where the stages log.

    Args:
        report: as in report.json.
        out: folder of the run.
        setting: the stages' `trainer.logger`.
    """
    folder = out / "evaluation"
    loggers, config = make_loggers(setting, folder), {"seed": report["seed"], "versions": report["versions"]}
    with open_run(loggers, folder, folder.name, [], [], config):
        names = dict.fromkeys(metric for row in report["models"].values() for metric in row)
        rows = [
            {"model": model, **{metric: row.get(metric) for metric in names}} for model, row in report["models"].items()
        ]
        log_table(loggers, "quickstart/models", rows)
        log_page(loggers, "quickstart/report", out / "report.html")


def train_models(
    out: Path, seed: int, seconds: dict[str, dict[str, float]], overlays: Sequence[str] = ()
) -> tuple[dict[str, Path], list[tuple[TaskPrompt, list[Response]]]]:
    """Run the stages up to the reward model.

    Args:
        out: folder of the run.
        seed: of data, models and runs.
        seconds: filled with report key -> {"seconds": duration}.
        overlays: see `run`.

    Returns:
        the recipes of the run by stage name, and prompts with completions for the unseen rankings.
    """
    make_directory(out)
    paths = SyntheticDataPaths.in_folder(out / "world")
    with time_stage("data", seconds, "write text, demonstrations and prompts"):
        write_synthetic_data(out / "world", seed)
        recipes = copy_recipes(out)
    fit_stage(recipes, "pretraining", seed, seconds, overlays)
    fit_stage(recipes, "sft", seed, seconds, overlays)
    with time_stage("ranking", seconds, "sample completions and have labelers rank them"):
        start = Start.now()
        labelers, folders = build_training_labelers(seed), (out / "sft" / "model", out / "pretraining" / "model")
        training_rankings = sample_completions(read_prompts(paths.reward_prompts), *folders, seed, 1)
        write_rankings(training_rankings, labelers, out / "world" / "rankings.jsonl", seed)
        unseen_rankings = sample_completions(
            read_prompts(paths.evaluation_prompts, NUM_UNSEEN_RANKINGS), *folders, seed, 2
        )
        write_rankings(unseen_rankings, labelers, out / "world" / "rankings_validation.jsonl", seed + 1)
        for name, prompts in (("rankings", paths.reward_prompts), ("rankings_validation", paths.evaluation_prompts)):
            file = out / "world" / f"{name}.jsonl"
            models = [describe_model_input("sampled model", str(folder)) for folder in folders]
            data = [describe_data_input("prompts", str(prompts))]
            record = make_record("samples", start, models, data, recipe={}, command="lit-rlhf quickstart", seed=seed)
            write_output_record(record, file, [file])
    fit_stage(recipes, "reward", seed, seconds, overlays)
    return recipes, unseen_rankings


def to_report_key(stage: str) -> str:
    """Return the key of a stage in report.json, an identifier for the templates."""
    return stage.replace("-", "_")


def copy_recipes(out: Path) -> dict[str, Path]:
    """Copy the quickstart recipes to the folder of the run, with its paths; return them by recipe name."""
    make_directory(out / "recipes")
    copies = {}
    for source in (files("lit_rlhf") / "recipes" / "quickstart").iterdir():
        target = out / "recipes" / source.name
        target.write_text(source.read_text().replace(DEFAULT_OUT, str(out)))
        copies[target.stem] = target
    return copies


def fit_stage(
    recipes: dict[str, Path],
    stage: str,
    seed: int,
    seconds: dict[str, dict[str, float]],
    overlays: Sequence[str] = (),
) -> None:
    """Run `lit-rlhf fit` for one of `STAGES`, and time it.

    Args:
        recipes: the recipes of the run by name.
        stage: one of `STAGES`.
        seed: of the run and of its data.
        seconds: filled with report key -> {"seconds": duration}.
        overlays: see `run`.
    """
    from lit_rlhf.cli import main

    arguments = build_fit_arguments(recipes[stage], seed, overlays)
    with time_stage(stage, seconds, f"lit-rlhf {' '.join(arguments)}"):
        code = main(arguments)
        if code:
            raise SystemExit(code)


def build_fit_arguments(recipe: Path, seed: int, overlays: Sequence[str] = ()) -> list[str]:
    """Return the arguments of `lit-rlhf` for a stage, which replaces that of an earlier quickstart in the folder."""
    merged = [word for path in (str(recipe), *overlays) for word in ("-c", path)]
    return ["fit", *merged, f"--seed_everything={seed}", f"--data.seed={seed}", "--overwrite"]


@contextmanager
def time_stage(stage: str, seconds: dict[str, dict[str, float]], description: str) -> Iterator[None]:
    """Print the start and the duration of a stage, and add the duration to `seconds`."""
    print(f"\n== {stage}: {description}", flush=True)
    start = time.perf_counter()
    yield
    duration = time.perf_counter() - start
    seconds[to_report_key(stage)] = {"seconds": duration}
    print(f"== {stage}: {duration:.0f} s", flush=True)


def load_evaluation_context(out: Path, paths: SyntheticDataPaths, seed: int) -> EvaluationContext:
    """Load the prompts, labelers and models for `evaluate_models`."""
    sft = str(out / "sft" / "model")
    tokenizer = load_tokenizer(sft, ModelLoadingConfig())
    return EvaluationContext(
        prompts=read_prompts(paths.evaluation_prompts),
        prefixes=read_few_shot_prefixes(paths.few_shot),
        labelers=build_heldout_labelers(seed),
        tokenizer=tokenizer,
        sft=load_causal_lm(sft, tokenizer, ModelLoadingConfig()).eval(),
        reward_model=load_scalar_model(str(out / "reward" / "model"), tokenizer, ModelLoadingConfig()).eval(),
        seed=seed,
    )


def read_curves(folder: Path, stage: str) -> dict[str, list[list[float]]]:
    """Read `metric: [[step, value], …]` from the metrics.csv of a stage, about 200 points per curve at most."""
    names = CURVES.get(stage) or {name: name for name in PPO_CURVES}
    x_axis = "step" if stage in CURVES else "epoch"  # an epoch of PPO is an iteration
    curves: dict[str, list[list[float]]] = defaultdict(list)
    with open(folder / "metrics.csv") as file:
        for row in csv.DictReader(file):
            for column, name in names.items():
                if row.get(column):
                    curves[name].append([float(row[x_axis]), float(row[column])])
    return {name: points[:: max(len(points) // 200, 1)] for name, points in curves.items()}


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and packages, and the number of threads."""
    packages = ("lit-rlhf", "torch", "lightning", "transformers")
    return {"python": platform.python_version(), "threads": str(torch.get_num_threads())} | {
        p: version(p) for p in packages
    }
