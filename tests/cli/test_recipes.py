"""Listing and copying recipes; commands that do not import torch."""

import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_rlhf.commands.recipes import format_listing, is_evaluation, is_overlay, read_description, shipped_recipes


def test_every_shipped_recipe_opens_with_one_line_that_says_what_it_is() -> None:
    for name, path in shipped_recipes().items():
        assert read_description(path), f"{name}: the first line must be a comment that says what the recipe is"


def test_every_shipped_recipe_is_listed() -> None:
    lines = format_listing(shipped_recipes()).splitlines()
    for name, path in shipped_recipes().items():
        assert any(line.split()[:1] == [name] and line.endswith(read_description(path)) for line in lines)


def test_recipes_come_before_overlays(tmp_path: Path) -> None:
    names = ("precision/bf16", "quickstart/sft")
    for name in names:
        (tmp_path / name).with_suffix(".yaml").parent.mkdir(parents=True)
        (tmp_path / name).with_suffix(".yaml").write_text(f"# About {name}.\na: 1\n")
    text = format_listing({name: (tmp_path / name).with_suffix(".yaml") for name in names})
    assert text.splitlines() == [
        "Recipes: lit-rlhf fit -c NAME",
        "  quickstart/sft  About quickstart/sft.",
        "",
        "Overlays: one more -c NAME after a recipe",
        "  precision/bf16  About precision/bf16.",
    ]
    assert [is_overlay(name) for name in names] == [True, False]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    source = tmp_path / "source.yaml"
    source.write_text("# A recipe.\n")
    monkeypatch.setattr("lit_rlhf.commands.recipes.shipped_recipes", lambda: {"quickstart/reward": source})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_copy_writes_a_new_file_or_into_a_folder(shelf: Path, command) -> None:
    (shelf / "folder").mkdir()
    assert command("recipes", "cp", "quickstart/reward", "new/mine.yaml") == (0, "new/mine.yaml\n", "")
    assert command("recipes", "cp", "quickstart/reward.yaml", "folder") == (0, "folder/source.yaml\n", "")
    assert (
        (shelf / "new" / "mine.yaml").read_text() == (shelf / "folder" / "source.yaml").read_text() == "# A recipe.\n"
    )


def test_show_prints_a_recipe(shelf: Path, command) -> None:
    assert command("recipes", "show", "quickstart/reward") == (0, "# A recipe.\n", "")


def test_copy_overwrites_nothing(shelf: Path, command) -> None:
    (shelf / "mine.yaml").write_text("mine")
    code, _, stderr = command("recipes", "cp", "quickstart/reward", "mine.yaml")
    assert (code, stderr) == (2, "error: mine.yaml exists already; name another destination\n")
    assert (shelf / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("wrong", ["quickstart/rewad", "reward"])
def test_an_unknown_name_gets_the_nearest(shelf: Path, command, wrong: str) -> None:
    hint = "(did you mean 'quickstart/reward'?); lit-rlhf recipes ls lists them\n"
    assert command("recipes", "cp", wrong, "x") == (2, "", f"error: no recipe {wrong!r} {hint}")
    assert command("fit", "-c", wrong) == (2, "", f"error: -c {wrong}: no such file, and no recipe {wrong!r} {hint}")


def test_an_unknown_action_is_the_users_error(command) -> None:
    assert command("recipes", "lss")[::2] == (
        2,
        "error: lit-rlhf recipes has no action 'lss' (did you mean 'ls'?): it is ls, show or cp\n",
    )


def test_version_and_help(command) -> None:
    assert command("--version") == (0, "lit-rlhf 0.1.0\n", "")
    for args in ([], ["--help"], ["-h"]):
        code, stdout, _ = command(*args)
        assert code == 0
        assert "  quickstart  run the full procedure" in stdout


@pytest.mark.parametrize("args", [["recipes", "ls"], ["--help"], ["--version"]])
def test_the_light_commands_import_nothing_heavy(args: list[str]) -> None:
    code = (
        f"import sys; from lit_rlhf.cli import main; assert main({args}) == 0; "
        "heavy = {'torch', 'lightning', 'transformers', 'datasets', 'jsonargparse', 'yaml', 'numpy'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_recipes_ls_answers_in_under_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lit_rlhf", "recipes", "ls"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor, which other programs may use too
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not is_evaluation(name)])
def test_every_shipped_recipe_parses_and_its_override_changes_it(
    name: str, command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    of_ppo = name.startswith(("generator/", "reward-model/")) or name == "compute/offload-frozen"
    stage = "ppo" if of_ppo else "sft"
    below = ["-c", f"quickstart/{stage}"] if is_overlay(name) else []
    code, stdout, stderr = command("fit", *below, "-c", name, "--print_config")
    if name == "optimizer/adamw-8bit-sharded" and find_spec("torchao") is None:
        assert code == 2 and "pip install 'lit-rlhf[torchao]'" in stderr
        return
    assert (code, stderr) == (0, "")
    assert "class_path: lit_rlhf.modules." in stdout
    if is_overlay(name):
        return
    (head,) = (line for line in shipped_recipes()[name].read_text().splitlines() if line.startswith("# Override:"))
    override = [word for word in head.split() if word.startswith("--")]
    code, changed, stderr = command("fit", "-c", name, *override, "--print_config")
    assert override and (code, stderr) == (0, "") and changed != stdout
