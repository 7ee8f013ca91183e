"""`lit-rlhf real` on a tiny random model of SmolLM2's kind: every stage, its report; killed and called again."""

import gzip
import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.support import real_pipeline, real_scales, stage_runner
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.real_data import ENCYCLOPEDIA, RealDataSizes, write_real_data
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.reports.real_report import COLUMNS, get_cell
from lit_rlhf.modules.ppo import PPOModule
from tests.helpers.html_page import Page
from tests.helpers.real_folder import write_real_folder
from tests.helpers.tiny_models import write_tiny_model

TRAINED_FIRST = ["sft", "reward", "gold", "politeness"]
STAGES = ["model", "data", "precision", *TRAINED_FIRST, "accuracy", "ppo", "ppo-ptx", "evaluation"]
MODELS = ["base", "SFT", "PPO", "PPO-ptx", "best of 2"]
SMALL = real_scales.TINY._replace(
    sizes=RealDataSizes(16, 12, 12, 6, 24, 4, max_prompt_tokens=200, max_completion_tokens=64, max_ranked_tokens=64)
)


class Killed(BaseException):
    """As of a process that is killed: nothing handles it."""


@pytest.fixture(autouse=True)
def classifier_that_may_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_from_spec(ModuleSpec("profanity_check", None))
    module.predict_prob = lambda texts: [0.25 for _ in texts]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "profanity_check", module)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_real_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model("smollm2", tmp_path_factory.mktemp("smollm2"))


def adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if "lora" in name or "head" in name}


