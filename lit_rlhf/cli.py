"""The `lit-rlhf` command: finds the subcommand, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done, 2 the user's mistake (one line on stderr), 130 interrupted, 143 stopped by SIGTERM,
1 ours (traceback).
Nothing heavy is imported here: a subcommand imports what it needs when it runs.
"""

import os
import sys
from importlib import import_module

import lit_rlhf
from lit_rlhf.commands.support.suggestions import did_you_mean, one_line, pip_command
from lit_rlhf.errors import UserError

COMMANDS = {
    "quickstart": "run the whole procedure in the synthetic world, offline: report.html and report.json",
    "fit": "train from recipes: lit-rlhf fit -c RECIPE [-c OVERLAY ...] [--key=value ...]",
    "validate": "one pass over the validation data, same arguments as fit",
    "test": "one pass over the test data, same arguments as fit",
    "plan": "memory a device that a recipe needs, before it runs: plan -c RECIPE [-c OVERLAY ...] [--gpu NAME]",
    "recipes": "list the shipped recipes, or copy one: recipes ls, recipes cp NAME DEST",
    "export": "Lightning checkpoint to a folder that plain transformers loads: export CHECKPOINT DIR",
    "evaluate": "the paper's evaluation of models, with a report: evaluate -c RECIPE [--key=value ...]",
    "labelers": "do labelers agree, does a reward model carry over to others: labelers agreement | folds ...",
    "generate": "one answer, or a chat at the terminal: generate --model DIR [--prompt TEXT]",
    "rank": "score and rank completions with a reward model or several: rank --model DIR [FILE]",
    "best-of-n": "sample n responses a prompt, keep the best by a reward: best-of-n --model DIR --reward DIR ...",
    "sweep": "one run at several values of a setting and several seeds: sweep -c RECIPE --over KEY=V1,V2,...",
}
# one module runs all three Trainer methods; a file's name has no hyphen
MODULES = {"validate": "fit", "test": "fit", "best-of-n": "best_of_n"}
READ_ONLY = {"recipes", "--help", "-h", "--print_config"}  # often piped into head


def entry() -> None:
    """The console script."""
    args = sys.argv[1:]
    try:
        code = main(args)
        sys.stdout.flush()
    except BrokenPipeError:
        if args and not READ_ONLY & set(args):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader (head, less) has seen enough
        code = 0
    sys.exit(code)


def main(args: list[str]) -> int:
    """Run one command in this process and return its exit code: 0, 2 (user's mistake), 130 (interrupted) or 143
    (stopped by SIGTERM).

    Anything unforeseen propagates.
    """
    try:
        return dispatch(args)
    except UserError as problem:
        print(f"error: {one_line(str(problem))}", file=sys.stderr)
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
    except SystemExit as stop:  # --help and --print_config end this way
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def dispatch(args: list[str]) -> int:
    """Find and run the subcommand."""
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0
    command, rest = args[0], args[1:]
    if command == "--version":
        print(f"lit-rlhf {lit_rlhf.__version__}")
        return 0
    if command not in COMMANDS:
        raise UserError(f"no command {command!r}{did_you_mean(command, COMMANDS)}; lit-rlhf --help lists them")
    module = import_module(f"lit_rlhf.commands.{MODULES.get(command, command)}")
    return int(module.run(command, rest))


def overview() -> str:
    """The text of `lit-rlhf --help`."""
    lines = ["usage: lit-rlhf COMMAND ...", "", "InstructGPT as Lightning modules.", ""]
    lines += [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join([*lines, "", "lit-rlhf COMMAND --help says more; lit-rlhf --version prints the version."])
