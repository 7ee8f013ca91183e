"""Values as Python writes them, in arguments: the agent of a W&B sweep gives them so, and jsonargparse to itself."""

import ast
import json
from collections.abc import Sequence
from typing import Any


class NestedValues:
    """A parser of jsonargparse that takes null below a dataclass: `--model.sampling.top_p=null`.

    jsonargparse reads such a value, and passes it on to the parser of the dataclass in an argument, as Python writes
    it: None would be a text there. A mixin, to stand before the parser.
    """

    def parse_args(self, args: Sequence[str] | None = None, *positional: Any, **settings: Any) -> Any:
        """Parse arguments; those that jsonargparse gives come with `defaults`."""
        if args is not None and "defaults" in settings:
            args = read_python_arguments(args)
        return super().parse_args(args, *positional, **settings)  # type: ignore[misc]


def read_python_arguments(args: Sequence[str]) -> list[str]:
    """Return arguments whose values are written as Python does, with the values in YAML."""
    parts = [arg.partition("=") for arg in args]
    return [f"{name}{equals}{read_python_value(value)}" for name, equals, value in parts]


def read_python_value(text: str) -> str:
    """Return a value that Python wrote as YAML; a text that is no value of Python, such as a name, is its own."""
    if text == "None":
        return "null"
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.dumps(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError):  # YAML already
        return text
