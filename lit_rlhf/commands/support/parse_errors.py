"""What jsonargparse says about a wrong setting, as one line: which setting, what is wrong, the nearest right name.

jsonargparse reports a tree: keys within keys, every member of a union with its own reason. The line wanted is the
innermost reason of the first branch that has a specific one. The message is all there is to read: the exception
carries no structure.
"""

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lit_rlhf.commands.support.config_locations import ConfigLocations
from lit_rlhf.commands.support.suggestions import did_you_mean, one_line, pip_command

KEY = re.compile(r'Parser key "([^"]+)"')
CLASS = re.compile(r"Problem with given class_path '([^']+)'|Got value: Namespace\(class_path='([^']+)'")
MISMATCH = re.compile(r"Expected an? (<class '(?!NoneType)[^']+'>|typing\.Literal\[.*?\]|[\w.]+\[.*?\])")
IMPORT_STRING = re.compile(r"Expected a dot import path string: (.+)|Unexpected import path format: (.+)")


class Context:
    """What is known around a reason: the setting's dotted key, the class it belongs to, the parser's own options."""

    def __init__(self, message: str, position: int, options: Iterable[str], places: ConfigLocations) -> None:
        before = message[:position]
        after = message[position:]
        classes = [first or second for first, second in CLASS.findall(before)]
        later = CLASS.search(after.split("\n")[0])
        if later and later.group(2):  # a callable names its class behind the reason
            classes.append(later.group(2))
        self.key = ".".join(KEY.findall(before))
        self.class_path = classes[-1] if classes else ""
        self.class_name = self.class_path.rsplit(".", 1)[-1]
        self.options = list(options)
        self.places = places
        self.message = message
        self.after = after

    def line(self, text: str, place: str) -> str:
        """Return the final line."""
        return one_line(f"{self.key}: {text}{place}" if self.key else f"{text}{place}")


def explain(message: str, options: Iterable[str], places: ConfigLocations) -> str:
    """Return the one line for an error message of jsonargparse.

    Args:
        message: as raised.
        options: the dotted names of the subcommand's own settings ("trainer.max_steps", ...), for suggestions.
        places: the files and arguments that were parsed.
    """
    options = list(options)
    found = [
        (match.start(), word, match) for pattern, word in REASONS.items() if (match := re.search(pattern, message))
    ]
    if found:
        position, word, match = min(found, key=lambda reason: reason[0])
        return word(match, Context(message, position, options, places))
    return wrong_type(message, options, places)


def unknown_setting(match: re.Match[str], context: Context) -> str:
    """A class has no such setting."""
    return no_setting(match.group(1), context)


def unknown_argument(match: re.Match[str], context: Context) -> str:
    """The command line, or a class on it, has no such option."""
    name = match.group(1).split()[0]
    if not name.startswith("-"):
        return context.line(f"unexpected argument {name!r}", " [command line]")
    return no_setting(name.lstrip("-").split("=")[0].rstrip("+"), context)


def unknown_group_setting(match: re.Match[str], context: Context) -> str:
    """A nested group (a dataclass of a class's signature) has no such setting."""
    group, name = match.groups()
    return no_setting(f"{group}.{name}", context)


def no_setting(name: str, context: Context) -> str:
    """Word an unknown setting, within a class or of the command itself."""
    if not context.class_path:
        wrong = next((part for part in name.split(".") if not any(part in o.split(".") for o in context.options)), name)
        place = context.places.locate_setting(wrong)
        return context.line(f"no setting {name!r}{did_you_mean(name, context.options)}", place)
    owner = import_quietly(context.class_path)
    head, _, rest = name.partition(".")
    group = annotation_of(owner, head) if rest else None
    if group is not None:
        head, owner_name, names = rest.split(".")[0], head, setting_names(group)
    else:
        owner_name, names = context.class_name, [*setting_names(owner), "init_args", "class_path"]
    text = f"{owner_name} has no setting {head!r}{did_you_mean(head, names)}"
    return context.line(text, context.places.locate_setting(head))


def missing_settings(match: re.Match[str], context: Context) -> str:
    """A class or the command lacks a setting that has no default."""
    names = match.group(1).strip()
    if not context.class_path:
        names = re.sub(r"\b(fit|validate|test)\.", "", names)
        return context.line(f"the run lacks {names}: name a recipe with -c; lit-rlhf recipes ls lists them", "")
    text = f"{context.class_name} needs the setting {names}, which has no default"
    return context.line(text, context.places.locate_value(context.class_path))


def unknown_attribute(match: re.Match[str], context: Context) -> str:
    """A module exists and has no such class, function or submodule."""
    module, name = match.groups()
    found = import_module(module)
    known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
    known += getattr(found, "__all__", [])  # names that are imported on first use
    known += [info.name for info in pkgutil.iter_modules(getattr(found, "__path__", []))]
    asked = context.class_path if context.class_path.startswith(f"{module}.") else f"{module}.{name}"
    return context.line(f"no {name!r} in {module}{did_you_mean(name, known)}", context.places.locate_value(asked))


def missing_module(match: re.Match[str], context: Context) -> str:
    """A class path names a module that is not there, or whose own import fails."""
    module = match.group(1)
    asked = context.class_path
    place = context.places.locate_value(asked) if asked else context.places.locate_value(module)
    if asked and asked.split(".")[0] != module.split(".")[0]:
        install = pip_command(module)
        hint = f": {install}" if install else ""
        return context.line(f"importing {asked!r} fails, there is no module {module!r}{hint}", place)
    install = pip_command(module)
    if install:
        return context.line(
            f"{asked or module!r} needs the package {module!r}, which is not installed: {install}", place
        )
    package, _, _ = module.rpartition(".")
    if package:
        folders = getattr(import_quietly(package), "__path__", None)
        known = [f"{package}.{info.name}" for info in pkgutil.iter_modules(folders or [])]
    else:
        known = [path.stem for path in Path.cwd().glob("*.py")] + ["lit_rlhf", "lightning", "torch", "transformers"]
    return context.line(f"there is no module {module!r}{did_you_mean(module, known)}", place)


