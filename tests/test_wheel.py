"""The wheel alone is enough: the quickstart, a stage on a file and an evaluation, away from the repository."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs; its dependencies are those of the tests."""
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("lit_rlhf", "callbacks", "recipes"):  # a copy: the build leaves files beside the sources
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run([*pip, *build], capture_output=True, text=True, check=False)
    if "No module named" in done.stderr or "Cannot import 'setuptools" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_what_the_repository_has(installed: Path) -> None:
    def names(folder: Path, *patterns: str) -> set[str]:
        return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}

    package = installed / "lit_rlhf"
    assert names(package / "recipes", "*.yaml") == names(ROOT / "recipes", "*.yaml")
    assert names(package / "callbacks", "*.py") == names(ROOT / "callbacks", "*.py")
    patterns = ("*.py", "*.jinja", "*.yaml", "*.md", "*.js", "*.css", "*.svg", "py.typed")
    assert names(package, *patterns) >= names(ROOT / "lit_rlhf", *patterns)


def test_everything_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> str:
        command = [sys.executable, "-P", "-m", "lit_rlhf", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import lit_rlhf; print(lit_rlhf.__file__)"
    found = subprocess.run([sys.executable, "-P", "-c", where], capture_output=True, text=True, env=environment)
    assert found.stdout.startswith(str(installed))
    assert "quickstart/ppo" in run("recipes", "ls")
    text = run("quickstart", "--tiny", "--out", "runs/quickstart", "-c", "logger/csv")
    assert "next: lit-rlhf generate --model runs/quickstart/ppo-ptx/model" in text
    report = json.loads((tmp_path / "runs/quickstart/report.json").read_text())
    assert report["scale"] == "tiny" and (tmp_path / "runs/quickstart/report.html").is_file()
    rows = [{"prompt": f"ask : {'what ' * n}? reply :", "completion": " berries"} for n in range(1, 41)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = ("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--data.micro_batch_size=4")
    model = "--model.model=runs/quickstart/sft/model"
    run("fit", "-c", "small/sft", "--data.path=rows.jsonl", model, *short)
    assert (tmp_path / "runs/small/sft/model/model.safetensors").is_file()
    few = ("--suites.preference.init_args.limit=16", "--suites.preference.init_args.temperatures=[1.0]")
    assert "win rate" in run("evaluate", "-c", "evaluate/quickstart", *few)
    assert (tmp_path / "runs/quickstart/evaluate/report.html").is_file()
