"""`lit-rlhf evaluate`: the paper's evaluation of one or more models, from a recipe."""

import os
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_rlhf.commands.fit import read_arguments
from lit_rlhf.commands.support.config_locations import ConfigLocations, RefusedYAML
from lit_rlhf.commands.support.console import terminal_width
from lit_rlhf.commands.support.early_checks import check_names
from lit_rlhf.commands.support.log_filters import install_log_filters, install_warning_format
from lit_rlhf.commands.support.parse_errors import explain_parse_error
from lit_rlhf.commands.support.python_values import NestedValues
from lit_rlhf.commands.support.seeds import check_seeds
from lit_rlhf.commands.support.wandb_login import prepare_loggers
from lit_rlhf.errors import UserError
from lit_rlhf.secrets import without_secrets

if TYPE_CHECKING:
    from lit_rlhf.evaluation.run import Evaluation


def run(command: str, args: list[str]) -> int:
    """Run the evaluation of the recipes; write and print the report; return the exit code.

    Raises:
        UserError: an error in the recipes, the models, the data or the services.
    """
    install_log_filters()
    args, locations = read_arguments(args)
    check_names(command, locations)
    evaluation, recipe = instantiate_evaluation(args, locations)
    from lit_rlhf.commands.support.evaluation_lineage import write_evaluation_lineage
    from lit_rlhf.commands.support.report_runs import open_run
    from lit_rlhf.evaluation.reports.evaluation_page import format_tables, write_evaluation_report
    from lit_rlhf.evaluation.run import log_report
    from lit_rlhf.lineage.writing import Start
    from lit_rlhf.loggers import log_page

    install_warning_format()
    out, start = Path(evaluation.out), Start.now()
    try:
        report = evaluation.run()
    except KeyboardInterrupt:
        print(f"results so far are cached in {out / 'cache'}: the same command continues from them", file=sys.stderr)
        raise
    write_evaluation_report(report, out)
    with open_run(evaluation.loggers, out, "evaluate", list(evaluation.models), list(locations.trees), recipe):
        log_report(report, evaluation.loggers)
        log_page(evaluation.loggers, "report", out / "report.html")
        write_evaluation_lineage(evaluation, report, recipe, args, start)
    print(f"\n{format_tables(report, terminal_width(sys.stdout))}\n\nreport: {out / 'report.html'}")
    return 0


def instantiate_evaluation(args: list[str], locations: ConfigLocations) -> "tuple[Evaluation, dict[str, Any]]":
    """Return the evaluation that recipes and arguments describe, and its settings without credentials.

    An error of jsonargparse becomes one line.
    """
    from jsonargparse import ArgumentParser, Namespace
    from lightning.pytorch.loggers import Logger

    from lit_rlhf import evaluation
    from lit_rlhf.commands.support.python_only import register_python_only_types
    from lit_rlhf.commands.support.recipe_cli import unwrap_error
    from lit_rlhf.commands.support.run_folder import move_loggers, place_loggers
    from lit_rlhf.evaluation.run import Evaluation
    from lit_rlhf.secrets import MaskedHelp

    class EvaluationParser(NestedValues, MaskedHelp, ArgumentParser):  # type: ignore[misc]  # a mixin's signature
        pass

    for name in evaluation.__all__:  # jsonargparse looks up a class without its path among the imported ones
        getattr(evaluation, name)
    register_python_only_types()
    parser = EvaluationParser(prog="lit-rlhf evaluate", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="a recipe; a later one overrides earlier ones")
    parser.add_class_arguments(Evaluation, None)
    parser.add_argument(
        "--trainer.logger",
        type=bool | Logger | list[Logger] | None,  # type: ignore[arg-type]  # jsonargparse takes any type
        help="in place of logger: the name that it has in a recipe of fit, and in the overlays logger/...",
    )
    try:
        config = parser.parse_args(args)
    except ArgumentError as problem:
        options = [action.dest for action in parser._actions]
        raise UserError(explain_parse_error(str(problem), options, locations)) from None
    except RefusedYAML as refused:
        raise UserError(f"{refused} [command line]") from None
    check_seeds(config.as_dict(), locations)
    overlaid = config.pop("trainer").logger
    if overlaid is not None:
        config.logger = None if isinstance(overlaid, bool) else overlaid
    move_loggers(Namespace(logger=config.logger), config.out)
    prepare_loggers(config.logger, "logger", os.environ)
    recipe = without_secrets(yaml.safe_load(parser.dump(config, skip_none=False, skip_validation=True, format="yaml")))
    recipe.pop("config", None)
    try:
        # constructors run here; a ValueError of theirs is about their settings
        values = {
            name: value for name, value in parser.instantiate(config).items() if name not in ("config", "trainer")
        }
        instantiated = Evaluation(**values)
    except ValueError as problem:
        raise unwrap_error(problem) from None
    place_loggers(instantiated.loggers)
    return instantiated, recipe
