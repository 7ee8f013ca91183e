"""`lit-rlhf paper`: its graph, its recipes, its arguments. The stages themselves run in `lit-rlhf paper --tiny`."""

import re
from pathlib import Path

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.support.paper_pipeline import build_stages, name_stage, replace_paths
from lit_rlhf.commands.support.stage_graph import Stage, compute_fingerprints, select_stages
from lit_rlhf.synthetic.paper.sections import SECTIONS
from lit_rlhf.synthetic.paper.sweeps import SWEEPS, name_sweep_stage

SWEEP_RUNS = [(sweep, label) for sweep, runs in SWEEPS.items() for label in runs]
RUNS = re.compile(r"runs/\S+")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    return build_stages(tmp_path_factory.mktemp("paper"), 0, "full")


def test_every_stage_comes_after_what_it_needs(stages: list[Stage], tmp_path: Path) -> None:
    fingerprints = compute_fingerprints(stages, tmp_path)
    assert len(set(fingerprints.values())) == len(stages) == 1 + 3 * 4 + 2 + 2 + len(SWEEP_RUNS) + len(SECTIONS)


def test_a_recipe_names_models_of_its_own_seed_and_size_alone(stages: list[Stage], tmp_path: Path) -> None:
    build_stages(tmp_path, 3, "full")
    folder = tmp_path / "seed-3"
    for recipe in (folder / "recipes").iterdir():
        lines = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
        text = "\n".join(lines)
        assert not RUNS.search(text.replace(str(tmp_path), "")), f"{recipe.name} names a path of the quickstart"
        assert f"run_dir: {folder / recipe.stem}\n" in text
        size = "medium" if recipe.stem == "reward" else recipe.stem.rsplit("-", 1)[-1]
        if recipe.stem.startswith("sweep"):
            size = "small"
        models = {path.split("/")[1] for path in re.findall(rf"{folder}(/[a-z0-9-]+)/model", text)} - {"reward"}
        assert all(model.endswith(f"-{size}") for model in models), (recipe.name, models)
    assert "world/flan.jsonl" in (folder / "recipes" / "flan-large.yaml").read_text()


def test_the_longest_path_is_replaced_and_none_twice() -> None:
    paths = {"sft/model": "sft-small/model", "sft\n": "sft-small\n", "world": "world", "world/base_init": "world/b"}
    text = "run_dir: runs/quickstart/sft\nmodel: runs/quickstart/sft/model\np: runs/quickstart/world/base_init\n"
    folder = Path("runs/quickstart/sft/x")
    assert replace_paths(text, paths, folder) == (
        f"run_dir: {folder}/sft-small\nmodel: {folder}/sft-small/model\np: {folder}/world/b\n"
    )


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_needs_the_stages_of_its_models(stages: list[Stage], key: str) -> None:
    names = {stage.name for stage in select_stages(stages, [name_stage(0, key)])}
    assert name_stage(0, "world") in names
    assert (name_stage(0, "flan-large") in names) == (key == "fig5")
    assert (name_stage(0, "ppo-small") in names) == (key not in ("fig5", "sweeps"))
    assert (name_stage(0, "sweep-gamma-0_3") in names) == (key == "sweeps")


@pytest.mark.parametrize(("sweep", "label"), SWEEP_RUNS)
def test_a_run_of_a_sweep_differs_in_its_settings_alone(tmp_path: Path, sweep: str, label: str) -> None:
    build_stages(tmp_path, 0, "full")
    recipes = tmp_path / "seed-0" / "recipes"
    recipe = yaml.safe_load((recipes / f"{name_sweep_stage(sweep, label)}.yaml").read_text())
    run, model, trainer = SWEEPS[sweep][label], recipe["model"]["init_args"], recipe["trainer"]
    assert model["kl"]["init_args"] == {"coefficient": run.beta}
    assert model["reference"] == str(tmp_path / "seed-0" / f"{run.reference}-small" / "model")
    (mix,) = (each for each in trainer["callbacks"] if each["class_path"].endswith("PretrainingMix"))
    assert mix["init_args"]["coefficient"] == run.gamma and trainer["max_epochs"] == run.iterations
    plain = yaml.safe_load((recipes / "ppo-ptx-small.yaml").read_text())
    for each in (recipe, plain):
        each["run_dir"], each["trainer"]["max_epochs"] = "", 0
        each["model"]["init_args"] |= {"kl": {}, "reference": ""}
        for callback in each["trainer"]["callbacks"]:
            callback.get("init_args", {}).pop("coefficient", None)
    assert recipe == plain


def test_another_seed_or_scale_is_another_fingerprint(tmp_path: Path) -> None:
    found = {
        (seed, scale): tuple(compute_fingerprints(build_stages(tmp_path, seed, scale), tmp_path).values())
        for seed in (0, 1)
        for scale in ("full", "tiny")
    }
    assert len(set(found.values())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fig2"], "--only: no section 'fig2'"),
        (["--seeds", "one"], "--seeds one: expected integers"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
        (["-c", "logger/nowhere"], "logger/nowhere"),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["paper", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []
