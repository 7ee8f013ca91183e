"""A setting stands once, a seed is in range, and `~/` is the home folder: alike in every recipe and argument."""

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.cli import main
from lit_rlhf.commands.support import sweep_runs
from lit_rlhf.commands.support.config_locations import check_arguments, parse_yaml
from lit_rlhf.commands.support.home_folders import expand_arguments
from lit_rlhf.errors import UserError
from tests.cli.test_errors import error_lines

TWICE = {
    "a section": (
        "trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}",
        "dup.yaml:3: 'trainer' stands twice (first in line 1)",
    ),
    "a nested key": (
        "model:\n  init_args:\n    hidden: 1\n    hidden: 2",
        "dup.yaml:4: 'hidden' stands twice (first in line 3)",
    ),
    "a key in a list": (
        "trainer:\n  callbacks:\n  - class_path: toys.A\n    class_path: toys.B",
        "dup.yaml:4: 'class_path' stands twice (first in line 3)",
    ),
    "a quoted key": ("'model': {}\nmodel: {}", "dup.yaml:2: 'model' stands twice (first in line 1)"),
    "a dotted key": (
        "trainer: {max_steps: 1}\ntrainer.max_steps: 2",
        "dup.yaml:2: 'trainer.max_steps' stands twice (first in line 1)",
    ),
    "a key of JSON": (
        '{"trainer": {"max_steps": 1,\n "max_steps": 2}}',
        "dup.yaml:2: 'max_steps' stands twice (first in line 1)",
    ),
}
COMMANDS = (["fit"], ["validate"], ["plan"], ["evaluate"], ["sweep", "--over", "model.hidden=1,2"])


@pytest.mark.parametrize("kind", TWICE)
@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: args[0])
def test_a_key_that_stands_twice_is_refused_with_both_lines(project: Path, command, args: list[str], kind: str) -> None:
    text, expected = TWICE[kind]
    (project / "dup.yaml").write_text(text)
    code, _, stderr = command(*args, "-c", "recipe.yaml", "-c", "dup.yaml")
    assert (code, error_lines(stderr)) == (2, [f"error: {expected}"])


def test_a_key_that_stands_twice_in_a_file_that_a_recipe_names_is_refused(project: Path, command) -> None:
    (project / "model.yaml").write_text("class_path: toys.ToyModule\ninit_args:\n  hidden: 1\n  hidden: 2\n")
    (project / "overlay.yaml").write_text("model: model.yaml")
    expected = "error: model.yaml:4: 'hidden' stands twice (first in line 3)"
    for argument in (("-c", "overlay.yaml"), ("--model=model.yaml",)):
        code, _, stderr = command("fit", "-c", "recipe.yaml", *argument)
        assert (code, error_lines(stderr)) == (2, [expected])


@pytest.mark.parametrize("args", [["fit"], ["sweep", "--over", "model.hidden=1"]])
def test_a_key_that_stands_twice_in_an_argument_is_refused(project: Path, command, args: list[str]) -> None:
    value = "{class_path: toys.ToyModule, init_args: {hidden: 1, hidden: 2}}"
    code, _, stderr = command(*args, "-c", "recipe.yaml", f"--model={value}")
    assert (code, error_lines(stderr)) == (2, ["error: model: 'hidden' stands twice (first in line 1) [command line]"])


def test_a_setting_that_varies_twice_is_refused(project: Path, command) -> None:
    args = ("--over", "model.hidden=1,2", "--over", "model.hidden=3")
    code, _, stderr = command("sweep", "-c", "recipe.yaml", *args)
    assert (code, stderr.splitlines()[-1]) == (
        2,
        "error: --over model.hidden stands twice; name all its values once, separated by commas",
    )


NESTED = st.recursive(
    st.integers() | st.text("abc", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner),
    max_leaves=12,
)


