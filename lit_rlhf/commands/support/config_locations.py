"""Read recipes, and locate where a setting was written: the `-c` file and line, or the command line.

Every YAML text that a command gets follows one set of rules: no setting stands twice, none holds a credential, and `~/`
at the beginning of a value is the home folder.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.commands.support.home_folders import expand_home
from lit_rlhf.errors import UserError
from lit_rlhf.secrets import FIX, drop_secrets, without_secrets


class RefusedYAML(Exception):
    """A YAML text that breaks a rule. Not a ValueError, which jsonargparse would take for a value of another type.

    Args:
        line: 1-based, of the setting.
        reason: in words.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class ConfigLocations:
    """Locations of the settings in one command's `-c` files and arguments.

    Args:
        files: in the order given; a later one overrides earlier ones.
        args: the command-line arguments, which override all files.
    """

    def __init__(self, files: list[Path], args: list[str]) -> None:
        self.args = [arg for arg in args if arg.startswith("--")]
        self.trees = {path: parse_yaml(path) for path in files}
        self.check_named_files()

    def locate_setting(self, name: str, value: str | None = None) -> str:
        """Return " [file:line]" of the setting `name` (with that value, if given), " [command line]", or ""."""
        for arg in self.args:
            key, _, text = arg.removeprefix("--").partition("=")
            if name in key.rstrip("+").split(".") and (value is None or text in ("", value)):
                return " [command line]"
        for path, tree in reversed(self.trees.items()):
            for key_node, value_node in iter_settings(tree):
                written = getattr(value_node, "value", None)
                if name in key_node.value.rstrip("+").split(".") and (value is None or written == value):
                    return f" [{path}:{key_node.start_mark.line + 1}]"
        return "" if value is None else self.locate_setting(name)

    def locate_value(self, value: str) -> str:
        """Return " [file:line]" of a value such as a class path, " [command line]", or ""."""
        if any(value in arg for arg in self.args):
            return " [command line]"
        for path, tree in reversed(self.trees.items()):
            for node in iter_scalars(tree):
                if node.value == value:
                    return f" [{path}:{node.start_mark.line + 1}]"
        return ""

    def check_named_files(self) -> None:
        """Check the YAML files that settings name, such as `model: model.yaml`, at any depth.

        Raises:
            UserError: one breaks a rule of this module.
        """
        names = [arg.partition("=")[2] for arg in self.args]
        names += [node.value for tree in self.trees.values() for node in iter_scalars(tree)]
        checked: set[Path] = set()
        for name in names:  # grows
            path = Path(str(expand_home(name))) if name.endswith((".yaml", ".yml")) else None
            if path is None or path in checked or not path.is_file():
                continue
            checked.add(path)
            try:
                tree: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            except (OSError, UnicodeDecodeError, yaml.YAMLError):  # no settings, or jsonargparse says what is wrong
                continue
            check_rules(tree, path)
            names += [node.value for node in iter_scalars(tree)]


def parse_yaml(path: Path) -> yaml.MappingNode:
    """Return the YAML nodes of a file, which know their lines.

    Raises:
        UserError: it cannot be read, is not YAML, it or its trainer is no mapping, or it breaks a rule of this module.
    """
    try:
        tree: yaml.Node | None = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot read {path}: {problem}") from None
    except yaml.MarkedYAMLError as problem:
        line = "" if problem.problem_mark is None else f", line {problem.problem_mark.line + 1}"
        raise UserError(f"{path}{line}: not valid YAML: {problem.problem or problem.context}") from None
    except yaml.YAMLError as problem:
        raise UserError(f"{path}: not valid YAML: {problem}") from None
    check_rules(tree, path)
    if not isinstance(tree, yaml.MappingNode):  # None of an empty file
        raise UserError(f"{path}: a recipe is a mapping with keys such as trainer, model and data")
    for key, value in tree.value:
        is_file = isinstance(value, yaml.ScalarNode) and value.value.endswith((".yaml", ".yml"))
        if key.value == "trainer" and not isinstance(value, yaml.MappingNode) and not is_file:
            line = key.start_mark.line + 1
            raise UserError(f"{path}:{line}: trainer is a mapping of settings, such as trainer: {{max_steps: 100}}")
    return tree


def check_rules(tree: yaml.Node | None, path: Path) -> None:
    """Refuse a file with a setting that stands twice, or with a credential.

    Raises:
        UserError: names the file and the line.
    """
    try:
        check_tree(tree)
        check_credentials(tree)
    except RefusedYAML as refused:
        raise UserError(f"{path}:{refused.line}: {refused}") from None


