"""What loggers and checkpoints know of a module's settings: plain values, never objects and never credentials.

An object is recorded by its class and those arguments of its constructor that it keeps. `load_from_checkpoint` builds
it again if these are all of them and the class is this library's; any other object is to be given once more.
"""

import inspect
import os
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from types import GeneratorType
from typing import Any, cast

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

from lit_rlhf.errors import UserError
from lit_rlhf.secrets import without_secrets

PACKAGE = "lit_rlhf."
LOST = "not_recorded"  # arguments of an object that are no plain values


def save_settings(owner: HyperparametersMixin, arguments: Mapping[str, Any]) -> None:
    """Save the arguments of a constructor as `hparams`; call it at the end of the constructor, with its `locals()`.

    Under LightningCLI, `hparams` are the recipe's settings, which the command logs itself.
    """
    parameters = inspect.signature(type(owner).__init__).parameters
    # a frame without callers: Lightning would collect, copy and compare the arguments of the constructors above
    frame = cast("GeneratorType[None, None, None]", (None for _ in ())).gi_frame
    owner.save_hyperparameters(frame=frame)
    from_recipe = dict(owner.hparams)
    for name, value in list(from_recipe.items()):  # a default that is a function is written as its repr
        if name in parameters and inspect.isroutine(parameters[name].default) and isinstance(value, str):
            del from_recipe[name]
    own = {
        name: describe(arguments[name])
        for name, parameter in parameters.items()
        if name in arguments
        and name != "self"
        and not (inspect.isroutine(parameter.default) and arguments[name] is parameter.default)
    }
    settings = without_secrets(plain(from_recipe) if from_recipe else own)
    owner.hparams.clear()
    owner.save_hyperparameters(settings, frame=frame, logger=not from_recipe)


def plain(value: Any) -> Any:
    """Return nested settings of a recipe as dicts and lists."""
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def describe(value: Any) -> Any:
    """Return a plain value that says what an argument was."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): describe(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [describe(each) for each in value]
    if inspect.isroutine(value) or inspect.isclass(value):
        return {"class_path": f"{value.__module__}.{value.__qualname__}", LOST: ["function"]}
    return _describe_object(value)


def _describe_object(value: Any) -> dict[str, Any]:
    kind = type(value)
    path = f"{kind.__module__}.{kind.__qualname__}"
    if is_dataclass(value):
        return {"class_path": path, "init_args": {f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    own = getattr(value, "__dict__", {})
    try:
        names = list(inspect.signature(kind).parameters)
    except ValueError:  # of a class in C
        names = ["arguments"]
    kept = {name: describe(own[name]) for name in names if name in own and _is_plain(own[name])}
    lost = [name for name in names if name not in kept]
    named = {"name": str(value.name_or_path)} if getattr(value, "name_or_path", None) else {}
    return {"class_path": path, "init_args": kept, **({LOST: lost} if lost else {}), **named}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def restore_settings(stored: Mapping[str, Any], given: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the arguments of a constructor from the `hparams` of a checkpoint.

    Args:
        stored: Of `save_settings`.
        given: Arguments that are given once more, and need not be restored.
        owner: The class, for the error message.

    Raises:
        UserError: An object cannot be built again, and is not given.
    """
    settings = {name: value for name, value in stored.items() if name not in given}
    missing = {name: _lost_part(value) for name, value in settings.items() if _lost_part(value)}
    if missing:
        named = ", ".join(f"{name}= (it was {what})" for name, what in missing.items())
        raise UserError(f"{owner}.load_from_checkpoint: a checkpoint holds no objects; give them again: {named}")
    return {name: _restore(value) for name, value in settings.items()}


def _lost_part(value: Any) -> str:
    """Return what cannot be built again, "" if all can."""
    if isinstance(value, list):
        return next(filter(None, map(_lost_part, value)), "")
    if not isinstance(value, dict):
        return ""
    path = str(value.get("class_path", ""))
    if path and (LOST in value or not path.startswith(PACKAGE)):
        return str(value.get("name") or path)
    return next(filter(None, map(_lost_part, value.values())), "")


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(each) for each in value]
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {key: _restore(each) for key, each in value.items()}
    module, _, name = value["class_path"].rpartition(".")
    kind = getattr(import_module(module), name)
    if not inspect.isclass(kind):
        raise UserError(f"the checkpoint names {value['class_path']!r}, which is no class of this library")
    return kind(**{key: _restore(each) for key, each in value["init_args"].items()})
