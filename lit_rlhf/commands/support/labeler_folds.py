"""The folds of `lit-rlhf labelers folds`: each trained by the recipe, on files of its own."""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.commands.fit import read_arguments
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.preflight import write_out
from lit_rlhf.commands.support.recipe_cli import RecipeCLI
from lit_rlhf.data import ComparisonDataModule
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.labelers.folds import Fold, folds_of, groups_of, summary_of
from lit_rlhf.evaluation.reward_model_metrics import ScoredRankings, figures_of
from lit_rlhf.models.scoring import score_rows
from lit_rlhf.modules import RewardModule


class Instantiated(RecipeCLI):
    """A recipe's module, data module and trainer, not run."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Do nothing."""


def run_folds(settings: Namespace, args: list[str]) -> dict[str, Any]:
    """Train one reward model a fold and seed; return settings, groups, runs and summary.

    Args:
        settings: groups, group_column, seeds, unseen, out.
        args: the recipe and its overrides, as for `lit-rlhf fit`.
    """
    args, places = read_arguments(args)
    recipe = Instantiated("fit", list(args), places)
    data, module = recipe.datamodule, recipe.model
    if not isinstance(data, ComparisonDataModule) or not isinstance(module, RewardModule):
        raise UserError("labelers folds: the recipe must train a RewardModule on a ComparisonDataModule")
    if recipe.trainer.world_size > 1:
        raise UserError("labelers folds: runs on one device; set --trainer.devices=1")
    report = DatasetReport(data.path)
    records = data.records(data.path, report)
    print(report.table())
    groups = groups_of(records, settings.groups, settings.group_column)
    folds = folds_of(records, groups, settings.unseen, data.seed)
    runs = []
    for fold in folds:
        for seed in range(settings.seeds):
            print(f"\n== group held out: {fold.group}, seed {seed}", flush=True)
            runs.append(train_and_test(fold, seed, list(args), places, settings.out / fold.group / f"seed-{seed}"))
    return {
        "settings": {name: getattr(settings, name) for name in ("group_column", "seeds", "unseen")},
        "groups": {fold.group: sorted(name for name, own in groups.items() if own == fold.group) for fold in folds},
        "runs": runs,
        "summary": summary_of(runs),
    }


def train_and_test(fold: Fold, seed: int, args: list[str], places: ConfigLocations, folder: Path) -> dict[str, Any]:
    """Train on the other groups' rankings; return the accuracy on both kinds of labelers."""
    paths = {name: write_rows(getattr(fold, name), folder / f"{name}.jsonl") for name in ("training", "seen")}
    overrides = {
        "seed_everything": seed,
        "data.path": paths["training"],
        "data.validation_path": paths["seen"],
        "data.validation_fraction": 0.0,
        "data.seed": seed,
        "model.head_seed": seed,
        "trainer.default_root_dir": folder,
        "trainer.logger": "false",
    }
    cli = RecipeCLI("fit", [*args, *(f"--{name}={value}" for name, value in overrides.items())], places)
    if cli.exit_code:
        raise KeyboardInterrupt
    seen, heldout = (figures(cli, getattr(fold, name)) for name in ("seen", "heldout"))
    return {
        "group": fold.group,
        "seed": seed,
        "rankings": len(fold.training),
        "training_labelers": seen["accuracy"]["value"],
        "training_pairs": seen["pairs"],
        "training_calibration_error": seen["calibration_error"],
        "heldout_labelers": heldout["accuracy"]["value"],
        "heldout_pairs": heldout["pairs"],
    }


def write_rows(records: Sequence[Ranking], path: Path) -> Path:
    """Write rankings with the columns they came with."""
    write_out("".join(json.dumps(record.fields, default=str) + "\n" for record in records), path)
    return path


def figures(cli: RecipeCLI, records: Sequence[Ranking]) -> dict[str, Any]:
    """Return the figures of a trained module on rankings.

    Raises:
        UserError: the length limits leave no comparison.
    """
    module: Any = cli.model
    report = DatasetReport("rankings kept for the test")
    rows = cli.datamodule.tokenise(list(records), report)
    lines = [row.prompt + completion for row in rows for completion in row.completions]
    if not lines:
        raise UserError(f"labelers folds: no comparison is left to test on: {report.summary()}")
    model = module.model.to(cli.trainer.strategy.root_device)
    with cli.trainer.precision_plugin.forward_context():
        scores = score_rows(model, lines, module.tokenizer.pad_token_id)
    owner = [number for number, row in enumerate(rows) for _ in row.completions]
    ranks = [rank for row in rows for rank in row.ranks]
    length = [len(completion) for row in rows for completion in row.completions]
    return figures_of(ScoredRankings(scores, *(torch.tensor(each) for each in (owner, ranks, length))))
