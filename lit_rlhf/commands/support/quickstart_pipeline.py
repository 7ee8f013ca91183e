"""The quickstart: all stages of the paper on synthetic data, with the shipped recipes.

The recipes are copied into the folder of the run, with its paths in them, and each stage is `lit-rlhf fit -c` on its
copy. So every stage can be repeated, changed or resumed by hand.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.console import terminal_width
from lit_rlhf.commands.support.recipe_copies import copy_shipped_recipes
from lit_rlhf.commands.support.report_runs import make_loggers, open_run, read_loggers
from lit_rlhf.commands.support.stage_runner import (
    StageRunner,
    StageState,
    describe_command,
    fit,
    format_values,
    read_curves,
    read_last_values,
    say,
)
from lit_rlhf.commands.support.sweep_recipes import compose_config
from lit_rlhf.evaluation.reports.quickstart_report import TERMINAL_WIDTH, format_table, write_report
from lit_rlhf.lineage.environment import read_versions
from lit_rlhf.lineage.fingerprints import describe_data_input, describe_model_input
from lit_rlhf.lineage.writing import Start, make_record, write_output_record
from lit_rlhf.loggers import log_page, log_table
from lit_rlhf.models.export import make_directory
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.synthetic.build import SyntheticDataPaths, SyntheticDataSizes, write_synthetic_data
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
# metric in metrics.csv -> its name in the line of a finished stage
HEADLINES = {
    "pretraining": {"validation/loss": "validation/loss"},
    "sft": {"validation/loss": "validation/loss"},
    "reward": {"validation/accuracy": "validation/accuracy"},
    "ppo": {"reward/score": "score", "reward/kl": "KL"},
    "ppo-ptx": {"reward/score": "score", "reward/kl": "KL"},
}


class Scale(NamedTuple):
    """How much data and training a quickstart takes."""

    name: str
    sizes: SyntheticDataSizes
    num_unseen_rankings: int
    best_of_prompts: int
    arguments: dict[str, tuple[str, ...]]  # stage -> further arguments of `lit-rlhf fit`


FULL = Scale("full", SyntheticDataSizes(), 300, 256, {})  # standard error of a best-of-n score: about 0.03
_TINY_PPO = ("--trainer.max_epochs=6", "--model.ppo.rollout_batch_size=128", "--trainer.log_every_n_steps=2")
TINY = Scale(  # half the batches: with so few tokens, more steps teach more
    "tiny",
    SyntheticDataSizes(
        pretraining_documents=6_000,
        pretraining_validation_documents=120,
        demonstrations=800,
        demonstrations_validation=64,
        reward_prompts=400,
        ppo_prompts=1_024,
        evaluation_prompts=160,
    ),
    num_unseen_rankings=64,
    best_of_prompts=32,
    arguments={
        "pretraining": ("--trainer.max_steps=280", "--trainer.val_check_interval=280", "--data.micro_batch_size=8"),
        "sft": ("--trainer.max_epochs=2", "--data.micro_batch_size=16"),
        "reward": ("--trainer.val_check_interval=1.0",),
        "ppo": _TINY_PPO,
        "ppo-ptx": _TINY_PPO,
    },
)


def run(out: Path, seed: int, overlays: Sequence[str] = (), scale: Scale = FULL) -> int:
    """Run every stage, write `report.json` and `report.html` to `out`, print the table; return the exit code.

    Args:
        out: folder of the run.
        seed: of data, models and runs.
        overlays: recipes for one more `-c` of every stage.
        scale: how much data and training.

    Raises:
        UserError: see `check_overlays`.
    """
    check_overlays(seed, overlays, scale)
    runner, start = StageRunner(out), time.perf_counter()
    runner.start_over()
    note = " Tiny: to see the procedure at work, trained too little for results." if scale.name == "tiny" else ""
    say(f"InstructGPT's procedure in a synthetic world, seed {seed}, in {out}.{note}")
    recipes, unseen_rankings = train_models(out, seed, runner, overlays, scale)
    paths, base = SyntheticDataPaths.in_folder(out / "world"), out / "pretraining" / "model"
    fit_stage(recipes, "ppo", seed, runner, overlays, scale)
    fit_stage(recipes, "ppo-ptx", seed, runner, overlays, scale)

    def evaluate(state: StageState) -> dict[str, Any]:
        part: dict[str, Any] = {}
        part["reward_model"] = evaluate_reward_model(
            out / "reward" / "model", unseen_rankings, build_training_labelers(seed), build_heldout_labelers(seed)
        )
        part["models"], part["greedy"], part["tasks"], part["samples"] = evaluate_models(
            load_evaluation_context(out, paths, seed),
            {"base": base, "few_shot": base}
            | {to_report_key(stage): out / stage / "model" for stage in ("sft", "ppo", "ppo-ptx")},
            paths.pretraining_validation,
        )
        part["best_of_n"] = evaluate_best_of_n(out, paths.ppo_prompts, scale.best_of_prompts, seed)
        ppo, ppo_ptx = (part["models"][model]["win_rate"] for model in ("ppo", "ppo_ptx"))
        state.headline = f"win rate over SFT: PPO {ppo:.3f}, PPO-ptx {ppo_ptx:.3f}"
        return part

    description = "compare base, few-shot, SFT, PPO and PPO-ptx on unseen prompts"
    evaluation = runner.run("evaluation", evaluate, description)
    stages = {to_report_key(stage): {"seconds": seconds} for stage, seconds in runner.seconds.items()}
    report: dict[str, Any] = {"seed": seed, "stages": stages, "versions": collect_versions(), "scale": scale.name}
    report |= evaluation
    report["curves"] = {to_report_key(stage): read_stage_curves(out / stage, stage) for stage in STAGES}
    report["seconds_total"] = time.perf_counter() - start
    report["peak_memory_gib"] = runner.peak_memory_gib
    write_report(report, out / "report.json", out / "report.html")
    log_quickstart(report, out, read_loggers([str(recipes["ppo"]), *overlays]))
    print(f"\n{format_table(report, terminal_width(sys.stdout) or TERMINAL_WIDTH)}")
    model = shlex.quote(str(out / "ppo-ptx" / "model"))
    print(f"\nreport: {out / 'report.html'}\nnext: lit-rlhf generate --model {model}")
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
    out: Path, seed: int, runner: StageRunner, overlays: Sequence[str] = (), scale: Scale = FULL
) -> tuple[dict[str, Path], list[tuple[TaskPrompt, list[Response]]]]:
    """Run the stages up to the reward model.

    Args:
        out: folder of the run.
        seed: of data, models and runs.
        runner: runs the stages, of which none is done.
        overlays: see `run`.
        scale: how much data and training.

    Returns:
        the recipes of the run by stage name, and prompts with completions for the unseen rankings.
    """
    make_directory(out)
    paths = SyntheticDataPaths.in_folder(out / "world")
    recipes = copy_recipes(out)
    unseen_rankings: list[tuple[TaskPrompt, list[Response]]] = []

    def write_data(state: StageState) -> None:
        write_synthetic_data(out / "world", seed, scale.sizes)
        texts, demonstrations = scale.sizes.pretraining_documents, scale.sizes.demonstrations
        state.headline = f"{texts:,} texts, {demonstrations:,} demonstrations, {scale.sizes.ppo_prompts:,} prompts"

    def rank(state: StageState) -> None:
        start = Start.now()
        labelers, folders = build_training_labelers(seed), (out / "sft" / "model", out / "pretraining" / "model")
        training_rankings = sample_completions(read_prompts(paths.reward_prompts), *folders, seed, 1)
        write_rankings(training_rankings, labelers, out / "world" / "rankings.jsonl", seed)
        prompts = read_prompts(paths.evaluation_prompts, scale.num_unseen_rankings)
        unseen_rankings.extend(sample_completions(prompts, *folders, seed, 2))
        write_rankings(unseen_rankings, labelers, out / "world" / "rankings_validation.jsonl", seed + 1)
        for name, source in (("rankings", paths.reward_prompts), ("rankings_validation", paths.evaluation_prompts)):
            file = out / "world" / f"{name}.jsonl"
            models = [describe_model_input("sampled model", str(folder)) for folder in folders]
            data = [describe_data_input("prompts", str(source))]
            record = make_record("samples", start, models, data, recipe={}, command="lit-rlhf quickstart", seed=seed)
            write_output_record(record, file, [file])
        count = sum(len(responses) for _, responses in training_rankings)
        state.headline = f"{len(training_rankings):,} rankings of {count:,} responses"

    runner.run("data", write_data, "write text, demonstrations and prompts")
    fit_stage(recipes, "pretraining", seed, runner, overlays, scale)
    fit_stage(recipes, "sft", seed, runner, overlays, scale)
    runner.run("ranking", rank, "sample completions and have labelers rank them")
    fit_stage(recipes, "reward", seed, runner, overlays, scale)
    return recipes, unseen_rankings


def to_report_key(stage: str) -> str:
    """Return the key of a stage in report.json, an identifier for the templates."""
    return stage.replace("-", "_")


def copy_recipes(out: Path) -> dict[str, Path]:
    """Copy the quickstart recipes to the folder of the run, with its paths; return them by recipe name."""
    return copy_shipped_recipes("quickstart", {DEFAULT_OUT: str(out)}, out / "recipes")


def fit_stage(
    recipes: dict[str, Path], stage: str, seed: int, runner: StageRunner, overlays: Sequence[str], scale: Scale
) -> None:
    """Run `lit-rlhf fit` for one of `STAGES`.

    Args:
        recipes: the recipes of the run by name.
        stage: one of `STAGES`.
        seed: of the run and of its data.
        runner: runs it.
        overlays: see `run`.
        scale: how much training.
    """
    arguments = [*build_fit_arguments(recipes[stage], seed, overlays), *scale.arguments.get(stage, ())]

    def train(state: StageState) -> None:
        fit(arguments, state.resumes)
        folder = recipes[stage].parent.parent / stage
        state.headline = format_values(read_last_values(folder, HEADLINES[stage]))

    runner.run(stage, train, describe_command(["fit", *arguments]), arguments, has_bar=True)


def build_fit_arguments(recipe: Path, seed: int, overlays: Sequence[str] = ()) -> list[str]:
    """Return the arguments of `lit-rlhf fit` for a stage."""
    merged = [word for path in (str(recipe), *overlays) for word in ("-c", path)]
    return [*merged, f"--seed_everything={seed}", f"--data.seed={seed}"]


def check_overlays(seed: int, overlays: Sequence[str], scale: Scale = FULL) -> None:
    """Refuse overlays that a training stage would refuse, before anything of an earlier run is removed.

    Args:
        seed: of the run.
        overlays: see `run`.
        scale: how much training.

    Raises:
        UserError: raised by `fit`.
    """
    for stage in STAGES if overlays else ():
        arguments = build_fit_arguments(find_recipe(f"quickstart/{stage}"), seed, overlays)
        compose_config([*arguments, *scale.arguments.get(stage, ())])


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


def read_stage_curves(folder: Path, stage: str) -> dict[str, list[list[float]]]:
    """Read the curves of a stage: against the step, and of PPO against the iteration."""
    if stage in CURVES:
        return read_curves(folder, CURVES[stage], "step")
    return read_curves(folder, {name: name for name in PPO_CURVES}, "epoch")  # an epoch of PPO is an iteration


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and packages, and the number of threads."""
    return {"threads": str(torch.get_num_threads())} | read_versions(("lit-rlhf", "torch", "lightning", "transformers"))
