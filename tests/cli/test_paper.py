"""`lit-rlhf paper`: its graph, its recipes, its arguments. The stages themselves run in `lit-rlhf paper --tiny`."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.support.paper_pipeline import build_stages, locate_paths, name_stage
from lit_rlhf.commands.support.recipe_copies import replace_texts
from lit_rlhf.commands.support.stage_graph import Stage, compute_fingerprints, select_stages
from lit_rlhf.synthetic.paper.build import SHAPES
from lit_rlhf.synthetic.paper.preferences import NAMED_ITERATIONS, POLICY_ITERATIONS
from lit_rlhf.synthetic.paper.rank_groups import GROUPS
from lit_rlhf.synthetic.paper.sections import SECTIONS
from lit_rlhf.synthetic.paper.sweeps import SWEEPS, name_sweep_stage

SWEEP_RUNS = [(sweep, label) for sweep, runs in SWEEPS.items() for label in runs]
RUNS = re.compile(r"runs/\S+")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def stages(out: Path) -> list[Stage]:
    return build_stages(out, 0, "full")


@pytest.fixture(scope="module")
def folder(out: Path, stages: list[Stage]) -> Path:
    """The folder of the seed, with its recipes."""
    return out / "seed-0"


def test_every_stage_comes_after_what_it_needs(stages: list[Stage], tmp_path: Path) -> None:
    fingerprints = compute_fingerprints(stages, tmp_path)
    models = 3 * 4 + 2 + len(SWEEP_RUNS) + (2 + 2 + 1) + 2 * (len(GROUPS) + 1)
    assert (
        len(set(fingerprints.values()))
        == len(stages)
        == models + len(("world", "rankings", "reward")) + len(("group-rankings", "labeler-folds", *SECTIONS))
    )


def test_a_recipe_names_models_of_its_own_seed_and_size_alone(tmp_path: Path) -> None:
    build_stages(tmp_path, 3, "full")
    folder = tmp_path / "seed-3"
    for recipe in (folder / "recipes").iterdir():
        lines = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
        text = "\n".join(lines)
        assert not RUNS.search(text.replace(str(tmp_path), "")), f"{recipe.name} names a path of the quickstart"
        assert f"run_dir: {folder / recipe.stem}\n" in text
        last = recipe.stem.rsplit("-", 1)[-1]
        size = last if last in SHAPES else "medium" if "PPOModule" not in text else "small"
        models = {path.split("/")[1] for path in re.findall(rf"{folder}(/[a-z0-9-]+)/model", text)}
        rewards = {model for model in models if model.startswith("reward")}
        assert all(model.endswith(f"-{size}") for model in models - rewards), (recipe.name, models)
        follows = recipe.stem.split("-")[1] if recipe.stem.startswith("ppo") else ""
        own = f"reward-{follows}" if follows in (*GROUPS, "named") else "reward"
        assert rewards == ({own} if "PPOModule" in text else set())
    assert "world/flan.jsonl" in (folder / "recipes" / "flan-large.yaml").read_text()


def test_the_rate_of_pretraining_falls_with_the_width(folder: Path) -> None:
    rates: dict[str, list[float]] = {}
    for recipe in ("pretraining", "sft", "ppo"):
        for size in SHAPES:
            settings = yaml.safe_load((folder / "recipes" / f"{recipe}-{size}.yaml").read_text())
            rates.setdefault(recipe, []).append(settings["model"]["init_args"]["optimizer"]["init_args"]["lr"])
    assert rates == {"pretraining": [3e-3, 1.5e-3, 7.5e-4], "sft": [1e-3] * 3, "ppo": [3e-4] * 3}


def test_the_longest_path_is_replaced_and_none_twice() -> None:
    paths = {"sft/model": "sft-small/model", "sft\n": "sft-small\n", "world": "world", "world/base_init": "world/b"}
    text = "run_dir: runs/quickstart/sft\nmodel: runs/quickstart/sft/model\np: runs/quickstart/world/base_init\n"
    folder = Path("runs/quickstart/sft/x")
    assert replace_texts(text, locate_paths(paths, folder)) == (
        f"run_dir: {folder}/sft-small\nmodel: {folder}/sft-small/model\np: {folder}/world/b\n"
    )


def test_reward_models_and_policies_of_labelers_differ_in_their_data_and_length_alone(
    folder: Path,
) -> None:
    def read(name: str) -> Any:
        text = (folder / "recipes" / f"{name}.yaml").read_text()
        return yaml.safe_load(text.replace(f"{folder}/{name}\n", f"{folder}/reward\n"))

    plain = read("reward")
    data = {"reward-250": "250", "reward-1000": "1000", "reward-named": "named", "labeler-folds": "of_groups"}
    for name, rankings in data.items() | {(f"reward-{group}", group) for group in GROUPS}:
        recipe = read(name)
        assert recipe["data"]["init_args"].pop("path") == f"{folder}/world/rankings_{rankings}.jsonl"
        assert recipe == {**plain, "data": {**plain["data"], "init_args": recipe["data"]["init_args"]}}
    for name, prompts, iterations in [
        *((f"ppo-{group}-small", "ppo_prompts", POLICY_ITERATIONS) for group in GROUPS),
        ("ppo-named-small", "ppo_prompts_named", NAMED_ITERATIONS),
    ]:
        recipe = read(name)
        assert recipe["data"]["init_args"]["path"] == f"{folder}/world/{prompts}.jsonl"
        assert recipe["trainer"]["max_epochs"] == iterations
        assert recipe["model"]["init_args"]["kl"] == read("ppo-small")["model"]["init_args"]["kl"]
    assert read("ppo-without-kl-small")["model"]["init_args"]["kl"]["init_args"] == {"coefficient": 0.0}


@pytest.mark.parametrize("key", SECTIONS)
def test_a_section_needs_the_stages_of_its_models(stages: list[Stage], key: str) -> None:
    names = {stage.name for stage in select_stages(stages, [name_stage(0, key)])}
    assert name_stage(0, "world") in names
    assert (name_stage(0, "flan-large") in names) == (key == "fig5")
    assert (name_stage(0, "ppo-small") in names) == (key not in ("fig5", "sweeps", "reward-model", "preferences"))
    assert (name_stage(0, "sweep-gamma-0_3") in names) == (key == "sweeps")
    assert (name_stage(0, "sweep-episodes-768") in names) == (key in ("sweeps", "reward-model"))
    assert (name_stage(0, "ppo-brief-small") in names) == (key == "preferences")
    assert (name_stage(0, "labeler-folds") in names) == (key == "reward-model")


@pytest.mark.parametrize(("sweep", "label"), SWEEP_RUNS)
def test_a_run_of_a_sweep_differs_in_its_settings_alone(folder: Path, sweep: str, label: str) -> None:
    recipes = folder / "recipes"
    recipe = yaml.safe_load((recipes / f"{name_sweep_stage(sweep, label)}.yaml").read_text())
    run, model, trainer = SWEEPS[sweep][label], recipe["model"]["init_args"], recipe["trainer"]
    assert model["kl"]["init_args"] == {"coefficient": run.beta}
    assert model["reference"] == str(folder / f"{run.reference}-small" / "model")
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
