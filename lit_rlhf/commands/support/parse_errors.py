"""Explain jsonargparse's errors in one line: the setting, what is wrong, and the nearest right name.

jsonargparse reports a tree of keys and union members, as text only. The explanation is the first specific reason in it.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lit_rlhf.commands.support.class_index import public_names
from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.early_checks import NAMED_PACKAGES
from lit_rlhf.suggestions import did_you_mean, pip_command

KEY = re.compile(r'Parser key "([^"]+)"')
CLASS = re.compile(r"Problem with given class_path '([^']+)'|Got value: Namespace\(class_path='([^']+)'")
EXPECTED_TYPE = re.compile(r"Expected an? (<class '(?!NoneType)[^']+'>|typing\.Literal\[.*?\]|[\w.]+\[.*?\])")
NO_CLASS_PATH = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (.+)")


class Reason:
    """A reason within jsonargparse's message.

    Args:
        message: the full message.
        start: position of the reason.
        options: dotted names of the command's own settings.
        locations: of the settings in files and arguments.
    """

    def __init__(self, message: str, start: int, options: list[str], locations: ConfigLocations) -> None:
        before, self.text = message[:start], message[start:]
        classes = [first or second for first, second in CLASS.findall(before)]
        after = CLASS.search(self.text.split("\n")[0])
        if after and after.group(2):  # a callable's class is named behind the reason
            classes.append(after.group(2))
        self.key = ".".join(KEY.findall(before))
        self.class_path = classes[-1] if classes else ""
        self.options, self.locations = options, locations

    @property
    def given_value(self) -> str:
        """The value that the message reports."""
        match = re.search(r"(?:Got|Given) value: (.*)", self.text)
        value = match.group(1).split(". Got value: ")[0].strip() if match else ""
        nested = re.fullmatch(r"NestedArg\(key='[^']*', val='(.*)'\)", value)
        return nested.group(1) if nested else value

    def explain(self, text: str, location: str = "") -> str:
        """Return `text` with the setting's key in front and the location behind."""
        return f"{self.key}: {text}{location}" if self.key else f"{text}{location}"


def explain_parse_error(message: str, options: Iterable[str], locations: ConfigLocations) -> str:
    """Return one line for an error message of jsonargparse.

    Args:
        message: as raised.
        options: the dotted names of the subcommand's own settings ("trainer.max_steps", ...), for suggestions.
        locations: of the settings in the files and arguments that were parsed.
    """
    options = list(options)
    if abstract := _explain_abstract(message, locations):
        return abstract
    found = [(match, explain) for pattern, explain in EXPLANATIONS.items() if (match := re.search(pattern, message))]
    if found:
        match, explain = min(found, key=lambda each: each[0].start())
        return explain(match, Reason(message, match.start(), options, locations))
    expected = list(EXPECTED_TYPE.finditer(message))
    no_class_path = NO_CLASS_PATH.search(message)
    mapping_given = "Given value type: <class 'dict'>" in message.split("Given value:")[0]
    if no_class_path and (mapping_given or not expected):
        return _explain_class_path(no_class_path, Reason(message, no_class_path.start(), options, locations))
    if expected:
        return _explain_type(expected, Reason(message, expected[0].start(), options, locations))
    other = re.search(r"callable class: (.+)|^ *- (?!Problem with)(.+)", message, re.MULTILINE)
    if other is None:
        return message
    reason = Reason(message, other.start(), options, locations)
    text = (other.group(1) or other.group(2)).split(" Got value: ")[0].rstrip(". ")
    return reason.explain(text, locations.locate_setting(reason.key.split(".")[-1]))


def _explain_setting(match: re.Match[str], reason: Reason) -> str:
    """Explain a setting that a class, a group of settings or the command does not have."""
    if match["arguments"]:
        name = match["arguments"].split()[0]
        if not name.startswith("-"):
            return reason.explain(f"unexpected argument {name!r}", " [command line]")
        name = name.lstrip("-").split("=")[0].rstrip("+")
    else:
        name = f"{match['group']}.{match['name']}" if match["group"] else match["name"]
    if not reason.class_path:
        known = {part for option in reason.options for part in option.split(".")}
        wrong = next((part for part in name.split(".") if part not in known), name)
        text = f"no setting {name!r}{did_you_mean(name, reason.options)}"
        return reason.explain(text, reason.locations.locate_setting(wrong))
    owner, owner_name = _import(reason.class_path), reason.class_path.rsplit(".", 1)[-1]
    names = [*_setting_names(owner), "init_args", "class_path"]
    head, _, rest = name.partition(".")
    group = _annotated_class(owner, head) if rest else None
    if group is not None:  # a dataclass in the class's signature
        owner_name, head, names = head, rest.split(".")[0], _setting_names(group)
    text = f"{owner_name} has no setting {head!r}{did_you_mean(head, names)}"
    return reason.explain(text, reason.locations.locate_setting(head))


def _explain_missing_setting(match: re.Match[str], reason: Reason) -> str:
    """Explain a setting without a default that is missing from a class or the command."""
    names = match[1].strip()
    if not reason.class_path:
        names = re.sub(r"\b(fit|validate|test)\.", "", names)
        return reason.explain(f"the run lacks {names}: name a recipe with -c; lit-rlhf recipes ls lists them")
    text = f"{reason.class_path.rsplit('.', 1)[-1]} needs the setting {names}, which has no default"
    return reason.explain(text, reason.locations.locate_value(reason.class_path))


