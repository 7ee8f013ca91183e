"""Change one setting of a full configuration by its dotted key, in which list entries are named by their class."""

import copy
from typing import Any

from jsonargparse import Namespace

from lit_rlhf.errors import UserError
from lit_rlhf.suggestions import did_you_mean


def set_value(config: dict[str, Any], key: str, value: Any, option: str = "--over ") -> dict[str, Any]:
    """Return a copy of a configuration with one setting changed.

    Args:
        config: from `compose_config`.
        key: dotted; `init_args` can be left out, and an entry of a list is named by its class or its index.
        value: the new value.
        option: what stands before the key in an error.

    Raises:
        UserError: there is no such setting, or a list has several entries of that class.
    """
    changed = copy.deepcopy(config)
    node: Any = changed
    *path, last = key.split(".")
    for part in path:
        node = find_child(node, part, f"{option}{key}")
    settings = find_mapping(node, last)
    if not isinstance(settings, dict) or last not in settings:
        raise UserError(f"{option}{key}: no setting {last!r}{did_you_mean(last, list_names(node))}")
    settings[last] = value
    return changed


def find_child(node: Any, part: str, key: str) -> Any:
    """Return the child of a configuration node by one part of a dotted key; `key` names all of it in an error."""
    if isinstance(node, list):
        found = [entry for entry in node if get_class_name(entry) == part]
        if part.isdigit() and int(part) < len(node):
            found = [node[int(part)]]
        if len(found) > 1:
            raise UserError(f"{key}: {len(found)} entries are a {part}; name one by its index, from 0")
        if found:
            return found[0]
    else:
        settings = find_mapping(node, part)
        if isinstance(settings, dict) and settings.get(part) is not None:
            return settings[part]
    raise UserError(f"{key}: no setting {part!r}{did_you_mean(part, list_names(node))}")


def find_mapping(node: Any, name: str) -> Any:
    """Return the mapping that should hold `name`: the node itself, or the `init_args` of its class."""
    if isinstance(node, dict) and name not in node and isinstance(node.get("init_args"), dict):
        return node["init_args"]
    return node


def list_names(node: Any) -> list[str]:
    """Return the names of a node's children, for a suggestion."""
    if isinstance(node, list):
        return [get_class_name(entry) for entry in node]
    return [*node, *(node.get("init_args") or {})] if isinstance(node, dict) else []


def get_class_path(setting: Any) -> str:
    """Return the class path in the settings of an object, or the setting itself where it is a name, or ""."""
    return str(setting.get("class_path", "") if isinstance(setting, dict | Namespace) else setting or "")


def get_class_name(setting: Any) -> str:
    """Return the class name in the settings of an object, or the setting itself where it is a name, or ""."""
    return get_class_path(setting).rsplit(".", 1)[-1]