def wrong_base(match: re.Match[str], context: Context) -> str:
    """A class exists and is not of the kind this setting takes."""
    path, base = match.groups()
    given = path or given_value(context.after)
    text = f"{given.split('.')[-1]!r} is no {base}; this setting takes a subclass of {base}"
    return context.line(text, context.places.locate_value(given))


def wrong_protocol(match: re.Match[str], context: Context) -> str:
    """A class exists and lacks what a protocol asks for; jsonargparse compares parameters and type hints."""
    path, protocol = match.groups()
    given = path or given_value(context.after)
    text = f"{given.split('.')[-1]!r} is no {protocol}: it needs its methods, with the same parameters and type hints"
    return context.line(text, context.places.locate_value(given))


def no_import_path(message: str, options: list[str], places: ConfigLocations) -> str | None:
    """A class name without its module, where a class is what the setting takes."""
    match = IMPORT_STRING.search(message)
    if match is None:
        return None
    context = Context(message, match.start(), options, places)
    given = (match.group(1) or match.group(2)).strip()
    return context.line(
        f"{given!r} is no class path; write it in full, such as package.module.Class", places.locate_value(given)
    )


def wrong_type(message: str, options: list[str], places: ConfigLocations) -> str:
    """A value of another type than the setting's: every type that would do, and what was given."""
    matches = list(MISMATCH.finditer(message))
    given_a_mapping = "Given value type: <class 'dict'>" in message.split("Given value:")[0]
    if not matches or (given_a_mapping and IMPORT_STRING.search(message)):
        line = no_import_path(message, options, places)
        if line is not None:
            return line
    if not matches:
        return other_reason(message, options, places)
    context = Context(message, matches[0].start(), options, places)
    kinds = list(dict.fromkeys(plain_type(match.group(1)) for match in matches))
    given = given_value(context.after)
    name = context.key.split(".")[-1]
    return context.line(f"expected {' or '.join(kinds)}, got {given!r}", places.locate_setting(name, given))


def other_reason(message: str, options: list[str], places: ConfigLocations) -> str:
    """Any other message: its first reason, without the tree around it."""
    reasons = list(re.finditer(r"callable class: (.+)|^ *- (?!Expected a|Problem with)(.+)", message, re.MULTILINE))
    if not reasons:
        return one_line(message)
    context = Context(message, reasons[0].start(), options, places)
    reason = (reasons[0].group(1) or reasons[0].group(2)).split(" Got value: ")[0].rstrip(". ")
    return context.line(reason, places.locate_setting(context.key.split(".")[-1]))


def given_value(text: str) -> str:
    """Return the value a message reports."""
    match = re.search(r"(?:Got|Given) value: (.*)", text)
    value = match.group(1).split(". Got value: ")[0].strip() if match else ""
    nested = re.fullmatch(r"NestedArg\(key='[^']*', val='(.*)'\)", value)
    return nested.group(1) if nested else value


def plain_type(text: str) -> str:
    """Return a type as a reader writes it: `int`, `'a' or 'b'`, `list[Callback]`."""
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    return literal.group(1).replace(", ", " or ") if literal else re.sub(r"(?:\w+\.)+(\w+)", r"\1", text)


def import_quietly(path: str) -> Any:
    """Return the object a dotted path names, or None; only for suggestions."""
    try:
        return import_module(path)
    except ImportError:
        module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None


def setting_names(owner: Any) -> list[str]:
    """Return the parameters of a class or function, its parents' included where it takes **kwargs."""
    names: list[str] = []
    if not callable(owner):
        return names
    constructors = (
        [vars(base)["__init__"] for base in inspect.getmro(owner) if "__init__" in vars(base)]
        if inspect.isclass(owner)
        else [owner]
    )
    for constructor in constructors:
        parameters = inspect.signature(constructor).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def annotation_of(owner: Any, name: str) -> Any:
    """Return the class a parameter is annotated with, or None."""
    try:
        hint = get_type_hints(owner.__init__).get(name)
    except (AttributeError, NameError, TypeError):
        return None
    kinds = [kind for kind in (hint, *get_args(hint)) if inspect.isclass(kind) and kind is not type(None)]
    return kinds[0] if kinds else None


# the specific reasons and what words each; the one that stands first in the message is taken
REASONS: dict[str, Callable[[re.Match[str], Context], str]] = {
    r"Option '([^']+)' is not accepted": unknown_setting,
    r"Group '([^']+)' does not accept option '([^']+)'": unknown_group_setting,
    r"Subcommand '[^']+' does not accept option '([^']+)'": unknown_setting,
    r"unrecognized arguments: (.+)": unknown_argument,
    r"the following arguments are required: (.+)": missing_settings,
    r"module '([^']+)' has no attribute '([^']+)'": unknown_attribute,
    r"No module named '([^']+)'": missing_module,
    r"Import path (?:(\S+) )?does not correspond to a subclass of (\w+)": wrong_base,
    r"Import path (?:(\S+) )?does not implement protocol (\w+)": wrong_protocol,
    r"Expected '([^']+)' to be a subclass of <class '(\w+)'>": wrong_base,
}
