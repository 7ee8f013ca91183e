"""Runs in Weights & Biases: what its files hold of the three stages, names, config, and the runs of its sweeps."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lit_rlhf.cli import main
from lit_rlhf.commands.recipes import shipped_recipes, wandb_sweeps
from lit_rlhf.commands.support.python_values import read_python_arguments
from lit_rlhf.commands.support.wandb_runs import apply_run, describe_run, nest_config
from lit_rlhf.lineage.records import read_record
from tests.helpers.small_runs import demonstrations, write_rows
from tests.helpers.stages import write_stages
from tests.helpers.user_project import read_metrics
from tests.helpers.wandb_files import WandbFiles

STAGES = ("sft", "reward", "ppo")
SECRET = "feedc0de" * 5
LOGGED = {
    "trainer": {
        "max_epochs": 3,
        "callbacks+": [
            {"class_path": "lit_rlhf.callbacks.LogHistograms"},
            {"class_path": "lit_rlhf.callbacks.Throughput"},
        ],
    }
}


@pytest.fixture(scope="module")
def experiment(llama: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `runs` in which the three stages have run, logging to W&B's files."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_API_KEY": SECRET}.items():
            patch.setenv(name, value)
        write_stages(folder, llama)
        write_rows(folder / "demonstrations.jsonl", [row | {"task": "repeat"} for row in demonstrations(12)])
        (folder / "more.yaml").write_text(yaml.safe_dump(LOGGED))
        for stage in STAGES:
            more = ["-c", "more.yaml"] if stage == "ppo" else []
            every = ["--trainer.callbacks.LogSamples.every_n_epochs=1"] if stage == "ppo" else []
            assert main(["fit", "-c", f"{stage}.yaml", "-c", "logger/wandb", *more, *every]) == 0
    return folder / "runs"


@pytest.fixture(scope="module")
def files(experiment: Path) -> dict[str, WandbFiles]:
    """What W&B wrote of each stage."""
    return {stage: WandbFiles(experiment / stage) for stage in STAGES}


def test_the_stages_of_an_experiment_are_one_group(files: dict[str, WandbFiles], llama: str) -> None:
    for stage, each in files.items():
        run = each.run
        assert (run.project, run.run_group, run.job_type) == ("lit-rlhf", "runs", stage)
        assert run.display_name == f"runs-{stage}"
        assert set(run.tags) == {stage, llama[-64:], "logger/wandb"}
    assert len({each.run.run_id for each in files.values()}) == 3


def test_the_config_is_the_recipe_by_the_names_of_the_command_line(files: dict[str, WandbFiles], llama: str) -> None:
    config = files["ppo"].config
    assert config["model"]["model"] == llama
    assert config["model"]["reward"]["function"] == "words.count"
    assert config["model"]["ppo"]["rollout_batch_size"] == 8 and config["model"]["ppo"]["clip_range"] == 0.2
    assert config["trainer"]["callbacks"]["LogSamples"]["every_n_epochs"] == 1
    assert config["run_dir"] == "runs/ppo" and config["seed_everything"] == 0
    assert {"model", "data", "trainer"} < config.keys() and "config" not in config


def test_every_number_of_the_csv_file_is_there(files: dict[str, WandbFiles], experiment: Path) -> None:
    for stage, each in files.items():
        written = {name for row in read_metrics(experiment / stage) for name, value in row.items() if value}
        assert written - {"step"} <= {name for row in each.rows for name in row}


def test_learning_rates_and_gradient_norms_are_logged_per_step_and_network(files: dict[str, WandbFiles]) -> None:
    for stage, networks in (("sft", ["model"]), ("reward", ["model"]), ("ppo", ["policy", "critic"])):
        rows = [row for row in files[stage].rows if f"lr/{networks[0]}" in row]
        assert len(rows) > 2
        for row in rows:
            assert all(row[f"lr/{name}"] > 0 and row[f"grad_norm/{name}"] > 0 for name in networks)
    assert rows[0]["lr/policy"] == pytest.approx(1e-3) and rows[0]["lr/critic"] == pytest.approx(9e-6)


def test_iterations_are_the_axis_of_ppo(files: dict[str, WandbFiles]) -> None:
    ppo = files["ppo"]
    for name in ("reward/score", "policy/loss", "validation/score", "throughput/device_tokens_per_sec"):
        assert ppo.metrics[name].step_metric == "iteration"
    for name in ("lr/policy", "grad_norm/critic", "iteration", "episodes", "tokens"):
        assert ppo.metrics[name].step_metric == "trainer/global_step"
    assert files["sft"].metrics["validation/loss"].step_metric == "trainer/global_step"
    rows = [row for row in ppo.rows if "reward/score" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert [row["episodes"] for row in rows] == [8, 16, 24]
    lengths = [8 * (row["prompt/length"] + row["response/length"]) for row in rows]
    assert [row["tokens"] for row in rows] == pytest.approx([sum(lengths[: n + 1]) for n in range(3)])
    tokens = [row["tokens"] for row in files["sft"].rows if "lr/model" in row]
    assert tokens == sorted(set(tokens)) and tokens[0] > 0


def test_a_summary_has_the_best_score_and_the_last_kl(files: dict[str, WandbFiles]) -> None:
    ppo, sft = files["ppo"], files["sft"]
    scores = [row["validation/score"] for row in ppo.rows if "validation/score" in row]
    assert len(scores) == 3 and ppo.summary["validation/score"] == {"max": max(scores), "last": scores[-1]}
    assert ppo.summary["reward/kl"] == [row["reward/kl"] for row in ppo.rows if "reward/kl" in row][-1]
    losses = [row["train/loss"] for row in sft.rows if "train/loss" in row]
    assert sft.summary["train/loss"]["min"] == min(losses)


def test_histograms_count_every_value(files: dict[str, WandbFiles]) -> None:
    rows = [row for row in files["ppo"].rows if "histogram/scores" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    scores = [row for row in files["ppo"].rows if "reward/score" in row]
    for row, metrics in zip(rows, scores, strict=True):
        assert {row[f"histogram/{name}"]["_type"] for name in ("scores", "advantages", "ratios")} == {"histogram"}
        counts = row["histogram/scores"]["values"]
        assert sum(counts) == 8
        tokens = round(8 * metrics["response/length"])
        assert sum(row["histogram/advantages"]["values"]) == tokens
        assert sum(row["histogram/ratios"]["values"]) == tokens, "each token once: one epoch, one rank"
        edges = row["histogram/advantages"]["bins"]
        assert (edges[0], edges[-1]) == pytest.approx((metrics["advantage/min"], metrics["advantage/max"]))
        peak = max(range(64), key=lambda each: row["histogram/ratios"]["values"][each])
        assert row["histogram/ratios"]["bins"][peak] <= 1.0 <= row["histogram/ratios"]["bins"][peak + 1] + 1e-6


def test_one_table_of_samples_grows_on_the_same_prompts(files: dict[str, WandbFiles]) -> None:
    ppo = files["ppo"]
    rows = [row for row in ppo.rows if "samples" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert [row["samples"]["increment_num"] for row in rows] == [0, 1, 2]
    tables = [ppo.table(row["samples"]) for row in rows]
    assert len({tuple(each["prompt"] for each in table) for table in tables}) == 1
    known = {row["prompt"]: row["completion"] for row in demonstrations(12)}
    for number, table in enumerate(tables, 1):
        for each in table:
            assert list(each) == ["iteration", "prompt", "reference", "response", "score", "kl"]
            assert each["iteration"] == number and each["reference"] == known[each["prompt"]]
            assert each["score"] == len(each["response"].split())


def test_the_score_of_each_task_is_logged(files: dict[str, WandbFiles]) -> None:
    for row in files["ppo"].rows:
        if "reward/score" in row:
            assert row["reward/score_by_task/repeat"] == pytest.approx(row["reward/score"])


def test_the_reward_models_tables_and_page_are_there(files: dict[str, WandbFiles]) -> None:
    reward = files["reward"]
    (row,) = (row for row in reward.rows if "reward_model_report/page" in row)
    page = (reward.folder / "files" / row["reward_model_report/page"]["path"]).read_text()
    assert "Quality of a reward model" in page
    assert any("reward_model_report/by_size" in row for row in reward.rows)


def test_the_version_of_the_model_waits_in_the_files(files: dict[str, WandbFiles], experiment: Path) -> None:
    for stage, each in files.items():
        (artifact,) = (record.artifact for record in each.of_type("artifact") if record.artifact.type == "model")
        record = read_record(experiment / stage / "model")
        assert record is not None and record.wandb is not None and record.wandb.id == each.run.run_id
        assert artifact.name == record.wandb.collection == f"runs-{stage}"
        assert {"latest", "iteration-3" if stage == "ppo" else "step-3"} <= set(artifact.aliases)
        names = {entry.path for entry in artifact.manifest.contents}
        assert {"model.safetensors", "config.json", "lineage.json", "README.md"} <= names


def test_no_file_holds_the_key(files: dict[str, WandbFiles], experiment: Path) -> None:
    staged = Path.home() / ".local" / "share" / "wandb"
    for folder in (experiment.parent, staged):
        assert [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()] == []


# ------------------------------------------------------------------------------------------------- names and settings


@pytest.mark.parametrize(
    "folder, experiment, group, name",
    [
        ("runs/small/ppo", None, "small", "small-ppo"),
        ("out", None, "work", "work-out"),
        (".", None, "work", "work-sft"),
        ("runs/kl/runs/a", "runs/kl", "kl", "kl-runs-a"),
        ("/top", None, "top", "top-sft"),
    ],
)
def test_a_group_is_the_folder_of_the_experiment(
    folder: str, experiment: str | None, group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run = describe_run(Path(folder), "sft", [], [], experiment and Path(experiment))
    assert (run.group, run.name) == (group, name)


def test_tags_are_model_and_overlays_and_notes_the_title() -> None:
    recipes = [shipped_recipes()[name] for name in ("small/ppo", "adapter/lora", "precision/bf16-true")]
    run = describe_run(Path("runs/small/ppo"), "ppo", ["ppo", "https://me:pw@host/" + "m" * 60, ""], recipes)
    assert run.tags == ["ppo", "removed@host/"[-4:] + "m" * 60, "adapter/lora", "precision/bf16-true"]
    assert run.notes == "Step 3, PPO of a small model against its reward model."


def test_settings_of_the_user_win(tmp_path: Path) -> None:
    run = describe_run(Path("runs/small/ppo"), "ppo", ["gpt2"], [])
    logger = WandbLogger(name="mine", save_dir=tmp_path, group="ours")
    apply_run([CSVLogger(tmp_path), logger], run, {"WANDB_JOB_TYPE": "theirs"})
    arguments = logger._wandb_init
    assert (arguments["name"], arguments["group"], arguments["tags"]) == ("mine", "ours", ["gpt2"])
    assert "job_type" not in arguments and "notes" not in arguments


def test_a_config_has_the_names_of_the_command_line() -> None:
    kl = {"class_path": "a.KL", "init_args": {"coefficient": 0.1}, "dict_kwargs": {"more": 1}}
    ema, mix = ({"class_path": f"b.{name}", "init_args": {"x": [1, 2]}} for name in ("EMA", "Mix"))
    config = {"model": {"class_path": "M", "init_args": {"kl": kl}}, "callbacks": [ema, mix], "twice": [ema, ema]}
    flat = {"class_path": "b.EMA", "x": [1, 2]}
    assert nest_config(config) == {
        "model": {"class_path": "M", "kl": {"class_path": "a.KL", "coefficient": 0.1, "more": 1}},
        "callbacks": {"EMA": flat, "Mix": flat | {"class_path": "b.Mix"}},
        "twice": [flat, flat],
    }


# ------------------------------------------------------------------------------------------------------------- sweeps


def agent_arguments(values: dict[str, Any]) -> list[str]:
    """Return what W&B's agent puts in place of ${args}."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    command = {"args": {name: {"value": value} for name, value in values.items()}}
    return list(create_sweep_command_args(command)["args"])