@given(config=st.dictionaries(st.text("xyz", min_size=1, max_size=2), NESTED, min_size=1), data=st.data())
def test_only_a_repeated_key_is_refused(config, data, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "a.yaml"
    path.write_text(yaml.safe_dump(config))
    parse_yaml(path)
    key = data.draw(st.sampled_from(sorted(config)))
    path.write_text(json.dumps(config)[:-1] + f",\n {json.dumps(key)}: 1}}")
    with pytest.raises(UserError, match=rf"a\.yaml:2: '{key}' stands twice \(first in line 1\)"):
        parse_yaml(path)


RANGE = "use an integer from 0 to 4294967295"
BAD_SEEDS = {
    "-1": f"-1 is no seed; {RANGE}",
    "4294967296": f"4294967296 is no seed; {RANGE}",
    "99999999999999999999": f"99999999999999999999 is no seed; {RANGE}",
}


@pytest.mark.parametrize("seed", BAD_SEEDS)
@pytest.mark.parametrize(
    "args, name, location",
    [
        (["fit", "-c", "recipe.yaml", "--seed_everything={}"], "seed_everything", " [command line]"),
        (["fit", "-c", "recipe.yaml", "-c", "seed.yaml"], "seed_everything", " [seed.yaml:2]"),
        (["plan", "-c", "recipe.yaml", "--seed_everything={}"], "seed_everything", " [command line]"),
        (["fit", "-c", "quickstart/sft", "--data.seed={}"], "data.seed", " [command line]"),
        (["evaluate", "-c", "evaluate/quickstart", "--seed={}"], "seed", " [command line]"),
        (["sweep", "-c", "recipe.yaml", "--over", "model.hidden=1", "--seeds=1,{}"], "--seeds", ""),
        (["quickstart", "--seed={}"], "lit-rlhf quickstart: --seed", ""),
        (["quickstart", "--sweep", "--seeds={}"], "--seeds", ""),
        (["generate", "--model=x", "--prompt=x", "--seed={}"], "lit-rlhf generate: --seed", ""),
        (
            ["best-of-n", "--model=x", "--reward=x", "--prompts=x", "--out=x", "--seed={}"],
            "lit-rlhf best-of-n: --seed",
            "",
        ),
    ],
)
def test_a_seed_out_of_range_is_one_line(project: Path, command, args, name: str, location: str, seed: str) -> None:
    (project / "seed.yaml").write_text(f"# an overlay\nseed_everything: {seed}")
    before = sorted(project.rglob("*"))
    code, _, stderr = command(*(arg.replace("{}", seed) for arg in args))
    assert (code, error_lines(stderr)) == (2, [f"error: {name}: {BAD_SEEDS[seed]}{location}"])
    assert [path for path in sorted(project.rglob("*")) if "__pycache__" not in path.parts] == before


@pytest.mark.parametrize("seed", ["0", "4294967295"])
def test_the_ends_of_the_range_are_seeds(project: Path, command, seed: str) -> None:
    assert command("fit", "-c", "recipe.yaml", f"--seed_everything={seed}")[0] == 0


def test_a_seed_of_another_package_is_its_own_business(project: Path, command) -> None:
    (project / "other.py").write_text(
        "import toys\n\n\nclass Data(toys.ToyData):\n    def __init__(self, seed: int):\n        super().__init__()\n"
    )
    assert command("fit", "-c", "recipe.yaml", "--data=other.Data", "--data.seed=-1")[0] == 0


@pytest.fixture
def home(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = project / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_the_home_folder_is_expanded_in_recipes_and_arguments(project: Path, home: Path, command) -> None:
    (project / "recipe.yaml").rename(home / "recipe.yaml")
    (home / "model.yaml").write_text("class_path: toys.ToyModule\ninit_args: {fault: ~/in-a-file}\n")
    (home / "overlay.yaml").write_text("data: {init_args: {path: ~/rows.jsonl}}")
    args = ("-c", "~/recipe.yaml", "--config=~/overlay.yaml", "--run_dir", "~/run", "--model=~/model.yaml")
    code, stdout, stderr = command("fit", *args, "--print_config")
    assert code == 0, stderr
    config = yaml.safe_load(stdout)
    assert config["data"]["init_args"]["path"] == f"{home}/rows.jsonl"
    assert config["run_dir"] == f"{home}/run"
    assert config["model"]["init_args"]["fault"] == f"{home}/in-a-file"
    assert command("fit", *args[:-1])[0] == 0
    assert (home / "run").is_dir() and not (project / "~").exists()


def test_the_home_folder_is_expanded_in_the_other_commands(
    project: Path, home: Path, command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_runs, "start_process", lambda run, jobs: main(["fit", "-c", str(run.recipe)]))
    assert command("recipes", "cp", "quickstart/sft", "~/sft.yaml")[0] == 0
    assert (home / "sft.yaml").is_file()
    for args in (
        ["generate", "--model=~/none", "--prompt=x"],
        ["rank", "--model=x", "~/none.jsonl"],
        ["export", "~/none", "~/out"],
    ):
        code, _, stderr = command(*args)
        assert code == 2 and f"{home}/none" in stderr and "~" not in stderr, (args, stderr)
    over = command("sweep", "-c", "recipe.yaml", "--over", "data.path=~/a,~/b", "--out=~/sweep")
    assert over[0] == 0
    recipe = yaml.safe_load(next((home / "sweep" / "runs").glob("path=*a,seed=0/recipe.yaml")).read_text())
    assert recipe["data"]["init_args"]["path"] == f"{home}/a"


def test_an_unknown_user_is_refused(project: Path, command) -> None:
    (project / "overlay.yaml").write_text("data: {init_args: {path: ~nobody-here/rows.jsonl}}")
    for args in (["-c", "overlay.yaml"], ["--data.path=~nobody-here/rows.jsonl"]):
        code, _, stderr = command("fit", "-c", "recipe.yaml", *args)
        assert code == 2 and "~nobody-here/rows.jsonl: there is no user 'nobody-here'" in stderr


@pytest.mark.parametrize("text", ["~", "a~/b", "~5 / 7", "x=~/y", "~ /z", "~~/"])
def test_other_tildes_are_left_alone(text: str) -> None:
    assert expand_arguments([text]) == [text]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("trainer:", "own.yaml:1: trainer is a mapping of settings"),
        ("# none\ntrainer: 5", "own.yaml:2: trainer is a mapping of settings"),
        ("trainer: [1]", "own.yaml:1: trainer is a mapping of settings"),
        ("trainer:\n  callbacks+:", "own.yaml:2: 'trainer.callbacks+' has no value"),
        ("model: &m\n  init_args: {loading: *m}", "own.yaml:2: 'model.init_args.loading' is an alias of what it"),
        ("trainer: &t {<<: *t}", "own.yaml:1: 'trainer.<<' is an alias of what it stands in"),
        ("trainer: {callbacks: &c [*c]}", "own.yaml:1: 'trainer.callbacks.[0]' is an alias of what it stands in"),
    ],
)
def test_what_would_drop_settings_or_never_end_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(expected)):
        parse_yaml(path)


@pytest.mark.parametrize(
    "arg, expected",
    [
        ("--trainer.callbacks+=null", "trainer.callbacks+ has no value"),
        ("--trainer={callbacks: &c [*c]}", "trainer: 'callbacks.[0]' is an alias of what it stands in"),
    ],
)
def test_the_same_in_an_argument(arg: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        check_arguments([arg])


def test_a_trainer_may_stand_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("trainer: trainer.yaml")
    assert len(parse_yaml(tmp_path / "own.yaml").value) == 1
