"""`lit-rlhf sweep`: one run at several values of a setting and several seeds; files, a table and a page."""

import shlex
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.commands.support.seeds import check_seed
from lit_rlhf.commands.support.setting_paths import set_value
from lit_rlhf.commands.support.sweep_recipes import (
    check_recipe,
    compose_config,
    make_run_names,
    name_wandb_runs,
    parse_values,
    set_output_folder,
    set_seed,
)
from lit_rlhf.commands.support.sweep_runs import (
    Run,
    check_folder,
    is_complete,
    is_unchanged,
    prepare_run,
    run_all,
)
from lit_rlhf.errors import UserError

if TYPE_CHECKING:
    from lit_rlhf.evaluation.reports.sweeps import Sweep


def run(command: str, args: list[str]) -> int:
    """Run every combination; return 0, or 1 if a run failed by a bug.

    Raises:
        UserError: an error in the arguments or the recipe, or no run was completed.
    """
    settings, rest = parse_arguments(args)
    install_log_filters()
    over, seeds = parse_over(settings.over), parse_seeds(settings.seeds)
    config = compose_config(rest)
    runs = plan_runs(config, over, seeds, settings.out)
    for each in runs:
        check_folder(each, settings.overwrite)
    for each in runs:
        if each.seed == seeds[0] and not (is_complete(each) and is_unchanged(each)):
            check_recipe(each.text, each.name)
    with locked_folder(settings.out, "--out"):
        return run_and_report(
            runs, over, config["trainer"]["logger"], settings, shlex.join(["lit-rlhf", "sweep", *args])
        )


def run_and_report(runs: list[Run], over: dict[str, list[Any]], logger: Any, settings: Namespace, command: str) -> int:
    """Execute the runs that are not complete, and write what came out; return the exit code.

    Args:
        runs: all of them, checked.
        over: the values of every setting that varies.
        logger: the recipe's `trainer.logger`.
        settings: of the command.
        command: as it was typed.

    Raises:
        UserError: no run was completed.
    """
    from lit_rlhf.evaluation.reports.sweeps import (
        Sweep,
        format_sweep,
        select_default_metrics,
        write_results,
        write_sweep_page,
    )

    for each in runs:
        prepare_run(each)
    outcomes, codes = run_all(runs, settings.jobs, settings.last)
    metrics = settings.metrics.split(",") if settings.metrics else select_default_metrics(outcomes)
    title = settings.title or "Sweep over " + " and ".join(key.split(".")[-1] for key in over)
    sweep = Sweep(title, over, outcomes, metrics, note=command)
    write_results(sweep, settings.out)
    write_sweep_page([sweep], title, settings.out / "sweep.html")
    log_sweep(sweep, logger, settings.out)
    print(f"\n{format_sweep(sweep)}\n\nfigure: {settings.out / 'sweep.html'}; also results.csv and results.json")
    if any(code not in (0, 2) for code in codes):
        return 1
    if all(codes):
        raise UserError(f"no run of the sweep was completed; the first, {runs[0].name}: {outcomes[0].error}")
    return 0


def log_sweep(sweep: "Sweep", setting: Any, out: Path) -> None:
    """Log the runs of a sweep as a table, and its page, where the recipe logs.

    Args:
        sweep: the runs.
        setting: the recipe's `trainer.logger`.
        out: folder of the sweep.
    """
    from lit_rlhf.commands.support.report_runs import make_loggers, open_run
    from lit_rlhf.loggers import log_page, log_table

    names = sorted({name for run in sweep.runs for name in run.metrics})
    rows = [
        {**run.values, "seed": run.seed, "seconds": run.seconds, "error": run.error}
        | {name: run.metrics.get(name) for name in names}
        for run in sweep.runs
    ]
    loggers = make_loggers(setting, out)
    with open_run(loggers, out, "sweep", [], [], {"over": sweep.over, "note": sweep.note}, experiment=out):
        log_table(loggers, "sweep/runs", rows)
        log_page(loggers, "sweep/page", out / "sweep.html")


def parse_arguments(args: list[str]) -> tuple[Namespace, list[str]]:
    """Return the sweep's own settings, and the other arguments, which are for `fit`."""
    parser = Parser(
        prog="lit-rlhf sweep",
        description="Run a recipe at several values of a setting and several seeds. All other arguments are those of "
        "lit-rlhf fit; {seed} in a text setting is replaced by the seed.",
        usage="lit-rlhf sweep -c RECIPE [-c OVERLAY ...] [--key=value ...] --over KEY=V1,V2,... [options]",
    )
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=V1,V2,...",
        help="a setting and its values; a list entry is named by its class: trainer.callbacks.PretrainingMix."
        "coefficient. Repeat it for every combination",
    )
    parser.add_argument("--seeds", default="0", metavar="S1,S2,...", help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="parallel runs [%(default)s]")
    parser.add_argument("--metrics", metavar="M1,M2,...", help="metrics to plot and print")
    parser.add_argument(
        "--last", type=int, default=1, metavar="N", help="average a metric's last N values [%(default)s]"
    )
    parser.add_argument("--title", type=str, help="title of the page")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace complete runs of another recipe; the others are kept"
    )
    settings, rest = parser.parse_known_args(args)
    for name in ("jobs", "last"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(settings, name)}")
    return settings, rest


def parse_over(texts: list[str]) -> dict[str, list[Any]]:
    """Return the values of every setting that varies.

    Raises:
        UserError: see `parse_values`; or a setting is named twice.
    """
    over: dict[str, list[Any]] = {}
    for key, values in map(parse_values, texts):
        if key in over:
            raise UserError(f"--over {key} stands twice; name all its values once, separated by commas")
        over[key] = values
    return over


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `S1,S2,...`."""
    try:
        seeds = list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: expected integers separated by commas, such as 0,1,2") from None
    for seed in seeds:
        check_seed(seed, "--seeds")
    return seeds


def plan_runs(config: dict[str, Any], over: dict[str, list[Any]], seeds: list[int], out: Path) -> list[Run]:
    """Return every run with its recipe, ordered by values and then by seed."""
    chosen = [(dict(zip(over, values)), seed) for values in product(*over.values()) for seed in seeds]
    runs = []
    for (values, seed), name in zip(chosen, make_run_names(chosen)):
        recipe = config
        for key, value in values.items():
            recipe = set_value(recipe, key, value)
        folder = out / "runs" / name
        recipe = name_wandb_runs(set_output_folder(set_seed(recipe, seed), folder), out.absolute().name, name)
        runs.append(Run(name, values, seed, folder, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)))
    return runs
