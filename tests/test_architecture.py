"""docs/architecture.md, held: who imports whom, and how long a file may be."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "lit_rlhf"

FLOOR_0 = {"checkpoint_files", "errors", "functional", "gather", "hashing", "suggestions"}
FLOOR_1 = {"models", "data"}
FLOOR_2 = {"rollout", "rewards"}
LIGHTNING_GAPS = {"checkpoints", "schedules", "strategies"}  # only what Lightning lacks
MAY_IMPORT = {
    "errors": set(),
    "suggestions": set(),
    "checkpoint_files": {"errors"},
    "http": {"errors"},
    "functional": set(),
    "gather": set(),
    "hashing": set(),
    "checkpoints": FLOOR_0,
    "schedules": FLOOR_0,
    "strategies": FLOOR_0,
    "models": FLOOR_0,
    "data": FLOOR_0,
    "rollout": FLOOR_0 | FLOOR_1 | {"http"},
    "rewards": FLOOR_0 | FLOOR_1 | {"http"},
    "modules": FLOOR_0 | FLOOR_1 | FLOOR_2 | LIGHTNING_GAPS,
    "evaluation": FLOOR_0 | FLOOR_1 | FLOOR_2 | {"http"},
    "callbacks": FLOOR_0 | FLOOR_1 | FLOOR_2 | LIGHTNING_GAPS | {"evaluation"},
    "world": FLOOR_0 | FLOOR_1 | FLOOR_2 | {"modules", "evaluation", "callbacks", "cli"},
    "commands": FLOOR_0 | FLOOR_1 | FLOOR_2 | LIGHTNING_GAPS | {"modules", "evaluation", "callbacks", "world"},
    "cli": {"errors", "suggestions", "commands"},
    "__main__": {"cli"},
}
# the types that pass between the floors: a reward source sees episodes
SHARED_TYPES = {("rewards", "lit_rlhf.rollout.experience")}


def source_files() -> list[Path]:
    # callbacks is a symlink, which ** does not follow in every Python
    return sorted({*ROOT.glob("**/*.py"), *ROOT.glob("callbacks/**/*.py")})


def runtime_imports(node: ast.AST, path: Path) -> Iterator[str]:
    """Every module a file imports, wherever the import stands; those for type checkers alone apart."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}, line {child.lineno}: a relative import hides its floor; write it in full"
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


def test_imports_point_down() -> None:
    wrong = []
    for path, names in imports_by_file().items():
        package = package_of(path)
        if package == "__init__":
            assert not [name for name in names if name.startswith("lit_rlhf")]
            continue
        assert package in MAY_IMPORT, f"{path} stands on no floor: give it one in docs/architecture.md and here"
        for name in names:
            first, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if first != "lit_rlhf" or not rest or target == package or target in MAY_IMPORT[package]:
                continue
            if (package, name) not in SHARED_TYPES:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_functional_imports_torch_only() -> None:
    for path, names in imports_by_file().items():
        if package_of(path) == "functional":
            foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"torch", "lit_rlhf"}
            assert not foreign, f"{path}: {foreign}"


def test_the_command_starts_light() -> None:
    """What `lit-rlhf recipes ls` imports: nothing outside the standard library."""
    imports = imports_by_file()
    for name in (
        "cli.py",
        "__main__.py",
        "errors.py",
        "__init__.py",
        "commands/recipes.py",
        "suggestions.py",
        "commands/support/argument_parser.py",
    ):
        foreign = (
            {module.split(".")[0] for module in imports[ROOT / name]} - set(sys.stdlib_module_names) - {"lit_rlhf"}
        )
        assert not foreign, f"{name}: {foreign}"


def test_no_module_is_a_drawer() -> None:
    assert not [path for path in source_files() if path.stem in ("utils", "util", "helpers", "misc", "common")]


def test_files_stay_readable() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    assert {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_every_floor_of_the_table_is_on_the_page() -> None:
    page = (ROOT.parent / "docs" / "architecture.md").read_text()
    for name in set(MAY_IMPORT) - {"__main__", "commands", *LIGHTNING_GAPS}:
        assert f"`lit_rlhf.{name}`" in page, f"docs/architecture.md does not say what lit_rlhf.{name} holds"
