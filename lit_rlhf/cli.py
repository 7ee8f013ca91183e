"""The `lit-rlhf` command: runs a subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 a user error (one line on stderr), 130 interrupted, 143 stopped by SIGTERM, 1 a bug (traceback).
Nothing heavy is imported here: a subcommand imports what it needs when it runs.
"""

import os
import sys
from importlib import import_module

import lit_rlhf
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean, pip_command

COMMANDS = {
    "quickstart": "run the full procedure in the synthetic world, offline: report.html and report.json",
    "fit": "train from recipes: lit-rlhf fit -c RECIPE [-c OVERLAY ...] [--key=value ...]",
    "validate": "one pass over the validation data, same arguments as fit",
    "test": "one pass over the test data, same arguments as fit",
    "plan": "estimate the memory per device before a run: plan -c RECIPE [-c OVERLAY ...] [--gpu NAME]",
    "recipes": "list the shipped recipes, or copy one: recipes ls, recipes cp NAME DEST",
    "export": "convert a Lightning checkpoint to a transformers folder: export CHECKPOINT DIR",
    "evaluate": "evaluate models as in the paper, with a report: evaluate -c RECIPE [--key=value ...]",
    "labelers": "labeler agreement, and reward models on held-out labelers: labelers agreement | folds ...",
    "generate": "one response, or a chat at the terminal: generate --model DIR [--prompt TEXT]",
    "rank": "score and rank completions with one or more reward models: rank --model DIR [FILE]",
    "best-of-n": "sample n responses per prompt, keep the best by a reward: best-of-n --model DIR --reward DIR ...",
    "sweep": "one run at several values of a setting and several seeds: sweep -c RECIPE --over KEY=V1,V2,...",
}
# one module runs all three Trainer methods; a module name cannot contain a hyphen
MODULES = {"validate": "fit", "test": "fit", "best-of-n": "best_of_n"}
READ_ONLY = {"recipes", "--help", "-h", "--print_config"}  # often piped into head


def entry() -> None:
    """Run as the console script."""
    args = sys.argv[1:]
    try:
        code = main(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if args and not READ_ONLY & set(args):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has closed the pipe
        code = 0
    sys.exit(code)


def main(args: list[str]) -> int:
    """Run one command in this process and return its exit code; unforeseen exceptions propagate.

    Returns:
        0, 2 (user error), 130 (interrupted) or 143 (stopped by SIGTERM).
    """
    try:
        return dispatch(args)
    except UserError as problem:
        print(f"error: {' '.join(str(problem).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        install = pip_command(missing.name)
        if install is None:
            raise
        print(f"error: this run needs the package {missing.name!r}, which is not installed: {install}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # raised by --help and --print_config
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def dispatch(args: list[str]) -> int:
    """Run the subcommand that `args` name and return its exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(help_text())
        return 0
    command, rest = args[0], args[1:]
    if command == "--version":
        print(f"lit-rlhf {lit_rlhf.__version__}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}{did_you_mean(command, COMMANDS)}; lit-rlhf --help lists them")
    module = import_module(f"lit_rlhf.commands.{MODULES.get(command, command)}")
    return int(module.run(command, rest))


def help_text() -> str:
    """Return the text of `lit-rlhf --help`."""
    lines = ["usage: lit-rlhf COMMAND ...", "", "InstructGPT as Lightning modules.", ""]
    lines += [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", "lit-rlhf COMMAND --help says more; lit-rlhf --version prints the version."])
