"""The `lit-rlhf` command: runs a subcommand, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 a user error (one line on stderr), 130 interrupted, 143 stopped by SIGTERM, 1 a bug (traceback).
Nothing heavy is imported here: a subcommand imports what it needs when it runs.
"""

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

import lit_rlhf
from lit_rlhf.commands.support.busy_machine import settle_threads
from lit_rlhf.commands.support.console import set_verbosity, take_verbose, terminal_width, wrap_words
from lit_rlhf.commands.support.library_errors import explain_library_error
from lit_rlhf.commands.support.log_filters import restored_log_filters
from lit_rlhf.errors import UserError
from lit_rlhf.secrets import mask_message
from lit_rlhf.suggestions import did_you_mean, pip_command

COMMANDS = {
    "quickstart": "run the full procedure in the synthetic world, offline: report.html and report.json",
    "real": "the same with a real model of 135 M parameters on real data; real --tiny is a first look",
    "paper": "figures of the paper's results in the synthetic world: paper [--only fig1,...] [--seeds 0,1]",
    "fit": "train from recipes: lit-rlhf fit -c RECIPE [-c OVERLAY ...] [--key=value ...]",
    "validate": "one pass over the validation data, same arguments as fit",
    "test": "one pass over the test data, same arguments as fit",
    "plan": "estimate the memory per device before a run: plan -c RECIPE [-c OVERLAY ...] [--gpu NAME]",
    "recipes": "list, print or copy the shipped recipes: recipes ls | show NAME | cp NAME DEST",
    "model": "a small instruction model, or a GGUF file, as a transformers folder: model get NAME DIR",
    "export": "convert a Lightning checkpoint to a transformers folder: export CHECKPOINT DIR",
    "evaluate": "evaluate models as in the paper, with a report: evaluate -c RECIPE [--key=value ...]",
    "labelers": "labeler agreement, and reward models on held-out labelers: labelers agreement | folds ...",
    "label": "people write, rank, rate or compare outputs in a browser; label export | import: their answers",
    "chat": "talk to one or two models in a browser, side by side, and vote: chat --model A [--model B]",
    "generate": "one response, or a chat at the terminal: generate --model DIR [--prompt TEXT]",
    "rank": "score and rank completions with one or more reward models: rank --model DIR [FILE]",
    "best-of-n": "sample n responses per prompt, keep the best by a reward: best-of-n --model DIR --reward DIR ...",
    "lineage": "what a model was made from, what of it changed, and its compute: lineage DIR [--html FILE]",
    "workspace": "a view of a Weights & Biases project for all stages: workspace [--project NAME]",
    "sweep": "one run at several values of a setting and several seeds: sweep -c RECIPE --over KEY=V1,V2,...",
}
# one module runs all three Trainer methods; a module name cannot contain a hyphen
MODULES = {"validate": "fit", "test": "fit", "best-of-n": "best_of_n"}
TRACEBACK = "LIT_RLHF_TRACEBACK"  # environment variable: print the traceback of an error of another library too
LINKED = ("callbacks", "recipes")  # folders of the package that a checkout has at its top
# without training; the runs of a sweep and the stages of the paper are commands of their own
LIGHT = {"plan", "recipes", "model", "export", "label", "lineage", "sweep", "workspace", "paper"}
READ_ONLY = {"recipes", "--help", "-h", "--print_config"}  # often piped into head


def entry() -> None:
    """Run as the console script."""
    args = sys.argv[1:]
    if args and args[0] in COMMANDS.keys() - LIGHT and not READ_ONLY & set(args):
        line = settle_threads(os.environ)
        if line is not None:
            print(wrap_words(line, terminal_width(sys.stderr)), file=sys.stderr)
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
        print_error(str(problem))
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
    except Exception as problem:
        line = explain_library_error(problem)
        if line is None:
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        print_error(f"{line} ({TRACEBACK}=1 shows the traceback)")
        return 2


def print_error(message: str) -> None:
    """Print a message in one line on stderr, without credentials."""
    print(f"error: {mask_message(' '.join(message.split()))}", file=sys.stderr)


def check_checkout() -> None:
    """Refuse a checkout whose symbolic links are text files, as Git leaves them on Windows."""
    package = Path(lit_rlhf.__file__).parent
    for name in LINKED:
        if not (package / name).is_dir():
            raise UserError(
                f"{package / name} is not a folder: this checkout was made without symbolic links; clone it with git "
                "clone -c core.symlinks=true, or install the wheel"
            )


def dispatch(args: list[str]) -> int:
    """Run the subcommand that `args` name and return its exit code."""
    check_checkout()
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
    rest, verbosity = take_verbose(rest)
    with set_verbosity(verbosity), restored_log_filters():
        return int(module.run(command, rest))


def help_text() -> str:
    """Return the text of `lit-rlhf --help`."""
    lines = ["usage: lit-rlhf COMMAND ...", "", "InstructGPT as Lightning modules.", ""]
    lines += [f"  {name:<12}{summary}" for name, summary in COMMANDS.items()]
    more = "lit-rlhf COMMAND --help says more, lit-rlhf COMMAND -v prints more; lit-rlhf --version prints the version."
    return "\n".join([*lines, "", more])
