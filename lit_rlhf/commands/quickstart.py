"""`lit-rlhf quickstart`: the full procedure in the synthetic world."""

import os
from pathlib import Path

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.console import Verbosity, get_verbosity, set_verbosity
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run the quickstart, or its sweeps, and return the exit code."""
    parser = Parser(prog="lit-rlhf quickstart", description="the full procedure in the synthetic world, offline")
    folders = "runs/quickstart, runs/tiny, or runs/sweep for the sweeps"
    parser.add_argument("--out", type=Path, help=f"output folder [{folders}]")
    parser.add_argument("--tiny", action="store_true", help="a minute instead of minutes: for a first look, no results")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--sweep", action="store_true", help="run the paper's sweeps of β and γ in miniature instead")
    parser.add_argument("--seeds", default="0,1,2", metavar="S1,S2,...", help="seeds of the sweeps [%(default)s]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="parallel runs of the sweeps [%(default)s]")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="OVERLAY", help="of every stage, such as logger/off"
    )
    parsed = parser.parse(args)
    overlays = [str(find_recipe(name)) for name in parsed.config]
    if parsed.tiny and parsed.sweep:
        raise UserError("lit-rlhf quickstart: --tiny and --sweep exclude each other")
    is_verbose = get_verbosity() is Verbosity.VERBOSE
    with set_verbosity(Verbosity.VERBOSE if is_verbose else Verbosity.STAGE):  # a line says what a stage did
        install_log_filters()
    out = parsed.out or Path("runs/sweep" if parsed.sweep else "runs/tiny" if parsed.tiny else "runs/quickstart")
    # keep the cache of datasets in the output folder too
    os.environ.setdefault("HF_DATASETS_CACHE", str((out / "cache").resolve()))
    if parsed.sweep:
        from lit_rlhf.commands.support.quickstart_sweep import run as run_sweeps
        from lit_rlhf.commands.sweep import parse_seeds

        return run_sweeps(out, parse_seeds(parsed.seeds), parsed.jobs, overlays=overlays)
    from lit_rlhf.commands.support import quickstart_pipeline

    scale = quickstart_pipeline.TINY if parsed.tiny else quickstart_pipeline.FULL
    with locked_folder(out, "--out"):
        return quickstart_pipeline.run(out, parsed.seed, overlays, scale)
