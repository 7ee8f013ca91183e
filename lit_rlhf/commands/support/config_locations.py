"""Locate where a setting was written: the `-c` file and line, or the command line."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from lit_rlhf.errors import UserError


class ConfigLocations:
    """Locations of the settings in one command's `-c` files and arguments.

    Args:
        files: in the order given; a later one overrides earlier ones.
        args: the command-line arguments, which override all files.
    """

    def __init__(self, files: list[Path], args: list[str]) -> None:
        self.args = [arg for arg in args if arg.startswith("--")]
        self.trees = {path: parse_yaml(path) for path in files}

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


def parse_yaml(path: Path) -> yaml.Node | None:
    """Return the YAML nodes of a file, which know their lines.

    Raises:
        UserError: it cannot be read, is not YAML, or is no mapping.
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
    if tree is not None and not isinstance(tree, yaml.MappingNode):
        raise UserError(f"{path}: a recipe is a mapping with keys such as trainer, model and data")
    return tree


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
