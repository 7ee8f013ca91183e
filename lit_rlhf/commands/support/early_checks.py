"""Wrong names of settings, found before torch is imported: in a second where the parse takes several.

Only what the parse is sure to refuse is refused here, with the same line; all else is left to it. A setting is compared
with the class that every file and argument names, if that is one of this library.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from typing import NamedTuple

import yaml

from lit_rlhf.commands.support.class_index import ClassInfo, find_class, public_names, trainer_parameters
from lit_rlhf.commands.support.config_locations import ConfigLocations, iter_scalars
from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean

COMMON = ("config", "help", "print_config")
SECTIONS = ("seed_everything", "trainer", "model", "data", "run_dir")
PACKAGES = {"model": "lit_rlhf.modules", "data": "lit_rlhf.data"}  # of classes that go by their name alone
# whose classes can be named without their module
NAMED_PACKAGES = (
    *PACKAGES.values(),
    "lit_rlhf.callbacks",
    "lit_rlhf.generation",
    "lit_rlhf.rewards",
    "lit_rlhf.rollout",
)
EMPTY, MERGE = "{}", "tag:yaml.org,2002:merge"
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


class Setting(NamedTuple):
    """A setting of one file or argument.

    Attributes:
        path: its name, without `init_args`.
        value: its text, that of an empty mapping too; None for a list.
    """

    path: tuple[str, ...]
    value: str | None


def check_names(command: str, locations: ConfigLocations) -> None:
    """Refuse a setting that the command, the Trainer or a class of this library does not have.

    Args:
        command: fit, validate, test or evaluate.
        locations: of the settings in files and arguments.

    Raises:
        UserError: the line that the parse would give.
    """
    settings = list(iter_settings(locations))
    if any("help" in setting.path for setting in settings):
        return
    known = known_options(command)
    if known is not None:
        check_options(*known, settings, locations)
    for section in PACKAGES if command != "evaluate" else ():
        check_class((section,), settings, locations)


def known_options(command: str) -> tuple[list[str], dict[str, tuple[str, ...]]] | None:
    """Return the options of a command, and the settings of the groups among them; None where they are not known."""
    if command == "evaluate":
        evaluation = find_class("lit_rlhf.evaluation.run.Evaluation")
        if evaluation is None or evaluation.settings is None:
            return None
        return [*COMMON, *evaluation.settings, "trainer"], {"trainer": ("logger",)}
    trainer, method = trainer_parameters("__init__"), trainer_parameters(command)
    if trainer is None or method is None:
        return None
    return [*COMMON, *SECTIONS, *method, *(["overwrite"] if command == "fit" else [])], {"trainer": trainer}


def check_options(
    options: list[str], groups: dict[str, tuple[str, ...]], settings: list[Setting], locations: ConfigLocations
) -> None:
    """Refuse a setting that is neither one of `options` nor in one of the `groups` among them."""
    dotted = [*options, *(f"{group}.{name}" for group, names in groups.items() for name in names)]
    for path, value in settings:
        if value is None:  # a list
            continue
        if path[0] not in options:
            name, wrong = ".".join(path), path[0]
        elif len(path) > 1 and path[0] in groups and path[1] not in groups[path[0]]:
            name, wrong = ".".join(path[:2]), path[1]
        else:
            continue
        raise UserError(f"no setting {name!r}{did_you_mean(name, dotted)}{locations.locate_setting(wrong)}")


def check_class(path: tuple[str, ...], settings: list[Setting], locations: ConfigLocations, default: str = "") -> None:
    """Refuse a setting that the class at a path does not have, and those that the classes below it do not have.

    Args:
        path: of the setting that takes the class.
        settings: of all files and arguments.
        locations: of these.
        default: dotted path of the class that the setting is annotated with; used if no source names one, and it is a
            dataclass.
    """
    depth = len(path)
    below = [each.path[depth:] for each in settings if len(each.path) > depth and each.path[:depth] == path]
    named = {s.value for s in settings if s.path in (path, (*path, "class_path")) and s.value not in (None, EMPTY)}
    info = find_named_class(path, named) if named else find_class(default)
    if info is None or info.settings is None or not (named or info.is_dataclass):
        return
    for name, *_ in below:
        if name not in info.settings and name not in CLASS_KEYS:
            suggestion = did_you_mean(name, [*info.settings, "init_args", "class_path"])
            where = locations.locate_setting(name)
            raise UserError(f"{'.'.join(path)}: {info.name} has no setting {name!r}{suggestion}{where}")
    for name in dict.fromkeys(parts[0] for parts in below if parts[0] in info.settings):
        kind, is_optional, _ = info.settings[name].partition(" | None")
        check_class((*path, name), settings, locations, f"{info.module}.{kind}" if is_optional else "")


def find_named_class(path: tuple[str, ...], names: set[str]) -> ClassInfo | None:
    """Return the class that all sources name at a path, in full or by its name alone; None if it is not known."""
    if len(names) > 1:
        return None
    (name,) = names
    if "." in name:
        return find_class(name)
    packages = [PACKAGES[path[0]]] if len(path) == 1 else NAMED_PACKAGES
    found = [info for package in packages if (info := find_class(f"{package}.{name}")) is not None]
    return found[0] if found else None


def import_named_classes(locations: ConfigLocations) -> None:
    """Import the classes of this library that are named without their module: the parse finds imported ones alone."""
    words = {node.value for tree in locations.trees.values() for node in iter_scalars(tree)}
    words.update(word for arg in locations.args for word in re.findall(r"\w+", arg))
    for package in NAMED_PACKAGES:
        for name in words.intersection(public_names(package)):
            getattr(import_module(package), name)


def import_wandb(locations: ConfigLocations) -> None:
    """Import W&B if the run logs to it.

    Each of its classes looks through all modules that are imported: before torch and transformers that takes a sixth of
    the time that it takes behind them, when the run starts.
    """
    if any(arg.startswith(("--help", "--print_config")) for arg in locations.args):
        return
    words: list[str] = []
    for tree in locations.trees.values():
        logger = find_node(tree, "trainer", "logger")
        words = words if logger is None else [scalar.value for scalar in iter_scalars(logger)]
    for arg in locations.args:
        words = [arg] if arg.startswith("--trainer.logger=") else words
    if any(word.endswith("WandbLogger") for word in words):
        import_module("wandb.apis.public")


def find_node(tree: yaml.Node | None, *keys: str) -> yaml.Node | None:
    """Return the value below nested keys, or None."""
    for key in keys:
        pairs = tree.value if isinstance(tree, yaml.MappingNode) else []
        tree = next((value for name, value in pairs if name.value == key), None)
    return tree


def iter_settings(locations: ConfigLocations) -> Iterator[Setting]:
    """Yield the settings of all files, then those of the arguments."""
    for tree in locations.trees.values():
        yield from iter_node(tree, ())
    for arg in locations.args:
        key, equals, text = arg.removeprefix("--").partition("=")
        path = tuple(part for part in key.rstrip("+").split(".") if part != "init_args")
        if path:
            yield Setting(path, text if equals else "")


def iter_node(node: yaml.Node, path: tuple[str, ...]) -> Iterator[Setting]:
    """Yield the settings of a YAML mapping, down to the lists and to empty mappings."""
    if not isinstance(node, yaml.MappingNode):
        yield Setting(path, node.value if isinstance(node, yaml.ScalarNode) else None)
        return
    if not node.value and path:
        yield Setting(path, EMPTY)
    for key, value in node.value:
        if key.tag == MERGE:  # of a mapping, or of several
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                yield from iter_node(merged, path)
            continue
        name = str(key.value).rstrip("+")
        inner = (*path, *(part for part in name.split(".") if part != "init_args"))
        yield from iter_node(value, inner)
