"""Functions by dotted path: found in the working directory, or refused in one line that names the setting."""

import sys

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.importing import import_function


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_functions.py").write_text("def double(x): return 2 * x\nLIMIT = 1\n")
    (tmp_path / "my_broken.py").write_text("from my_functions import absent\n")
    yield "my_functions"
    for name in ("my_functions", "my_broken"):
        sys.modules.pop(name, None)


def test_a_function_in_the_working_directory(module):
    assert import_function("my_functions.double", "setting")(3) == 6


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("double", r"setting: 'double' is not a dotted path such as my_file\.my_function"),
        ("absent.double", r"setting: 'absent\.double' cannot be imported from '.*': there is no module 'absent' here"),
        ("my_functions.duble", r"setting: .*: my_functions has no 'duble' \(did you mean 'double'\?\)"),
        ("my_broken.f", r"setting: 'my_broken\.f' cannot be imported from '.*': cannot import name 'absent'"),
        ("my_functions.LIMIT", r"setting: 'my_functions\.LIMIT' is a int, not a function"),
    ],
)
def test_refused(module, path, message):
    with pytest.raises(UserError, match=message):
        import_function(path, "setting")
