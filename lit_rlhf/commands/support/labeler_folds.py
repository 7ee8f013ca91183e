"""Train and test the reward models of `lit-rlhf labelers folds`, each by the recipe on data files of its own."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.commands.fit import read_arguments
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.preflight import write_output
from lit_rlhf.commands.support.recipe_cli import RecipeCLI
from lit_rlhf.commands.support.report_runs import make_loggers, open_run
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import source_name
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.labelers.folds import Fold, build_folds, group_labelers, summarize_folds
from lit_rlhf.evaluation.reward_model_metrics import ScoredRankings, compute_reward_model_metrics
from lit_rlhf.loggers import log_table
from lit_rlhf.models.scoring import score_rows
from lit_rlhf.modules import RewardModule


class InstantiateOnlyCLI(RecipeCLI):
    """Instantiates module, data module and trainer, and does not run them."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Skip the run."""


def run_folds(settings: Namespace, args: list[str]) -> dict[str, Any]:
    """Train one reward model per fold and seed; return settings, groups, runs and summary.

    Args:
        settings: groups, group_column, seeds, unseen, out, overwrite.
        args: the recipe and its overrides, as for `lit-rlhf fit`.

    Raises:
        UserError: `out` holds folds already.
    """
    args, locations = read_arguments(args)
    recipe = InstantiateOnlyCLI("fit", list(args), locations)
    data, module = recipe.datamodule, recipe.model
    if not isinstance(data, ComparisonDataModule) or not isinstance(module, RewardModule):
        raise UserError("labelers folds: the recipe must train a RewardModule on a ComparisonDataModule")
    if recipe.trainer.world_size > 1:
        raise UserError("labelers folds: runs on one device; set --trainer.devices=1")
    report = DatasetReport(source_name(data.path))
    records = data.load_records(data.path, report)
    print(report.format_table())
    groups = group_labelers(records, settings.groups, settings.group_column)
    folds = build_folds(records, groups, settings.unseen, data.seed)
    planned = [
        (fold, seed, settings.out / fold.group / f"seed-{seed}") for fold in folds for seed in range(settings.seeds)
    ]
    taken = [path for path in (settings.out / "folds.json", *(folder for *_, folder in planned)) if path.exists()]
    if taken and not settings.overwrite:
        raise UserError(f"--out: {taken[0]} exists already; name another folder, or --overwrite to replace it")
    runs = []
    for fold, seed, folder in planned:
        print(f"\n== group held out: {fold.group}, seed {seed}", flush=True)
        runs.append(train_and_test(fold, seed, list(args), locations, folder, settings.out))
    loggers = make_loggers(recipe.recipe["trainer"]["logger"], settings.out)
    with open_run(
        loggers, settings.out, "labelers", [], list(locations.trees), {"model": recipe.recipe["model"]}, settings.out
    ):
        log_table(loggers, "labelers/folds", runs)
    return {
        "settings": {name: getattr(settings, name) for name in ("group_column", "seeds", "unseen")},
        "groups": {fold.group: sorted(name for name, own in groups.items() if own == fold.group) for fold in folds},
        "runs": runs,
        "summary": summarize_folds(runs),
    }


def train_and_test(
    fold: Fold, seed: int, args: list[str], locations: ConfigLocations, folder: Path, out: Path
) -> dict[str, Any]:
    """Train on the other groups' rankings; return the accuracy on training and on held-out labelers.

    Args:
        fold: the rankings.
        seed: of the run and of its data.
        args: see `run_folds`.
        locations: see `RecipeCLI`.
        folder: of the run.
        out: folder of all runs.
    """
    training_path = write_rows(fold.training, folder / "training.jsonl")
    validation_path = write_rows(fold.training_labelers, folder / "validation.jsonl")
    overrides = {
        "seed_everything": seed,
        "data.path": training_path,
        "data.validation_path": validation_path,
        "data.validation_fraction": 0.0,
        "data.seed": seed,
        "model.head_seed": seed,
        "run_dir": folder,
    }
    words = [*args, *(f"--{name}={value}" for name, value in overrides.items()), "--overwrite"]
    cli = RecipeCLI("fit", words, locations, experiment=out)
    if cli.exit_code:
        raise KeyboardInterrupt
    training, heldout = (evaluate_rankings(cli, records) for records in (fold.training_labelers, fold.heldout_labelers))
    return {
        "group": fold.group,
        "seed": seed,
        "rankings": len(fold.training),
        "training_labelers": training["accuracy"]["value"],
        "training_pairs": training["pairs"],
        "training_calibration_error": training["calibration_error"],
        "heldout_labelers": heldout["accuracy"]["value"],
        "heldout_pairs": heldout["pairs"],
    }


def write_rows(records: Sequence[Ranking], path: Path) -> Path:
    """Write rankings with the columns of their source and return the path."""
    write_output("".join(json.dumps(record.fields, default=str) + "\n" for record in records), path)
    return path


def evaluate_rankings(cli: RecipeCLI, records: Sequence[Ranking]) -> dict[str, Any]:
    """Return the reward model metrics of a trained module on rankings.

    Raises:
        UserError: no comparison is left within the length limits.
    """
    module: Any = cli.model
    report = DatasetReport("rankings kept for the test")
    rows = cli.datamodule.tokenize(list(records), report)
    sequences = [row.prompt + completion for row in rows for completion in row.completions]
    if not sequences:
        raise UserError(f"labelers folds: no comparison is left to test on: {report.format_summary()}")
    model = module.model.to(cli.trainer.strategy.root_device)
    with cli.trainer.precision_plugin.forward_context():
        scores = score_rows(model, sequences, module.tokenizer.pad_token_id)
    ranking_index = [index for index, row in enumerate(rows) for _ in row.completions]
    ranks = [rank for row in rows for rank in row.ranks]
    lengths = [len(completion) for row in rows for completion in row.completions]
    return compute_reward_model_metrics(
        ScoredRankings(scores, *(torch.tensor(each) for each in (ranking_index, ranks, lengths)))
    )
