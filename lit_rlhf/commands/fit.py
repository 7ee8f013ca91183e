"""`lit-rlhf fit`, `validate` and `test`: Lightning's CLI on recipes."""

import os
import signal
import sys
from pathlib import Path

from lit_rlhf.commands.recipes import find_recipe
from lit_rlhf.commands.support.config_locations import ConfigLocations, check_arguments, install_yaml_rules
from lit_rlhf.commands.support.home_folders import expand_arguments
from lit_rlhf.commands.support.log_filters import install_log_filters
from lit_rlhf.errors import UserError


def run(command: str, args: list[str]) -> int:
    """Run one of the Trainer's methods with the recipes and arguments; return the exit code.

    Raises:
        UserError: an error in the recipes, the arguments or the data.
    """
    install_log_filters()
    args, locations = read_arguments(args)
    from lit_rlhf.commands.support.recipe_cli import RecipeCLI

    handler = signal.getsignal(signal.SIGINT)
    try:
        return RecipeCLI(command, args, locations).exit_code
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves SIGINT ignored after an interrupt


def read_arguments(args: list[str]) -> tuple[list[str], ConfigLocations]:
    """Return the arguments with a file for every recipe name, and the locations of settings.

    It also appends the working directory to `sys.path`, so that a `class_path` can name the user's own file.

    Raises:
        UserError: a recipe is missing or cannot be read, or an argument holds a credential.
    """
    check_arguments(args)
    install_yaml_rules()
    args, files = resolve_recipes(expand_arguments(args))
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that it shadows no package
    return args, ConfigLocations(files, args)


def resolve_recipes(args: list[str]) -> tuple[list[str], list[Path]]:
    """Replace every recipe name after `-c` or `--config` by its file; return the arguments and the files.

    Raises:
        UserError: no file or recipe of that name, or no name after `-c`.
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
        files.append(find_recipe(name))
        resolved += [flag, str(files[-1])]
    return resolved, files
