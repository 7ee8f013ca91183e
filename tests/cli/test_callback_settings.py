"""`--trainer.callbacks.CLASS.KEY=VALUE` sets the callback of that class, wherever it is in the list."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.commands.support.callback_settings import set_named_callbacks
from lit_rlhf.commands.support.setting_paths import get_class_name

NAMES = ("Mix", "Guard", "Log", "Export")


def entry(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"a.b.{name}", "init_args": {"x": 0, "y": {"z": 0}, **arguments}}


@given(st.permutations(NAMES), st.dictionaries(st.sampled_from(NAMES), st.integers(), min_size=1), st.booleans())
def test_any_callback_of_any_list_is_reached(names: list[str], values: dict[str, int], joined: bool) -> None:
    composed: list[list[str]] = []

    def compose(words: list[str]) -> dict[str, Any]:
        composed.append(words)
        return {"trainer": {"callbacks": [entry(name) for name in names]}}

    words = ["-c", "r.yaml", "--print_config"]
    for name, value in values.items():
        key = f"--trainer.callbacks.{name}.y.z"
        words[2:2] = [f"{key}={value}"] if joined else [key, str(value)]
    *rest, last = set_named_callbacks(words, compose)
    assert rest == ["-c", "r.yaml", "--print_config"] and composed == [["-c", "r.yaml"]]
    key, _, text = last.partition("=")
    assert key == "--trainer.callbacks"
    found = {get_class_name(each): each["init_args"] for each in yaml.safe_load(text)}
    assert list(found) == names  # the order is kept
    assert {name: arguments["y"]["z"] for name, arguments in found.items()} == dict.fromkeys(NAMES, 0) | values
    assert all(arguments["x"] == 0 for arguments in found.values())


def test_other_arguments_are_left_alone() -> None:
    words = ["-c", "r", "--trainer.callbacks.dirpath=x", "--trainer.callbacks+=a.B", "--model.Kl.x=1"]
    assert set_named_callbacks(words, lambda _: pytest.fail("parsed twice")) == words


def printed(command: Callable[..., Any], *words: str) -> dict[str, dict[str, Any]]:
    code, out, err = command("fit", *words, "--print_config")
    assert code == 0, err
    return {get_class_name(each): each.get("init_args", {}) for each in yaml.safe_load(out)["trainer"]["callbacks"]}


def test_the_coefficient_of_the_pretraining_mix(command: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    key = "--trainer.callbacks.PretrainingMix.coefficient"
    for recipe in ("quickstart/sft", "quickstart/sweep-gamma", "paper/ppo-ptx-6b"):  # first, in the middle, last
        before = printed(command, "-c", recipe)
        after = printed(command, "-c", recipe, f"{key}=7.5")
        assert after.pop("PretrainingMix") == {**before.pop("PretrainingMix"), "coefficient": 7.5}
        assert after == before
    limits = "--trainer.callbacks.MetricGuard.limits={reward/kl: {above: 3, action: stop}}"
    guard = printed(command, "-c", "quickstart/ppo", limits)["MetricGuard"]["limits"]
    assert guard == {"reward/kl": {"above": 3.0, "below": None, "patience": 1, "action": "stop"}}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "--trainer.callbacks.PretrainingMx.coefficient=0",
            "no callback 'PretrainingMx' (did you mean 'PretrainingMix'?)",
        ),
        ("--trainer.callbacks.EMA.decay=0.9", "no callback 'EMA'; it has Throughput, PretrainingMix, ExportModel"),
        ("--trainer.callbacks.PretrainingMix.coeficient=0", "no setting 'coeficient' (did you mean 'coefficient'?)"),
        ("--trainer.callbacks.PretrainingMix.coefficient=much", "expected float, got 'much'"),
        ("--trainer.callbacks.9.coefficient=0", "no setting '9'"),
        ("--trainer.callbacks.PretrainingMix.coefficient=[1", "'[1' is not valid YAML"),
        ("--trainer.callbacks.PretrainingMix.coefficient", "a value is missing"),
    ],
)
def test_what_is_refused(word: str, said: str, command: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command("fit", "-c", "quickstart/sft", word)
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_two_callbacks_of_a_class(project: Path, command: Callable[..., Any]) -> None:
    counters = ", ".join(f"{{class_path: toys.CountSteps, init_args: {{path: {name}}}}}" for name in "nm")
    twice = f"trainer: {{callbacks: [{counters}]}}"
    (project / "twice.yaml").write_text(twice)
    code, _, err = command("fit", "-c", "recipe.yaml", "-c", "twice.yaml", "--trainer.callbacks.CountSteps.path=k")
    assert code == 2 and "2 entries are a CountSteps; name one by its index, from 0" in err
    assert command("fit", "-c", "recipe.yaml", "-c", "twice.yaml", "--trainer.callbacks.0.path=k")[0] == 0
    assert (project / "k").exists() and (project / "m").exists() and not (project / "n").exists()


def test_a_second_one_with_a_state_is_refused(command: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MetricGuard", "RewardModelReport"):
        recipe = "quickstart/ppo" if name == "MetricGuard" else "quickstart/reward"
        code, _, err = command("fit", "-c", recipe, f"--trainer.callbacks+=lit_rlhf.callbacks.{name}")
        assert code == 2 and f"error: trainer.callbacks: {name} is there twice" in err, err
        assert not any(tmp_path.iterdir())
