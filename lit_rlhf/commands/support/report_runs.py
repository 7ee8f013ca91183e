"""Log the result of a command that is no training run, such as a sweep, where a recipe logs."""

import os
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import Logger

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.config_locations import ConfigLocations, parse_yaml
from lit_rlhf.commands.support.parse_errors import explain_parse_error
from lit_rlhf.commands.support.run_folder import move_loggers
from lit_rlhf.commands.support.wandb_login import prepare_loggers
from lit_rlhf.commands.support.wandb_runs import apply_run, describe_run, nest_config
from lit_rlhf.errors import UserError
from lit_rlhf.loggers import finish_runs, media_loggers
from lit_rlhf.secrets import without_secrets


@contextmanager
def open_run(
    loggers: Sequence[Logger],
    folder: Path,
    job_type: str,
    tags: Sequence[str],
    recipes: Sequence[Path],
    config: dict[str, Any],
    experiment: Path | None = None,
) -> Iterator[None]:
    """Within the block, loggers log to a run of this name and config, which then ends.

    Args:
        loggers: that have not started.
        folder: what the command writes to.
        job_type: of the run.
        tags: see `describe_run`.
        recipes: see `describe_run`.
        config: the settings of the command; credentials are removed.
        experiment: see `describe_run`.
    """
    apply_run(loggers, describe_run(folder, job_type, tags, recipes, experiment), os.environ)
    for logger in media_loggers(loggers):
        logger.log_hyperparams(nest_config(without_secrets(config)))
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        finish_runs(loggers, succeeded)


def read_loggers(recipes: Sequence[str]) -> Any:
    """Return the `trainer.logger` of the last one of `-c NAME ...` that has one.

    Raises:
        UserError: there is no such recipe, or it cannot be read.
    """
    settings: Any = None
    for name in recipes:
        path = find_recipe(name)
        parse_yaml(path)  # refuses what breaks the rules of recipes
        trainer = yaml.safe_load(path.read_text(encoding="utf-8")).get("trainer") or {}
        settings = trainer.get("logger", settings)
    return settings


def make_loggers(setting: Any, folder: Path) -> list[Logger]:
    """Return those of a recipe's loggers that take tables and pages, to write to a folder.

    Args:
        setting: value of the recipe's `trainer.logger`.
        folder: what the command writes to.

    Raises:
        UserError: a wrong setting.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trainer.logger", type=bool | Logger | list[Logger] | None)
    try:
        parsed = parser.parse_object({"trainer": {"logger": setting}})
    except ArgumentError as problem:
        raise UserError(explain_parse_error(str(problem), ["trainer.logger"], ConfigLocations([], []))) from None
    move_loggers(parsed.trainer, str(folder))
    prepare_loggers(parsed.trainer.logger, "trainer.logger", os.environ)
    made = parser.instantiate(parsed).trainer.logger
    return list(media_loggers(made if isinstance(made, list) else [made]))
