"""`lit-rlhf real`: a real instruction model through all stages, on real data, measured."""

import os
from pathlib import Path

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.argument_parser import Parser
from lit_rlhf.commands.support.console import Verbosity, get_verbosity, set_verbosity
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run the stages that are not done yet, and return the exit code."""
    parser = Parser(
        prog="lit-rlhf real",
        description="SmolLM2-135M-Instruct through SFT, reward models, PPO, PPO-ptx on real data; goes on where it was",
    )
    parser.add_argument("--out", type=Path, help="output folder [runs/smollm2-135m, or runs/smollm2-135m-tiny, -full]")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="[%(default)s]")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tiny", action="store_true", help="a handful of steps in some minutes: no results")
    size.add_argument("--full", action="store_true", help="all the data and the paper's proportions, for a GPU")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model folder, in place of lit-rlhf model get")
    precisions = ("auto", "32-true", "bf16-mixed")
    parser.add_argument("--precision", choices=precisions, default="auto", help="auto: the faster one, as timed [auto]")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="OVERLAY", help="of every training stage"
    )
    parsed = parser.parse(args)
    overlays = [str(find_recipe(name)) for name in parsed.config]
    if parsed.model is not None and not (parsed.model / "config.json").is_file():
        raise UserError(f"--model: {str(parsed.model)!r} is no model folder: it has no config.json")
    is_verbose = get_verbosity() is Verbosity.VERBOSE
    with set_verbosity(Verbosity.VERBOSE if is_verbose else Verbosity.STAGE):  # a line says what a stage did
        install_log_filters()
    scale = "tiny" if parsed.tiny else "full" if parsed.full else "cpu"
    out = parsed.out or Path("runs/smollm2-135m" if scale == "cpu" else f"runs/smollm2-135m-{scale}")
    os.environ.setdefault("HF_DATASETS_CACHE", str((out / "cache").resolve()))
    from lit_rlhf.commands.support.real_pipeline import RealRun
    from lit_rlhf.commands.support.real_scales import SCALES

    with locked_folder(out, "--out"):
        return RealRun(out, parsed.data, SCALES[scale], parsed.seed, overlays, parsed.model, parsed.precision).run()
