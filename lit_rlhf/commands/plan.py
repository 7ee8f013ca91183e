"""`lit-rlhf plan`: the memory that a recipe needs per device, estimated before anything is loaded."""

import re
from typing import TYPE_CHECKING

from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

if TYPE_CHECKING:
    from lit_rlhf.commands.support.memory_plan import MemoryPlan

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
LARGEST = 400  # GB; a larger number without a unit is no size
# the CUDA context and libraries, and the share that fragmentation leaves
RESERVED, USABLE = 1.0 * GB, 0.93


def run(command: str, args: list[str]) -> int:
    """Print the plan, and whether it fits on the GPU that `--gpu` names."""
    if not args or {"-h", "--help"} & set(args):
        print(f"{USAGE}\n\n--gpu is one of {', '.join(GPUS)}, or a size such as 24GB")
        return 0
    args, gpu = _pop_gpu(args)
    install_log_filters()
    from lit_rlhf.commands.fit import read_arguments
    from lit_rlhf.commands.support.memory_plan import plan_memory
    from lit_rlhf.commands.support.recipe_cli import RecipeCLI

    class PlanCLI(RecipeCLI):
        """Parses a recipe and instantiates nothing."""

        def before_instantiate_classes(self) -> None:
            """Skip the checks: the run may be for another machine."""

        def instantiate_classes(self) -> None:
            """Skip it."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Skip it."""

    args, locations = read_arguments(args)
    planned = plan_memory(PlanCLI("fit", args, locations).config["fit"])
    print(format_plan(planned))
    if gpu is not None:
        print(format_fit(planned.peak, *gpu))
    return 0


def parse_gpu_memory(name: str) -> float:
    """Return the memory of a GPU in bytes, by its name, a part of its name such as 4090, or a size such as 24GB.

    Raises:
        UserError: it is none of them, or a part of several names.
    """
    text = re.sub(r"nvidia|geforce|tesla|(?<=\w)[\s_-]+|\s", "", name.lower())
    size = re.fullmatch(r"(\d+(?:\.\d+)?)(gi?b?)?", text)
    named = [gpu for gpu in GPUS if _matches(text, gpu)]
    if len(named) == 1:
        return GPUS[named[0]] * GB
    if size and not named and (size[2] or float(size[1]) <= LARGEST) and float(size[1]) > 0:
        return float(size[1]) * (2**30 if (size[2] or "").startswith("gi") else GB)
    if named:
        raise UserError(f"--gpu: {name!r} is one of {', '.join(named)}")
    raise UserError(
        f"--gpu: no GPU {name!r}{did_you_mean(name.lower(), GPUS)}; it is one of {', '.join(GPUS)}, or a size such as "
        "24GB"
    )


def _matches(text: str, gpu: str) -> bool:
    """Return whether a text is a known name, with or without its memory, or the number in it."""
    *words, memory = gpu.split("-")
    return text in ("".join([*words, memory]), "".join(words), words[-1])


def format_fit(peak: int, name: str, memory: float) -> str:
    """Return the line that says whether `peak` bytes fit on a GPU of `memory` bytes."""
    usable = memory * USABLE - RESERVED
    fits = "fits" if peak <= usable else "does not fit"
    return f"{name}: {fits}: {peak / GB:.2f} of {usable / GB:.1f} GB available to a program"


def format_plan(planned: "MemoryPlan") -> str:
    """Return a `MemoryPlan` as text."""
    models = ", ".join(f"{name} {count:,}" for name, count in planned.parameters.items())
    lines = [f"parameters: {models}", f"sizes: {planned.sizes}", *(f"assumed: {note}" for note in planned.assumptions)]
    for phase, parts in planned.phases.items():
        lines += ["", f"{phase}, GB per device"]
        lines += [f"  {name:<28}{bytes_ / GB:>8.2f}" for name, bytes_ in parts.items() if bytes_]
        lines.append(f"  {'total':<28}{sum(parts.values()) / GB:>8.2f}")
    return "\n".join([*lines, "", f"peak: {planned.peak / GB:.2f} GB per device"])


def _pop_gpu(args: list[str]) -> tuple[list[str], tuple[str, float] | None]:
    """Return the arguments without `--gpu`, and the GPU's name and memory in bytes."""
    rest, words, gpu = list[str](), iter(args), None
    for word in words:
        if word == "--gpu" or word.startswith("--gpu="):
            name = word.partition("=")[2] or next(words, "")
            gpu = (name, parse_gpu_memory(name))
        else:
            rest.append(word)
    return rest, gpu
