"""`lit-rlhf fit`, `validate` and `test`: Lightning's CLI on recipes."""

import os
import signal
import sys
from pathlib import Path
from textwrap import shorten, wrap

from lit_rlhf.commands.recipes import find_recipe, shipped_recipes
from lit_rlhf.commands.support.class_index import list_classes
from lit_rlhf.commands.support.config_locations import ConfigLocations, check_arguments, install_yaml_rules
from lit_rlhf.commands.support.early_checks import check_names, import_named_classes, import_wandb
from lit_rlhf.commands.support.home_folders import expand_arguments
from lit_rlhf.commands.support.log_filters import install_log_filters, install_warning_format
from lit_rlhf.commands.support.python_values import read_python_arguments
from lit_rlhf.commands.support.wandb_sweeps import in_sweep
from lit_rlhf.errors import UserError

HELP, HELP_WIDTH = {"-h", "--help"}, 80
WHAT = {
    "fit": "Train a module on a data module, as recipes say.",
    "validate": "One pass over the validation data of a trained module.",
    "test": "One pass over the test data of a trained module.",
}
USAGE = """\
usage: lit-rlhf {command} -c RECIPE [-c OVERLAY ...] [--KEY=VALUE ...]

{what}

  -c NAME              a shipped recipe (lit-rlhf recipes ls) or a file of yours
  --model.KEY=VALUE    a setting of the module: --model.optimizer.lr=1e-5
  --data.KEY=VALUE     of the data module: --data.path=rows.jsonl
  --trainer.KEY=VALUE  of Lightning's Trainer: --trainer.max_epochs=2
  --trainer.callbacks+=NAME, --trainer.callbacks.NAME.KEY=VALUE
  --run_dir=DIR        where all that the run writes goes
  --ckpt_path=PATH     a checkpoint; "last": the run's last
  --overwrite          replace the run that is in run_dir (fit alone)
  --print_config       print the composed recipe and stop
  -v                   print all that the libraries say, and full tables
  --help-all           every setting; --model.help=NAME: those of a class"""
# title, option, package, and the end of the names of these classes
KINDS = (
    ("Modules", "--model=NAME", "lit_rlhf.modules", "Module"),
    ("Data modules", "--data=NAME", "lit_rlhf.data", "DataModule"),
    ("Callbacks", "--trainer.callbacks+=NAME", "lit_rlhf.callbacks", ""),
)
# of every run, or the setting of another
NOT_FOR_RECIPES = ("RunState", "StopOnSignal", "TerminateOnNaN", "MetricLimit")


def run(command: str, args: list[str]) -> int:
    """Run one of the Trainer's methods with the recipes and arguments; return the exit code.

    Raises:
        UserError: an error in the recipes, the arguments or the data.
    """
    install_log_filters()
    if HELP & set(args):
        print(help_text(command))
        return 0
    args = read_python_arguments(args) if in_sweep(os.environ) else args
    args, locations = read_arguments(["--help" if arg == "--help-all" else arg for arg in args])
    check_names(command, locations)
    import_wandb(locations)
    import_named_classes(locations)
    from lit_rlhf.commands.support.recipe_cli import RecipeCLI

    install_warning_format()
    handler = signal.getsignal(signal.SIGINT)
    try:
        return RecipeCLI(command, args, locations).exit_code
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves SIGINT ignored after an interrupt


def help_text(command: str) -> str:
    """Return the text of `--help`, which needs no import of what it names."""
    lines = [*USAGE.format(command=command, what=WHAT[command]).splitlines()]
    for title, option, package, suffix in KINDS:
        lines += ["", f"{title} ({option})"]
        classes = [info for info in list_classes(package, suffix) if info.name not in NOT_FOR_RECIPES]
        if title == "Callbacks":
            names = ", ".join(info.name for info in classes)
            lines += wrap(names, HELP_WIDTH, initial_indent="  ", subsequent_indent="  ")
            continue
        width = max(len(info.name) for info in classes) + 2
        rows = [f"  {info.name:<{width}}" for info in classes]
        lines += [
            row + shorten(info.summary, HELP_WIDTH - len(row), placeholder=" …") for row, info in zip(rows, classes)
        ]
    return "\n".join(lines)


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
    words, previous = iter(args), ""
    for word in words:
        if not word.startswith("-") and (not previous.startswith("-") or "=" in previous):
            raise UserError(explain_surplus(word))
        previous = word
        flag, _, name = word.partition("=")
        if flag not in ("-c", "--config"):
            resolved.append(word)
            continue
        name = name or next(words, "")
        if not name:
            raise UserError(f"{flag} needs the name of a recipe or a file; lit-rlhf recipes ls lists the recipes")
        files.append(find_recipe(name))
        resolved += [flag, str(files[-1])]
        previous = f"{flag}={name}"
    return resolved, files


def explain_surplus(word: str) -> str:
    """Return what is wrong with a word that is neither an option nor its value."""
    if Path(word).is_file() or word.removesuffix(".yaml") in shipped_recipes():
        return f"{word} needs -c in front of it: -c {word}"
    return f"unexpected argument {word!r} [command line]"
