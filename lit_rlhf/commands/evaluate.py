"""`lit-rlhf evaluate`: the paper's evaluation of one or more models, from a recipe."""

import os
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_rlhf.commands.fit import read_arguments
from lit_rlhf.commands.support.config_locations import ConfigLocations, RefusedYAML
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.commands.support.parse_errors import explain_parse_error
from lit_rlhf.commands.support.secrets import without_secrets
from lit_rlhf.commands.support.seeds import check_seeds
from lit_rlhf.commands.support.wandb_login import prepare_wandb
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from lit_rlhf.evaluation.run import Evaluation


def run(command: str, args: list[str]) -> int:
    """Run the evaluation of the recipes; write and print the report; return the exit code.

    Raises:
        UserError: an error in the recipes, the models, the data or the services.
    """
    install_log_filters()
    args, locations = read_arguments(args)
    evaluation, recipe = instantiate_evaluation(args, locations)
    from lit_rlhf.commands.support.evaluation_lineage import write_evaluation_lineage
    from lit_rlhf.evaluation.reports.evaluation_page import format_tables, write_evaluation_report
    from lit_rlhf.evaluation.run import log_report
    from lit_rlhf.lineage.writing import Start

    out, start = Path(evaluation.out), Start.now()
    try:
        report = evaluation.run()
    except KeyboardInterrupt:
        print(f"results so far are cached in {out / 'cache'}: the same command continues from them", file=sys.stderr)
        raise
    write_evaluation_report(report, out)
    write_evaluation_lineage(evaluation, report, recipe, args, start)
    if evaluation.logger is not None:
        log_report(report, evaluation.logger)
    print(f"\n{format_tables(report)}\n\nreport: {out / 'report.html'}")
    return 0


def instantiate_evaluation(args: list[str], locations: ConfigLocations) -> "tuple[Evaluation, dict[str, Any]]":
    """Return the evaluation that recipes and arguments describe, and its settings without credentials.

    An error of jsonargparse becomes one line.
    """
    from jsonargparse import ArgumentParser

    from lit_rlhf import evaluation
    from lit_rlhf.commands.support.recipe_cli import unwrap_error
    from lit_rlhf.commands.support.secrets import MaskedHelp
    from lit_rlhf.commands.support.setting_paths import get_class_name
    from lit_rlhf.evaluation.run import Evaluation

    class EvaluationParser(MaskedHelp, ArgumentParser):
        pass

    for name in evaluation.__all__:  # jsonargparse looks up a class without its path among the imported ones
        getattr(evaluation, name)
    parser = EvaluationParser(prog="lit-rlhf evaluate", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="a recipe; a later one overrides earlier ones")
    parser.add_class_arguments(Evaluation, None)
    try:
        config = parser.parse_args(args)
    except ArgumentError as problem:
        options = [action.dest for action in parser._actions]
        raise UserError(explain_parse_error(str(problem), options, locations)) from None
    except RefusedYAML as refused:
        raise UserError(f"{refused} [command line]") from None
    check_seeds(config.as_dict(), locations)
    if get_class_name(config.logger) == "WandbLogger":
        prepare_wandb(os.environ, "logger", {**config.logger.init_args, **config.logger.get("dict_kwargs", {})})
    recipe = without_secrets(yaml.safe_load(parser.dump(config, skip_none=False, format="yaml")))
    recipe.pop("config", None)
    try:
        # constructors run here; a ValueError of theirs is about their settings
        values = {name: value for name, value in parser.instantiate(config).items() if name != "config"}
        return Evaluation(**values), recipe
    except ValueError as problem:
        raise unwrap_error(problem) from None
