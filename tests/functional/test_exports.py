import ast
import sys
from pathlib import Path

import lit_rlhf.functional


def test_every_export_exists_and_every_public_function_is_exported():
    names = set(lit_rlhf.functional.__all__)
    assert all(hasattr(lit_rlhf.functional, name) for name in names)
    for path in Path(lit_rlhf.functional.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert node.name in names, f"{path.name}: {node.name} is not exported"
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def test_torch_is_the_only_import():
    allowed = {"torch", "lit_rlhf"} | sys.stdlib_module_names
    for path in Path(lit_rlhf.functional.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module]
            else:
                continue
            for module in modules:
                assert module.split(".")[0] in allowed, f"{path.name} imports {module}"
                if module.startswith("lit_rlhf"):
                    assert module.startswith("lit_rlhf.functional"), f"{path.name} imports {module}"
