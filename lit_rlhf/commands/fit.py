"""`lit-rlhf fit`, `validate` and `test`: Lightning's CLI on recipes."""

import os
import signal
import sys
from pathlib import Path

from lit_rlhf.commands.recipes import resolve
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.log_filters import quiet
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run one of the Trainer's methods as the recipes and arguments say; return the exit code.

    Raises:
        UserError: whatever of the recipes, the arguments or the data the user can mend.
    """
    quiet()
    args, places = read_arguments(args)
    from lit_rlhf.commands.support.recipe_cli import RecipeCLI

    handler = signal.getsignal(signal.SIGINT)
    try:
        return RecipeCLI(command, args, places).exit_code
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored after an interrupt


def read_arguments(args: list[str]) -> tuple[list[str], ConfigLocations]:
    """Return the arguments with every recipe as a file, and where settings stand; the user's own files can be named.

    Raises:
        UserError: a recipe that is not there or cannot be read.
    """
    args, files = resolve_recipes(args)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # a class_path may name the user's own file; last, so that it shadows no package
    return args, ConfigLocations(files, args)


def resolve_recipes(args: list[str]) -> tuple[list[str], list[Path]]:
    """Replace every recipe name after `-c` or `--config` by its file; return the arguments and the files.

    Raises:
        UserError: no such file and no such recipe, or nothing after `-c`.
    """
    resolved: list[str] = []
    files: list[Path] = []
    words = iter(args)
    for word in words:
        flag, _, name = word.partition("=")
        if flag not in ("-c", "--config"):
            resolved.append(word)
            continue
        name = name or next(words, "")
        if not name:
            raise UserError(f"{flag} needs the name of a recipe or a file; lit-rlhf recipes ls lists the recipes")
        files.append(resolve(name))
        resolved += [flag, str(files[-1])]
    return resolved, files
