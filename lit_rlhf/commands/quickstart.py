"""`lit-rlhf quickstart`: the whole procedure in the synthetic world."""

import os
from pathlib import Path

from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.commands.support.suggestions import Parser


def run(command: str, args: list[str]) -> int:
    """Run it and return its exit code."""
    parser = Parser(prog="lit-rlhf quickstart", description="the whole procedure in the synthetic world, offline")
    parser.add_argument("--out", type=Path, help="folder of the results [runs/quickstart, of the sweeps runs/sweep]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--sweep", action="store_true", help="instead: the paper's sweeps of β and γ in miniature")
    parser.add_argument("--seeds", default="0,1,2", metavar="S1,S2,...", help="of the sweeps [%(default)s]")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="of the sweeps: runs at once [%(default)s]")
    parsed = parser.parse(args)
    quiet()
    out = parsed.out or Path("runs/sweep" if parsed.sweep else "runs/quickstart")
    # everything that is written lies in one folder, the blocks of the text too
    os.environ.setdefault("HF_DATASETS_CACHE", str((out / "cache").resolve()))
    if parsed.sweep:
        from lit_rlhf.commands.support.quickstart_sweep import run as run_sweeps
        from lit_rlhf.commands.sweep import read_seeds

        return run_sweeps(out, read_seeds(parsed.seeds), parsed.jobs)
    from lit_rlhf.commands.support.quickstart_pipeline import run as run_quickstart

    return run_quickstart(out, parsed.seed)