def install_yaml_rules() -> None:
    """Make jsonargparse read and write YAML by the rules of this module.

    It reads values of arguments, and files that settings name. It writes what `--print_config` prints, config.yaml and
    the recipe in a checkpoint: without the credentials that are defaults of a class, which takes them again when read.
    """
    from jsonargparse import get_loader, set_dumper, set_loader

    load = get_loader("yaml")
    if load.__module__ != __name__:
        set_loader("yaml", apply_rules(load), exceptions=(yaml.YAMLError,))
        set_dumper("yaml", lambda config: yaml.safe_dump(drop_secrets(config), sort_keys=False, allow_unicode=True))


def apply_rules(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a YAML loader that raises `RefusedYAML` for a text that breaks a rule of this module."""

    def load_by_rules(text: str) -> Any:
        check_tree(yaml.compose(text, Loader=yaml.SafeLoader))
        try:
            return expand_home(load(text))
        except UserError as problem:
            raise RefusedYAML(1, str(problem)) from None

    return load_by_rules


def check_arguments(args: list[str]) -> None:
    """Refuse a credential in the arguments of a command, and a value that breaks a rule of this module.

    Raises:
        UserError: names the setting, and not its value.
    """
    for arg, following in zip(args, [*args[1:], ""]):
        name, equals, text = arg.partition("=")
        if not name.startswith("-"):
            name, text = "", arg
        elif not equals:
            text = "" if following.startswith("-") else following
        setting = name.lstrip("-")
        if setting.endswith("+") and text in ("null", "~"):
            raise UserError(f"{setting} has no value; name what to append, or remove it [command line]")
        try:
            value: Any = text
            if text[:1] in ("{", "["):
                check_tree(yaml.compose(text, Loader=yaml.SafeLoader))
                value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        except RefusedYAML as refused:
            raise UserError(f"{setting or 'an argument'}: {refused} [command line]") from None
        if without_secrets(value, setting.split(".")) != value:
            raise UserError(f"{setting or 'an argument'} holds a credential, and {FIX} [command line]")


def check_tree(root: yaml.Node | None) -> None:
    """Refuse a setting that stands twice, also as `a: {b: ...}` and `a.b: ...`, an endless value, and an empty `name+`.

    Raises:
        RefusedYAML: names the setting and both lines.
    """
    first: dict[tuple[str, ...], int] = {}  # full name of a plain setting -> line
    for path, node, line in iter_leaves(root):
        if path and path[-1].endswith("+") and node.tag.endswith(":null"):  # the parse would drop what is in the list
            raise RefusedYAML(line, f"{'.'.join(path)!r} has no value; name what to append, or remove it")
        if path in first:
            raise RefusedYAML(line, f"{'.'.join(path)!r} stands twice (first in line {first[path]})")
        first[path] = line


def check_credentials(root: yaml.Node | None) -> None:
    """Refuse a credential.

    Raises:
        RefusedYAML: names the setting, and not its value.
    """
    for path, node, line in iter_leaves(root):
        names = [part for part in path if not part.startswith("[")]
        is_text = isinstance(node, yaml.ScalarNode) and not node.tag.endswith((":null", ":bool"))
        if is_text and without_secrets(node.value, names) != node.value:
            raise RefusedYAML(line, f"{'.'.join(names) or 'a value'} holds a credential, and {FIX}")


def iter_leaves(
    node: yaml.Node | None, path: tuple[str, ...] = (), line: int = 1, within: tuple[yaml.Node, ...] = ()
) -> Iterator[tuple[tuple[str, ...], yaml.Node, int]]:
    """Yield the full name, the node and the line of every list and plain value; an entry of a list is named "[0]".

    Raises:
        RefusedYAML: a mapping has a key twice, or a node holds itself.
    """
    if any(node is outer for outer in within):
        raise RefusedYAML(line, f"{'.'.join(path)!r} is an alias of what it stands in; write the value in full")
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise RefusedYAML(line, f"{name!r} stands twice (first in line {seen[name]})")
            seen[name] = line
            yield from iter_leaves(value, (*path, *name.split(".")), line, (*within, node))
    elif node is not None:
        yield path, node, line
        for index, entry in enumerate(node.value if isinstance(node, yaml.SequenceNode) else ()):
            yield from iter_leaves(entry, (*path, f"[{index}]"), entry.start_mark.line + 1, (*within, node))


def iter_settings(node: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Yield every key and its value, at any depth."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key, value
            yield from iter_settings(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from iter_settings(item)


def iter_scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Yield every scalar value, at any depth."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            yield from iter_scalars(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from iter_scalars(item)
