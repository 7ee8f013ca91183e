"""`lit-rlhf plan`: what a recipe needs of memory on each device, before anything is loaded or bought."""

import re
from typing import Any

from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.commands.support.suggestions import did_you_mean
from lit_rlhf.errors import UserError

USAGE = "usage: lit-rlhf plan -c RECIPE [-c OVERLAY ...] [--gpu NAME] [--key=value ...]"
GB = 1e9
GPUS = {
    "t4-16gb": 16,
    "v100-32gb": 32,
    "l4-24gb": 24,
    "rtx-4090-24gb": 24,
    "rtx-5090-32gb": 32,
    "a100-40gb": 40,
    "l40s-48gb": 48,
    "a100-80gb": 80,
    "h100-80gb": 80,
    "h200-141gb": 141,
    "b200-192gb": 192,
}
# context and libraries of CUDA, and what fragments
RESERVED, USABLE = 1.0 * GB, 0.93


def run(command: str, args: list[str]) -> int:
    """Print the plan, and whether a GPU holds it where one is named."""
    if not args or {"-h", "--help"} & set(args):
        print(f"{USAGE}\n\n--gpu is one of {', '.join(GPUS)}, or a size such as 24gb")
        return 0
    args, gpu = _take_gpu(args)
    quiet()
    from lit_rlhf.commands.fit import read_arguments
    from lit_rlhf.commands.support.memory_plan import plan
    from lit_rlhf.commands.support.recipe_cli import RecipeCLI

    class PlanCLI(RecipeCLI):
        """Parses and checks a recipe, and makes nothing of it."""

        def before_instantiate_classes(self) -> None:
            """Check nothing: what this machine lacks another may have."""

        def instantiate_classes(self) -> None:
            """Make nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Run nothing."""

    args, places = read_arguments(args)
    planned = plan(PlanCLI("fit", args, places).config["fit"])
    print(report(planned))
    if gpu is not None:
        print(verdict(planned.peak, *gpu))
    return 0


def memory_of(name: str) -> float:
    """Return the memory of a GPU in bytes, by its name or by a size such as 24gb.

    Raises:
        UserError: neither.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb)?", name.lower())
    if size:
        return float(size.group(1)) * GB
    if name.lower() not in GPUS:
        raise UserError(
            f"--gpu: no GPU {name!r}{did_you_mean(name.lower(), GPUS)}; it is one of {', '.join(GPUS)}, or a size "
            "such as 24gb"
        )
    return GPUS[name.lower()] * GB


def verdict(peak: int, name: str, memory: float) -> str:
    """Return the line that says whether a GPU holds it."""
    usable = memory * USABLE - RESERVED
    words = "holds it" if peak <= usable else "does not hold it"
    return f"{name}: {words}: {peak / GB:.2f} of {usable / GB:.1f} GB that are left to a program"


def report(planned: Any) -> str:
    """Return the plan as text."""
    models = ", ".join(f"{name} {count:,}" for name, count in planned.parameters.items())
    lines = [f"parameters: {models}", f"sizes: {planned.sizes}", *(f"assumed: {note}" for note in planned.assumed)]
    for phase, parts in planned.phases.items():
        lines += ["", f"{phase}, GB a device"]
        lines += [f"  {name:<28}{bytes_ / GB:>8.2f}" for name, bytes_ in parts.items() if bytes_]
        lines.append(f"  {'together':<28}{sum(parts.values()) / GB:>8.2f}")
    return "\n".join([*lines, "", f"peak: {planned.peak / GB:.2f} GB a device"])


def _take_gpu(args: list[str]) -> tuple[list[str], tuple[str, float] | None]:
    rest, words, gpu = list[str](), iter(args), None
    for word in words:
        if word == "--gpu" or word.startswith("--gpu="):
            name = word.partition("=")[2] or next(words, "")
            gpu = (name, memory_of(name))
        else:
            rest.append(word)
    return rest, gpu