def _explain_attribute(match: re.Match[str], reason: Reason) -> str:
    """Explain a class, function or submodule that a module does not have."""
    path, name = match.groups()
    module = import_module(path)
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    known += getattr(module, "__all__", [])  # names that are imported on first use
    known += [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
    given = reason.class_path if reason.class_path.startswith(f"{path}.") else f"{path}.{name}"
    return reason.explain(f"no {name!r} in {path}{did_you_mean(name, known)}", reason.locations.locate_value(given))


def _explain_module(match: re.Match[str], reason: Reason) -> str:
    """Explain a module that does not exist, named by a class path or imported by it."""
    module, given = match[1], reason.class_path or match[1]
    location, install = reason.locations.locate_value(given), pip_command(module)
    if given.split(".")[0] != module.split(".")[0]:
        text = f"importing {given!r} fails, there is no module {module!r}" + (f": {install}" if install else "")
    elif install:
        text = f"{given!r} needs the package {module!r}, which is not installed: {install}"
    else:
        known = [path.stem for path in Path.cwd().glob("*.py")] + ["lit_rlhf", "lightning", "torch", "transformers"]
        text = f"there is no module {module!r}{did_you_mean(module, known)}"
    return reason.explain(text, location)


def _explain_abstract(message: str, locations: ConfigLocations) -> str:
    """Explain a class that was given and lacks a method of its base class; "" if there is none."""
    for path in dict.fromkeys(re.findall(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", message)):
        location = locations.locate_value(path)
        given = _import(path) if location else None
        if inspect.isclass(given) and inspect.isabstract(given):
            missing = ", ".join(sorted(vars(given)["__abstractmethods__"]))
            bases = " or ".join(f"{each.__module__}.{each.__name__}" for each in given.__bases__)
            return f"{path!r} lacks {missing}, which a subclass of {bases} must define{location}"
    return ""


def _explain_base(match: re.Match[str], reason: Reason) -> str:
    """Explain a class that is not of the type of its setting."""
    given, base = match["path"] or match["value"] or reason.given_value, match["base"] or match["type"]
    text = f"{given.split('.')[-1]!r} is no {base}; this setting takes a subclass of {base}"
    return reason.explain(text, reason.locations.locate_value(given))


def _explain_class_path(match: re.Match[str], reason: Reason) -> str:
    """Explain a class name without its module."""
    given = match[1].strip()
    own = [name for package in NAMED_PACKAGES for name in public_names(package)]
    near = get_close_matches(given, own, n=1, cutoff=0.8)  # a class of the user's may end in Module as well
    hint = f" (did you mean {near[0]!r}?)" if near else "; write it in full, such as package.module.Class"
    text = f"{given!r} is no class path{hint}"
    return reason.explain(text, reason.locations.locate_value(given))


def _explain_type(matches: list[re.Match[str]], reason: Reason) -> str:
    """Explain a value of the wrong type: all types that are accepted, and the given value."""
    types = list(dict.fromkeys(_format_type(match[1]) for match in matches))
    given = reason.given_value
    location = reason.locations.locate_setting(reason.key.split(".")[-1], given)
    return reason.explain(f"expected {' or '.join(types)}, got {given!r}", location)


def _format_type(text: str) -> str:
    """Return a type as a reader writes it: `int`, `'a' or 'b'`, `list[Callback]`."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    return literal.group(1).replace(", ", " or ") if literal else re.sub(r"(?:\w+\.)+(\w+)", r"\1", text)


def _import(path: str) -> Any:
    """Return the object at a dotted path, or None if it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None


def _setting_names(owner: Any) -> list[str]:
    """Return the parameters of a class or function, including a parent's where the class takes **kwargs."""
    names: list[str] = []
    if owner is None:
        return names
    classes = inspect.getmro(owner) if inspect.isclass(owner) else ()
    for function in [vars(base)["__init__"] for base in classes if "__init__" in vars(base)] or [owner]:
        parameters = inspect.signature(function).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _annotated_class(owner: Any, name: str) -> type | None:
    """Return the class that a parameter is annotated with, or None."""
    try:
        hint = get_type_hints(owner.__init__).get(name)
    except (AttributeError, NameError, TypeError):  # no class, or names that are imported for type checkers only
        return None
    classes = [kind for kind in (hint, *get_args(hint)) if inspect.isclass(kind) and kind is not type(None)]
    return classes[0] if classes else None


# pattern of a specific reason -> its explanation; the reason that comes first in the message is explained
EXPLANATIONS: dict[str, Callable[[re.Match[str], Reason], str]] = {
    r"(?:Group '(?P<group>[^']+)' does not accept option|Subcommand '[^']+' does not accept option|Option) "
    r"'(?P<name>[^']+)'|unrecognized arguments: (?P<arguments>.+)": _explain_setting,
    r"the following arguments are required: (.+)": _explain_missing_setting,
    r"module '([^']+)' has no attribute '([^']+)'": _explain_attribute,
    r"No module named '([^']+)'": _explain_module,
    r"Import path (?:(?P<path>\S+) )?does not correspond to a subclass of (?P<base>\w+)|"
    r"Expected '(?P<value>[^']+)' to be a subclass of <class '(?P<type>\w+)'>": _explain_base,
}
