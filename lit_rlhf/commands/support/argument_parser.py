"""An argparse parser whose errors are one line with the nearest right option."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_rlhf.commands.support.home_folders import expand_home
from lit_rlhf.commands.support.seeds import check_seed
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UserError` and accepts no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", None, read_path)  # an argument that is no path has an explicit type
        self.register("type", Path, lambda text: Path(read_path(text)))

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise UserError(f"{self.prog}: {message}")

    def parse(self, args: Sequence[str]) -> argparse.Namespace:
        """Parse all of `args`.

        Raises:
            UserError: an unknown option, a missing argument, an argument of the wrong type, or a seed out of range.
        """
        options = [option for action in self._actions for option in action.option_strings]
        names = [arg.split("=")[0] for arg in args if re.match(r"--[a-z][a-z-]*(=|$)", arg)]
        unknown = [name for name in names if name not in options]
        if unknown:  # argparse would report a missing argument first
            name = unknown[0]
            raise UserError(f"{self.prog} has no option {name!r}{did_you_mean(name, options)}")
        parsed = self.parse_args(args)
        if isinstance(vars(parsed).get("seed"), int):
            check_seed(parsed.seed, f"{self.prog}: --seed")
        return parsed


def read_action(command: str, usage: str, actions: Mapping[str, str], args: Sequence[str]) -> str | None:
    """Return the action that the arguments of a command begin with; None if they ask for help, which is printed.

    Args:
        command: such as "lit-rlhf recipes".
        usage: of its actions, in a line.
        actions: name -> what it does.
        args: of the command.

    Raises:
        UserError: there is no such action.
    """
    if not args or args[0] in ("-h", "--help"):
        print(f"usage: {command} {usage}\n")
        width = max(map(len, actions)) + 2
        print("\n".join(f"  {name:<{width}}{summary}" for name, summary in actions.items()))
        return None
    if args[0] not in actions:
        *others, last = actions
        choices = f"{', '.join(others)} or {last}"
        raise UserError(f"{command} has no action {args[0]!r}{did_you_mean(args[0], actions)}: it is {choices}")
    return args[0]


def read_path(text: str) -> str:
    """Return a path with the home folder for `~`; an empty one would be the working directory.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("its value is empty")
    return expand_home(text)
