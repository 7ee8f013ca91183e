"""`lit-rlhf evaluate`: the paper's evaluation of one or several models, from a recipe."""

import os
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

from lit_rlhf.commands.fit import read_arguments
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.commands.support.parse_errors import explain
from lit_rlhf.commands.support.wandb_login import prepare_wandb
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run what the recipes say; write and print the report; return the exit code.

    Raises:
        UserError: whatever of the recipes, the models, the data or the services the user can mend.
    """
    quiet()
    args, places = read_arguments(args)
    evaluation = instantiate(args, places)
    from lit_rlhf.evaluation.reports.evaluation_page import format_tables, write_page
    from lit_rlhf.evaluation.run import log_report

    out = Path(evaluation.out)
    try:
        report = evaluation.run()
    except KeyboardInterrupt:
        print(f"what was computed is kept in {out / 'cache'}: the same command goes on from there", file=sys.stderr)
        raise
    write_page(report, out)
    if evaluation.logger is not None:
        log_report(report, evaluation.logger)
    print(f"\n{format_tables(report)}\n\nreport: {out / 'report.html'}")
    return 0


def instantiate(args: list[str], places: ConfigLocations) -> Any:
    """Return the evaluation that recipes and arguments describe; what jsonargparse refuses becomes one line."""
    from jsonargparse import ArgumentParser

    from lit_rlhf.commands.support.recipe_cli import original
    from lit_rlhf.evaluation.run import Evaluation

    parser = ArgumentParser(prog="lit-rlhf evaluate", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="a recipe; a later one wins")
    parser.add_class_arguments(Evaluation, None)
    try:
        config = parser.parse_args(args)
    except ArgumentError as problem:
        options = [action.dest for action in parser._actions]
        raise UserError(explain(str(problem), options, places)) from None
    if str(getattr(config.logger, "class_path", "")).endswith("WandbLogger"):
        prepare_wandb(os.environ)
    try:
        # a class_path's constructor runs here, and a ValueError of it is about its settings
        return Evaluation(**{name: value for name, value in parser.instantiate(config).items() if name != "config"})
    except ValueError as problem:
        raise original(problem) from None
