"""The command line of a run as it goes into its records: names of shipped recipes, no credentials."""

import shlex
from collections.abc import Sequence

from lit_rlhf.commands.recipes import shipped_recipes
from lit_rlhf.secrets import without_secrets

CONFIG_FLAGS = ("-c", "--config")


def name_configs(args: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Return the arguments with the names of shipped recipes in place of their files, and the names after `-c`."""
    names = {str(path): name for name, path in shipped_recipes().items()}
    named: list[str] = []
    configs: list[str] = []
    for position, word in enumerate(args):
        flag, equals, value = word.partition("=")
        if flag in CONFIG_FLAGS and equals:
            configs.append(names.get(value, value))
            word = f"{flag}={configs[-1]}"
        elif position and args[position - 1] in CONFIG_FLAGS:
            configs.append(names.get(word, word))
            word = configs[-1]
        named.append(word)
    return named, tuple(configs)


def format_command(command: str, args: Sequence[str]) -> str:
    """Return the command line, with "removed" in place of every credential."""
    words = []
    for position, word in enumerate(args):
        flag, equals, value = word.partition("=")
        before = args[position - 1] if position else ""
        if word.startswith("--") and equals:
            word = f"{flag}={without_secrets(value, flag.removeprefix('--').split('.'))}"
        elif before.startswith("--") and "=" not in before:
            word = str(without_secrets(word, before.removeprefix("--").split(".")))
        else:
            word = str(without_secrets(word))
        words.append(word)
    return shlex.join(["lit-rlhf", command, *words])