def test_the_runs_of_an_agent_have_settings_and_folders_of_their_own(
    stages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model.kl.coefficient": 0.02,
        "data.validation_path": None,
        "model.advantages": {"class_path": "lit_rlhf.rollout.GAE", "init_args": {"gae_lambda": 0.9}},
        "model.optimizer.betas": [0.8, 0.9],
        "model.ppo.offload_frozen": True,
        "model.sampling": {"max_new_tokens": 4, "top_k": None, "missing_eos": {"score": None, "penalty": 0.5}},
        "model.sampling.top_p": None,
        "model.loading.pad_token": None,
        "trainer.enable_checkpointing": True,
        "trainer.callbacks.LogSamples.rows": 3,
    }
    kl = {"class_path": "lit_rlhf.rollout.FixedKLController", "init_args": {"coefficient": 0.1}}
    (stages / "kl.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"kl": kl}}}))
    recipes = ["-c", "ppo.yaml", "-c", "kl.yaml"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for run in ("first", "second"):
        monkeypatch.setenv("WANDB_RUN_ID", run)
        assert main(["fit", *recipes, *agent_arguments(values)]) == 0, capsys.readouterr().err
    for run in ("first", "second"):
        folder = Path("runs/ppo/sweep-s1") / run
        assert (folder / "model" / "config.json").is_file() and (folder / "metrics.csv").is_file()
        recipe = yaml.safe_load((folder / "config.yaml").read_text())
        model = recipe["model"]["init_args"]
        assert model["kl"]["init_args"]["coefficient"] == 0.02
        assert model["advantages"]["init_args"]["gae_lambda"] == 0.9
        assert model["optimizer"]["init_args"]["betas"] == [0.8, 0.9]
        assert recipe["data"]["init_args"]["validation_path"] is None
        assert model["sampling"]["missing_eos"] == {"score": None, "penalty": 0.5}
        assert model["sampling"]["top_k"] is model["sampling"]["top_p"] is model["loading"]["pad_token"] is None
        assert model["ppo"]["offload_frozen"] is True and recipe["run_dir"] == str(folder)
        (samples,) = (each for each in recipe["trainer"]["callbacks"] if "LogSamples" in each["class_path"])
        assert samples["init_args"]["rows"] == 3
    monkeypatch.setenv("WANDB_RUN_ID", "third")
    assert main(["fit", *recipes, "--run_dir=mine/third", *agent_arguments({"model.kl.coefficient": 0.5})]) == 0
    assert Path("mine/third/model").is_dir(), "a run_dir with the run's id is taken as it is"


@pytest.mark.parametrize(
    "value", [None, True, "a name", {"low": None, "deep": {"x": [None, False, "it's", "None"]}}, [None, 1.5], []]
)
def test_a_value_of_the_agent_means_in_yaml_what_it_meant_in_python(value: Any) -> None:
    (argument,) = read_python_arguments(agent_arguments({"model.x": value}))
    name, _, text = argument.partition("=")
    assert name == "--model.x" and yaml.safe_load(text) == value


def test_what_the_sweeps_own_command_says_is_yaml_already() -> None:
    words = ["fit", "-c", "ppo.yaml", "--a={x: null}", "--b={1, 2}", "--c=[one, two]", "--d=None.yaml", "--e"]
    assert read_python_arguments(words) == words


def test_the_shipped_sweep_names_settings_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "cp", "wandb-sweep", "sweep.yaml"]) == 0
    sweep = yaml.safe_load((tmp_path / "sweep.yaml").read_text())
    assert sweep == yaml.safe_load(wandb_sweeps()["wandb-sweep"].read_text())
    assert sweep["command"][:2] == ["${env}", "lit-rlhf"] and sweep["command"][-1] == "${args}"
    drawn = {name: given.get("min", given.get("values", [None])[-1]) for name, given in sweep["parameters"].items()}
    capsys.readouterr()
    assert main([*sweep["command"][2:-1], *agent_arguments(drawn), "--print_config"]) == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert model["optimizer"]["init_args"]["lr"] == model["ppo"]["critic_learning_rate"] == 1e-5
    assert model["ppo"]["ppo_epochs"] == 4
    assert main(["fit", "-c", "wandb-sweep"]) == 2 and "no such file" in capsys.readouterr().err
    assert main(["recipes", "ls"]) == 0
    listing = capsys.readouterr().out
    assert listing.index("wandb-sweep") > listing.index("Sweeps: ")
