"""Home folders: `~/` and `~user/` at the beginning of an argument, or of a value in a recipe."""

import os
import re
from typing import Any

from lit_rlhf.errors import UserError

HOME = re.compile(r"~([a-z_][\w.-]*)?/")


def expand_home(value: Any) -> Any:
    """Return a value in which `~/` and `~user/` at the beginning of a text are home folders.

    Raises:
        UserError: there is no user of that name.
    """
    if isinstance(value, dict):
        return {key: expand_home(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [expand_home(entry) for entry in value]
    if not isinstance(value, str) or HOME.match(value) is None:
        return value
    expanded = os.path.expanduser(value)
    if expanded == value:
        raise UserError(f"{value}: there is no user {value.split('/')[0][1:]!r}; write the path in full")
    return expanded


def expand_arguments(args: list[str]) -> list[str]:
    """Return the arguments of a command with home folders in place of `~/`, as `x` or as `--key=x`."""
    flags = [re.fullmatch(r"(--?[\w.+-]+=)(.*)", arg, re.DOTALL) for arg in args]
    return [flag[1] + expand_home(flag[2]) if flag else expand_home(arg) for flag, arg in zip(flags, args)]
