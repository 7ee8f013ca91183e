"""Imports by name: of a user's own function, and of a package's public names on first use."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean


class Function(Protocol):
    """A function, or another callable, given where YAML names one by its dotted path."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        ...


def function_name(function: str | Function) -> str:
    """Return the dotted path of a function, for messages and records."""
    if isinstance(function, str):
        return function
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{getattr(named, '__qualname__', '')}"


def import_function(path: str | Function, setting: str) -> Callable[..., Any]:
    """Import a function by its dotted path, from the working directory or an installed package.

    Args:
        path: The dotted path, such as "my_file.my_function"; a function is returned as it is.
        setting: The setting that names it, for error messages.

    Raises:
        UserError: There is no such module or function.
    """
    if not isinstance(path, str):
        if not callable(path):
            raise UserError(f"{setting}: a {type(path).__name__} is no function; give one, or its dotted path")
        return path
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"{setting}: {path!r} is not a dotted path such as my_file.my_function")
    working_directory = str(Path.cwd())
    if working_directory not in sys.path:
        sys.path.insert(0, working_directory)
    failure = f"{setting}: {path!r} cannot be imported from {working_directory!r}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{failure}: there is no module {error.name!r} here or among the installed ones") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"{failure}: {error}") from error
    if not hasattr(module, name):
        raise UserError(f"{failure}: {module_name} has no {name!r}{did_you_mean(name, dir(module))}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{setting}: {path!r} is a {type(function).__name__}, not a function")
    return cast(Callable[..., Any], function)


def import_public_name(package: str, modules: Mapping[str, Sequence[str]], name: str) -> Any:
    """Return a public name of a package, whose module is imported now: a `__getattr__` of the package (PEP 562).

    Args:
        package: The package, as its `__name__`.
        modules: Module, relative to the package, to the public names that it defines.
        name: The name.

    Raises:
        AttributeError: The package has no such public name.
    """
    for module, names in modules.items():
        if name in names:
            return getattr(importlib.import_module(f"{package}.{module}"), name)
    raise AttributeError(f"module {package!r} has no attribute {name!r}")