def test_every_stage_runs_and_a_killed_run_goes_on_to_the_same_weights(
    source: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(real_scales.SCALES, "tiny", SMALL)
    run, fit = tmp_path / "run", stage_runner.fit
    command = ["real", "--tiny", "--data", str(source), "--model", model, "-c", "logger/csv", "--precision", "32-true"]
    fits: list[list[str]] = []

    def fit_and_note(arguments: list[str], resumes: bool) -> None:
        fits.append(arguments)
        fit(arguments, resumes)

    def die_in_the_second_iteration(module: PPOModule, *args: Any) -> Any:
        if module.trainer.current_epoch == 1:
            raise Killed
        return collect(module, *args)

    collect = PPOModule.collect_experience
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(real_pipeline, "fit", fit_and_note)
        patch.setattr(PPOModule, "collect_experience", die_in_the_second_iteration)
        main([*command, "--out", str(run)])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("InstructGPT's procedure, a real model, real data, seed 0") and head.endswith("no results.")
    assert [line.split()[0] for line in lines] == STAGES[:8]
    assert main([*command, "--out", str(run)]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in lines] == STAGES
    assert [line.split()[1] == "done" for line in lines] == [True] * 8 + [False] * 3
    fit([*fits[-1], f"--run_dir={tmp_path / 'unbroken'}"], False)
    resumed, unbroken = (adapter_weights(folder) for folder in (run / "ppo", tmp_path / "unbroken"))
    assert resumed and all(torch.equal(value, unbroken[name]) for name, value in resumed.items())

    report = json.loads((run / "report.json").read_text())
    assert sorted(report["evaluation"]["models"]) == sorted(MODELS)
    assert set(report["curves"]["ppo"]) >= {"reward/proxy", "reward/gold", "reward/kl"}
    assert len(report["curves"]["ppo"]["reward/gold"]) == 2
    assert set(report["curves"]["ppo-ptx"]) >= {"pretraining/loss"}
    sources = {stage: set(found) for stage, found in report["reward_models"].items()}
    every = {"openassistant", "hh_harmless", "politeness"}
    assert sources == {"reward": every, "gold": every, "politeness": {"politeness"}}
    suites = report["evaluation"]["suites"]
    for suite, metric in (("scores", "KL"), ("text", "novels"), ("toxicity", "basic"), ("truthfulness", "qa: MC2")):
        assert set(suites[suite]["metrics"][metric]["models"]) == set(MODELS), metric
    assert all(get_cell(report, column, "PPO") for column in COLUMNS), "a column of the table names no metric"
    page = (run / "report.html").read_text()
    assert not [a for _, a in Page(page).tags if str(a.get("src") or a.get("href") or "").startswith("http")]
    assert "another language" in page and "best of 2" in page
    settings = yaml.safe_load((run / "ppo-ptx" / "config.yaml").read_text())
    assert settings["model"]["init_args"]["reward"]["init_args"]["weights"] == [1.0, 0.0]
    assert settings["data"]["init_args"]["path"] == f"{run}/data/prompts.jsonl"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere"], "--data: 'nowhere' lacks"),
        (["--model", "nowhere"], "--model: 'nowhere' is no model folder"),
        (["--tiny", "--full"], "not allowed with"),
        (["-c", "logger/none"], "logger/none"),
    ],
)
def test_what_cannot_work_is_one_line_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["real", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(real_pipeline, "find_spec", lambda name: None)
    assert main(["real", "--tiny", "--data", str(source), "--out", str(tmp_path / "run")]) == 2
    assert "'profanity_check', which is not installed: pip install 'lit-rlhf[real]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_precision_is_the_faster_one_unless_it_is_given(model: str, tmp_path: Path, monkeypatch) -> None:
    run = real_pipeline.RealRun(tmp_path, tmp_path, SMALL, model=Path(model))
    speeds = {"32-true": 100.0, "bf16-mixed": 300.0}
    monkeypatch.setattr(real_pipeline, "time_training_steps", lambda folder, has_adapters: speeds)
    state = stage_runner.StageState(resumes=False)
    assert run.choose_precision(state) == {"precision": "bf16-mixed", "tokens_per_second": speeds}
    assert state.headline == "32-true 100 tokens/s; bf16-mixed 300 tokens/s: bf16-mixed"
    run.precision = "32-true"
    assert run.choose_precision(state)["precision"] == "32-true"
    monkeypatch.undo()
    assert all(speed > 0 for speed in real_pipeline.time_training_steps(Path(model), True, repeats=1).values())


def test_an_overlay_with_a_typo_is_refused_before_the_first_stage(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typo.yaml").write_text("model: {init_args: {optimizr: torch.optim.SGD}}")
    run = real_pipeline.RealRun(tmp_path / "run", source, SMALL, overlays=[str(tmp_path / "typo.yaml")])
    with pytest.raises(UserError, match="SFTModule has no setting 'optimizr'"):
        run.run()
    assert not (tmp_path / "run" / "stages").exists()


def test_a_stage_is_repeated_when_the_content_of_an_overlay_changes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay, run_folder, kept = tmp_path / "own.yaml", tmp_path / "run", list[bool]()
    old = run_folder / "sft" / "checkpoints" / "last.ckpt"

    def fit(arguments: list[str], resumes: bool) -> None:
        kept.append(resumes or old.exists())
        old.parent.mkdir(parents=True)
        old.touch()

    monkeypatch.setattr(real_pipeline, "fit", fit)
    monkeypatch.setattr(real_pipeline, "read_last_values", lambda folder, names: {"train/loss": 1.0})
    for text in ("trainer: {max_epochs: 1}", "trainer: {max_epochs: 1}  # a remark", "trainer: {max_epochs: 2}"):
        overlay.write_text(text)
        run = real_pipeline.RealRun(run_folder, source, SMALL, overlays=[str(overlay)])
        run.write_recipes("32-true", run_folder / "recipes")
        run.fit("sft")
    assert kept == [False, False], "twice, and the second time without the checkpoint of other settings"


def test_the_data_is_known_by_its_content(
    source: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def write(folder: Path, *args: Any) -> dict[str, int]:
        written.append(folder)
        return write_real_data(folder, *args)

    def die(*args: Any) -> Any:
        raise Killed

    monkeypatch.setattr(real_pipeline, "write_real_data", write)
    monkeypatch.setattr(real_pipeline.RealRun, "choose_precision", die)
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)

    def run(data: Path) -> None:
        with pytest.raises(Killed):
            real_pipeline.RealRun(tmp_path / "run", data, SMALL, model=Path(model)).run()

    run(source)
    run(moved)
    assert written == [source], "the same rows, in another place"
    with gzip.open(moved / ENCYCLOPEDIA[0], "at") as text:
        text.write("\n\nOne more paragraph.\n")
    run(moved)
    assert written == [source, moved]


def test_two_calls_in_one_folder_are_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["real", "--tiny", "--data", str(source)], ["quickstart", "--tiny"]):
        with locked_folder(tmp_path / "run", "--out"):
            assert main([*command, "--out", str(tmp_path / "run")]) == 2
        assert "--out: another run is writing to" in capsys.readouterr().err
