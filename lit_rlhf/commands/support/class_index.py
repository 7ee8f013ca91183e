"""The classes of this library and of torch and their settings, read from the sources: an import takes seconds."""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import lit_rlhf

READ = (lit_rlhf.__name__, "torch")  # packages


class ClassInfo(NamedTuple):
    """A class.

    Attributes:
        name: without its module.
        summary: the first line of its docstring.
        settings: name -> annotation of the parameters of its constructor; None where they are not known.
        module: the dotted name of the module that defines it.
        is_dataclass: whether it is one, whose settings can stand in a recipe without its name.
    """

    name: str
    summary: str
    settings: dict[str, str] | None
    module: str
    is_dataclass: bool


def list_classes(package: str, suffix: str = "") -> list[ClassInfo]:
    """Return the public classes of a package such as "lit_rlhf.callbacks" whose names end in `suffix`."""
    names = sorted(name for name in public_names(package) if name.endswith(suffix))
    return [info for name in names if (info := find_class(f"{package}.{name}")) is not None]


@cache
def public_names(package: str) -> list[str]:
    """Return the `__all__` of a package of this library."""
    tree = parse_module(package)
    for node in tree.body if tree is not None else ():
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []


@cache
def find_class(path: str) -> ClassInfo | None:
    """Return a class of these packages by its dotted path, or None if there is no class of that path."""
    module, _, name = path.rpartition(".")
    tree = parse_module(module)
    for node in iter_statements(tree) if tree is not None else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            summary = (ast.get_docstring(node) or "").split("\n")[0]
            return ClassInfo(name, summary, read_settings(node, module), module, is_dataclass(node))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(READ):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_class(f"{node.module}.{alias.name}")
    return None


def read_settings(node: ast.ClassDef, module: str) -> dict[str, str] | None:
    """Return the parameters of a class's constructor with their annotations, or None where they are not known."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            return read_parameters(statement)
    bases = [ast.unparse(base) for base in node.bases]
    parent = find_class(f"{module}.{bases[0]}") if len(bases) == 1 else None
    inherited = parent.settings if parent is not None else None
    if not is_dataclass(node) and bases != ["NamedTuple"]:
        return inherited
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    own = {ast.unparse(each.target): ast.unparse(each.annotation) for each in fields}
    if bases in ([], ["NamedTuple"]):
        return own
    return None if inherited is None else inherited | own


def is_dataclass(node: ast.ClassDef) -> bool:
    """Return whether a class has that decorator."""
    return any("dataclass" in ast.unparse(each) for each in node.decorator_list)


def read_parameters(function: ast.FunctionDef) -> dict[str, str] | None:
    """Return the parameters of a method with their annotations; None if it takes any others."""
    if function.args.kwarg is not None or function.args.vararg is not None:
        return None
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs][1:]
    return {each.arg: ast.unparse(each.annotation) if each.annotation else "" for each in parameters}


@cache
def trainer_parameters(method: str) -> tuple[str, ...] | None:
    """Return the parameters of a method of Lightning's Trainer as installed; None if its source is another one."""
    spec = find_spec("lightning")  # of a top-level package: imports nothing
    source = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py" if spec and spec.origin else None
    if source is None or not source.is_file():
        return None
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        for child in node.body if isinstance(node, ast.ClassDef) and node.name == "Trainer" else ():
            if isinstance(child, ast.FunctionDef) and child.name == method:
                names = read_parameters(child)
                return None if names is None else tuple(names)
    return None


@cache
def parse_module(module: str) -> ast.Module | None:
    """Return the syntax tree of a module of these packages, or None if there is none of that name."""
    first, *parts = module.split(".")
    if first not in READ or not all(part.isidentifier() for part in parts):
        return None
    spec = find_spec(first)  # of a top-level package: imports nothing
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    for path in (folder.joinpath(*parts, "__init__.py"), folder.joinpath(*parts).with_suffix(".py")):
        if path.is_file():
            return ast.parse(path.read_text(encoding="utf-8"))
    return None


def iter_statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements of a module, and those under an `if` such as TYPE_CHECKING."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If):
            yield from node.body
