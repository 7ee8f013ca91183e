"""Read the documentation pages: fenced blocks, shell commands, and the names that code defines."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def commands(page: Path) -> list[str]:
    """Return the shell commands of a page, without comments."""
    lines = [line.split("  #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def named_blocks(page: Path, language: str) -> dict[str, str]:
    """Return the blocks whose first line is a comment with a file name, by that name."""
    found = {}
    for text in blocks(page, language):
        name = re.match(r"# (\w+\.\w+)\n", text)
        if name:
            found[name.group(1)] = text
    return found


def replace_between(page: str, begin: str, end: str, text: str) -> str:
    """Return a page with another text between its marks.

    Raises:
        ValueError: the page has no place for it.
    """
    before, opened, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"the page has no {begin.strip()} … {end.strip()}")
    return before + begin + text + end + after


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def defined_names(file: Path) -> set[str]:
    """Return the names that a Python file defines: functions, classes, constants, `Class.method` and `Class.field`."""
    names = set[str]()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(file.read_text()).body, "")
    return names
