"""`lit-rlhf sweep`: the same run at several values of a setting and several seeds; files, a table and a page."""

import shlex
from argparse import Namespace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.commands.support.suggestions import Parser
from lit_rlhf.commands.support.sweep_recipes import (
    check_recipe,
    composed,
    name_of,
    placed,
    read_values,
    set_value,
    with_seed,
)
from lit_rlhf.commands.support.sweep_runs import Run, prepare, run_all
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run every combination; return 0, or 1 where a run ended by a fault that is not the user's."""
    settings, rest = parse(args)
    quiet()
    over, seeds = dict(read_values(text) for text in settings.over), read_seeds(settings.seeds)
    runs = plan(composed(rest), over, seeds, settings.out)
    for one in runs:
        if not prepare(one) and one.seed == seeds[0]:
            check_recipe(one.recipe, one.name)
    from lit_rlhf.evaluation.reports.sweeps import Sweep, format_sweep, usual_metrics, write_page, write_results

    outcomes, codes = run_all(runs, settings.jobs, settings.last)
    metrics = settings.metrics.split(",") if settings.metrics else usual_metrics(outcomes)
    title = settings.title or "Sweep over " + " and ".join(key.split(".")[-1] for key in over)
    sweep = Sweep(title, over, outcomes, metrics, note=shlex.join(["lit-rlhf", "sweep", *args]))
    write_results(sweep, settings.out)
    write_page([sweep], title, settings.out / "sweep.html")
    print(f"\n{format_sweep(sweep)}\n\nfigure: {settings.out / 'sweep.html'}; also results.csv and results.json")
    return int(any(code not in (0, 2) for code in codes))


def parse(args: list[str]) -> tuple[Namespace, list[str]]:
    """Return the sweep's own settings, and the rest, which is for `fit`."""
    parser = Parser(
        prog="lit-rlhf sweep",
        description="Run a recipe at several values of a setting and several seeds. All other arguments are those of "
        "lit-rlhf fit; {seed} in a setting of text stands for the seed.",
        usage="lit-rlhf sweep -c RECIPE [-c OVERLAY ...] [--key=value ...] --over KEY=V1,V2,... [options]",
    )
    parser.add_argument(
        "--over",
        action="append",
        required=True,
        metavar="KEY=V1,V2,...",
        help="a setting and its values; an entry of a list goes by its class: trainer.callbacks.PretrainingMix."
        "coefficient. A second --over: every combination",
    )
    parser.add_argument("--seeds", default="0", metavar="S1,S2,...", help="[%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="[%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time [%(default)s]")
    parser.add_argument("--metrics", metavar="M1,M2,...", help="what is drawn and printed")
    parser.add_argument(
        "--last", type=int, default=1, metavar="N", help="mean over a metric's last values [%(default)s]"
    )
    parser.add_argument("--title", help="of the page")
    settings, rest = parser.parse_known_args(args)
    for name in ("jobs", "last"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} must be 1 or more, got {getattr(settings, name)}")
    return settings, rest


def read_seeds(text: str) -> list[int]:
    """Return the seeds."""
    try:
        return list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds {text}: expected whole numbers with commas between them, such as 0,1,2") from None


def plan(config: dict[str, Any], over: dict[str, list[Any]], seeds: list[int], out: Path) -> list[Run]:
    """Return every run, with its recipe; all seeds of the first values first."""
    runs = []
    for values in product(*over.values()):
        for seed in seeds:
            chosen = dict(zip(over, values))
            recipe = config
            for key, value in chosen.items():
                recipe = set_value(recipe, key, value)
            name = name_of(chosen, seed)
            folder = out / "runs" / name
            recipe = placed(with_seed(recipe, seed), folder)
            runs.append(Run(name, chosen, seed, folder, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)))
    return runs
