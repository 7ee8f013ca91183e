"""Functions by dotted path: found in the working directory, or refused in one line that names the setting."""

import subprocess
import sys

import pytest

import lit_rlhf.data
import lit_rlhf.evaluation
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


@pytest.mark.parametrize("package", [lit_rlhf.data, lit_rlhf.evaluation])
def test_a_package_gives_its_public_names_on_first_use(package):
    assert sorted(name for names in package._MODULES.values() for name in names) == package.__all__
    for name in package.__all__:
        assert getattr(package, name).__name__ in (name, "PIIDetector")
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'absent'"):
        package.absent  # noqa: B018


@pytest.mark.parametrize("module", ["lit_rlhf.labeling.server", "lit_rlhf.synthetic.labelers"])
def test_what_needs_no_model_starts_without_torch(module):
    code = (
        f"import sys, {module}; print([name for name in ('lightning', 'torch', 'transformers') if name in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
