"""The project's own files: one version, hooks and CI that run what make runs, and a checkout without symbolic links."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from setuptools.config.pyprojecttoml import read_configuration

import lit_rlhf
from tests.helpers.pages import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_one_line() -> None:
    assert "version" not in PYPROJECT["project"] and PYPROJECT["project"]["dynamic"] == ["version"]
    assert read_configuration(ROOT / "pyproject.toml")["project"]["version"] == lit_rlhf.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors", "license"} <= set(citation)
    assert "version" not in citation and citation["license"] == PYPROJECT["project"]["license"]
    first = re.search(r"^## (\S+)", (ROOT / "docs" / "changelog.md").read_text(), re.MULTILINE)
    assert first is not None and first[1] == lit_rlhf.__version__, "the changelog begins with this version"


def test_the_hooks_are_those_of_make() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = {hook["entry"].replace(" --force-exclude", "") for hook in repo["hooks"]}
    makefile = (ROOT / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    lines = {line.strip().removesuffix(" .") for line in makefile.splitlines() if line.startswith("\t.venv/bin/")}
    assert repo["repo"] == "local" and entries == {line for line in lines if re.search("ruff|mypy$", line)}


def test_ci_runs_what_a_contributor_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    lowest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert lowest in jobs["everything"]["strategy"]["matrix"]["python"]
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        parsed = yaml.safe_load(form.read_text())
        assert {"name", "description", "body"} <= set(parsed)
        assert all(each["type"] in ("textarea", "checkboxes") for each in parsed["body"])


def test_contributing_names_files_and_targets_that_exist() -> None:
    page = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"\]\((\.\./[^)]+)\)", page):
        assert (ROOT / ".github" / target).exists(), target
    for name in re.findall(r"`((?:tests|docs|\.ci)/[\w./]*)`", page):
        assert (ROOT / name).exists(), name
    targets = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)", page)) <= targets


def test_the_picture_of_the_readme_is_small() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\((docs/[\w.-]+)\)", (ROOT / "README.md").read_text())
    assert (ROOT / picture).stat().st_size < 150_000


@pytest.mark.parametrize("command", [["recipes", "ls"], ["--version"], ["fit", "-c", "small/sft"]])
def test_a_checkout_without_symbolic_links_says_what_to_do(tmp_path: Path, command: list[str]) -> None:
    """As Git leaves it on Windows: a link is a small text file that holds its target."""
    package = tmp_path / "lit_rlhf"
    package.mkdir()
    for path in (ROOT / "lit_rlhf").iterdir():
        if path.is_symlink():
            (package / path.name).write_text(os.readlink(path))
        elif path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    run = subprocess.run(
        [sys.executable, "-m", "lit_rlhf", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PYTHONSAFEPATH": ""},
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "core.symlinks" in run.stderr and str(package / "callbacks") in run.stderr
