"""`lit-rlhf quickstart`: the whole procedure in the synthetic world."""

from pathlib import Path

from lit_rlhf.commands.quiet import quiet
from lit_rlhf.commands.suggestions import Parser


def run(command: str, args: list[str]) -> int:
    """Run it and return its exit code."""
    parser = Parser(prog="lit-rlhf quickstart", description="the whole procedure in the synthetic world, offline")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder of the results [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parsed = parser.parse(args)
    quiet()
    from lit_rlhf.world.quickstart import run as run_quickstart

    return run_quickstart(parsed.out, parsed.seed)
