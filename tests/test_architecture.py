"""The rules of docs/architecture.md: which package may import which."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.pages import blocks

ROOT = Path(__file__).parent.parent / "lit_rlhf"

GENERAL = {
    *("checkpoint_files", "distributed", "errors", "functional", "hashing", "http", "hyperparameters", "importing"),
    *("paths", "progress", "secrets", "suggestions"),
}
LIGHTNING = {"checkpoints", "loggers", "schedules", "strategies"}
# from the lowest floor up: a package may import packages above it in this table, and never one below
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "paths": set(),
    "suggestions": set(),
    "progress": set(),
    "functional": set(),
    "hashing": set(),
    "distributed": {"errors"},
    "importing": {"errors", "suggestions"},
    "http": {"errors"},
    "checkpoint_files": {"errors"},
    "secrets": set(),
    "hyperparameters": {"errors", "secrets"},
    "checkpoints": {"errors", "paths", "checkpoint_files"},
    "schedules": {"errors"},
    "strategies": {"errors", "checkpoint_files"},
    "loggers": set(),
    "packing": {"functional"},
    "models": GENERAL - {"http"} | {"packing"},
    "data": GENERAL - {"http"} | {"packing"},
    "lineage": GENERAL - {"http"} | {"models", "data"},
    "generation": GENERAL | {"packing", "models", "data"},
    "rollout": GENERAL - {"http"} | {"packing", "models", "data", "generation"},
    "rewards": GENERAL | {"packing", "models", "data", "rollout"},
    "modules": GENERAL | LIGHTNING | {"packing", "models", "data", "lineage", "generation", "rollout", "rewards"},
    "evaluation": GENERAL | {"loggers", "packing", "models", "data", "lineage", "generation", "rollout", "rewards"},
    "callbacks": GENERAL
    | LIGHTNING
    | {"packing", "models", "data", "lineage", "generation", "rollout", "rewards", "evaluation"},
    "synthetic": GENERAL | {"packing", "models", "data", "lineage", "generation", "rollout", "rewards", "evaluation"},
}
MAY_IMPORT["labeling"] = GENERAL - {"http"} | {"models", "data", "generation", "evaluation"}
MAY_IMPORT["commands"] = set(MAY_IMPORT)
MAY_IMPORT["cli"] = {"errors", "secrets", "suggestions", "commands"}
MAY_IMPORT["__main__"] = {"cli"}
# the quickstart, its sweep and `real` run their stages by the command, as a user would
EXCEPTIONS = {("commands", "lit_rlhf.cli")}


def source_files() -> list[Path]:
    # callbacks is a symlink, which ** does not follow in every Python
    return sorted({*ROOT.glob("**/*.py"), *ROOT.glob("callbacks/**/*.py")})


def runtime_imports(node: ast.AST, path: Path) -> Iterator[str]:
    """Yield every module that a file imports, at the top or in a function, except under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, (
                f"{path}, line {child.lineno}: a relative import hides the package; write it in full"
            )
            assert child.module is not None
            if child.module == "lit_rlhf":
                yield from (f"lit_rlhf.{alias.name}" for alias in child.names)
            else:
                yield child.module
        yield from runtime_imports(child, path)


def imports_by_file() -> dict[Path, list[str]]:
    return {path: list(runtime_imports(ast.parse(path.read_text()), path)) for path in source_files()}


def package_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def test_every_floor_may_import_lower_floors_alone() -> None:
    lower: set[str] = set()
    for package, allowed in MAY_IMPORT.items():
        assert allowed <= lower, f"{package} may import {allowed - lower}, which is not below it"
        lower.add(package)


def test_imports_point_down() -> None:
    wrong = []
    for path, names in imports_by_file().items():
        package = package_of(path)
        if package == "__init__":
            assert not [name for name in names if name.startswith("lit_rlhf")]
            continue
        assert package in MAY_IMPORT, f"{path} is on no floor: add it to docs/architecture.md and to MAY_IMPORT"
        for name in names:
            first, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if first != "lit_rlhf" or not rest or target == package or target in MAY_IMPORT[package]:
                continue
            if (package, name) not in EXCEPTIONS:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_functional_imports_torch_only() -> None:
    for path, names in imports_by_file().items():
        if package_of(path) == "functional":
            foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"torch", "lit_rlhf"}
            assert not foreign, f"{path}: {foreign}"


def test_the_command_starts_without_torch() -> None:
    """`lit-rlhf recipes ls` imports nothing outside the standard library."""
    imports = imports_by_file()
    for name in (
        "cli.py",
        "__main__.py",
        "errors.py",
        "__init__.py",
        "commands/recipes.py",
        "suggestions.py",
        "commands/support/argument_parser.py",
        "commands/support/busy_machine.py",
        "commands/support/class_index.py",
        "commands/support/console.py",
        "commands/support/log_filters.py",
    ):
        foreign = (
            {module.split(".")[0] for module in imports[ROOT / name]} - set(sys.stdlib_module_names) - {"lit_rlhf"}
        )
        assert not foreign, f"{name}: {foreign}"


def test_no_module_is_named_utils() -> None:
    assert not [path for path in source_files() if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_the_page_lists_every_floor() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    for name in set(MAY_IMPORT) - {"__main__"}:
        assert f"`lit_rlhf.{name}`" in page, f"docs/architecture.md does not say what lit_rlhf.{name} contains"


def read_fields(source: str) -> dict[str, list[str]]:
    """Return the lines of the annotated fields, with their comments, of every class of a source."""
    lines = [re.sub(r"  # type: ignore\[\w+\]", "", line) for line in source.splitlines()]
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {
        node.name: [lines[field.lineno - 1] for field in node.body if isinstance(field, ast.AnnAssign)]
        for node in classes
    }


def test_the_types_on_the_page_are_those_of_the_code() -> None:
    (block,) = blocks(ROOT.parent / "docs" / "architecture.md", "python")
    _, *parts = re.split(r"^# lit_rlhf/(\S+\.py)$", block, flags=re.MULTILINE)
    assert len(parts) == 2 * 6
    for name, source in zip(parts[::2], parts[1::2]):
        fields = read_fields((ROOT / name).read_text())
        for type_name, on_page in read_fields(source).items():
            assert on_page == fields[type_name], f"{name}: {type_name}"
