"""`lit-rlhf paper`: the figures of the paper's results in the synthetic world."""

import os
from pathlib import Path

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.busy_machine import count_cores
from lit_rlhf.commands.sweep import parse_seeds
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean


def run(command: str, args: list[str]) -> int:
    """Run the sections that are not done, write the report, and return the exit code."""
    parser = Parser(
        prog="lit-rlhf paper",
        description="the figures of the paper's results in the synthetic world, offline; the same command goes on "
        "where an earlier one stopped",
    )
    parser.add_argument("--out", type=Path, help="output folder [runs/paper, or runs/paper-tiny]")
    parser.add_argument("--seeds", default="0", metavar="S1,S2,...", help="[%(default)s]")
    parser.add_argument("--only", metavar="FIG1,...", help="sections, with what they need [all]")
    parser.add_argument("--jobs", type=int, metavar="N", help="stages at a time [as many as there are cores]")
    parser.add_argument("--tiny", action="store_true", help="to see the procedure at work, no results")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="OVERLAY", help="of every training, such as logger/csv"
    )
    parsed = parser.parse(args)
    seeds = parse_seeds(parsed.seeds)
    overlays = [str(find_recipe(name)) for name in parsed.config]
    out = parsed.out or Path("runs/paper-tiny" if parsed.tiny else "runs/paper")
    jobs = count_cores() if parsed.jobs is None else parsed.jobs
    if jobs < 1:
        raise UserError(f"--jobs must be 1 or more, got {jobs}")
    from lit_rlhf.commands.support import paper_pipeline
    from lit_rlhf.synthetic.paper.sections import SECTIONS

    only = [key.strip() for key in (parsed.only or "").split(",") if key.strip()]
    for key in only:
        if key not in SECTIONS:
            raise UserError(f"--only: no section {key!r}{did_you_mean(key, SECTIONS)}; there are {', '.join(SECTIONS)}")
    # keep the cache of datasets in the output folder too
    os.environ.setdefault("HF_DATASETS_CACHE", str((out / "cache").resolve()))
    return paper_pipeline.run(out, seeds, only, jobs, "tiny" if parsed.tiny else "full", overlays)
