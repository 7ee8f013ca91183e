"""`lit-rlhf quickstart`: the full procedure in the synthetic world."""

import os
from pathlib import Path

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.log_filters import install_log_filters


def run(command: str, args: list[str]) -> int:
    """Run the quickstart, or its sweeps, and return the exit code."""
    parser = Parser(prog="lit-rlhf quickstart", description="the full procedure in the synthetic world, offline")
    parser.add_argument("--out", type=Path, help="output folder [runs/quickstart, or runs/sweep for the sweeps]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--sweep", action="store_true", help="run the paper's sweeps of β and γ in miniature instead")
    parser.add_argument("--seeds", default="0,1,2", metavar="S1,S2,...", help="seeds of the sweeps [%(default)s]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="parallel runs of the sweeps [%(default)s]")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="OVERLAY", help="of every stage, such as logger/off"
    )
    parsed = parser.parse(args)
    overlays = [str(find_recipe(name)) for name in parsed.config]
    install_log_filters()
    out = parsed.out or Path("runs/sweep" if parsed.sweep else "runs/quickstart")
    # keep the cache of datasets in the output folder too
    os.environ.setdefault("HF_DATASETS_CACHE", str((out / "cache").resolve()))
    if parsed.sweep:
        from lit_rlhf.commands.support.quickstart_sweep import run as run_sweeps
        from lit_rlhf.commands.sweep import parse_seeds

        return run_sweeps(out, parse_seeds(parsed.seeds), parsed.jobs, overlays=overlays)
    from lit_rlhf.commands.support.quickstart_pipeline import run as run_quickstart

    return run_quickstart(out, parsed.seed, overlays)
