"""`lit-rlhf sweep`: every combination becomes a recipe and a run; results are written and plotted."""

import csv
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.commands.support import sweep_runs
from lit_rlhf.commands.support.locks import locked_folder
from lit_rlhf.commands.support.setting_paths import set_value
from lit_rlhf.commands.support.sweep_recipes import (
    make_run_name,
    make_run_names,
    parse_values,
    set_output_folder,
    set_seed,
)
from lit_rlhf.commands.support.sweep_runs import Run, is_complete, read_last_line
from lit_rlhf.errors import UserError
from tests.helpers.stages import contents

SWEEP = ("sweep", "-c", "recipe.yaml", "--out", "swept")
OVER = "--over=model.optimizer.lr=0.1,1e-3"


@pytest.fixture
def in_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Execute runs in this process; the names of those that were executed."""
    executed: list[str] = []

    def start(run: Run, jobs: int) -> int:
        executed.append(run.name)
        (run.folder / "log.txt").write_text("error: what it said last\n")
        return main(["fit", "-c", str(run.recipe)])

    monkeypatch.setattr(sweep_runs, "start_process", start)
    return executed


def results(project: Path) -> list[dict[str, Any]]:
    return json.loads((project / "swept" / "results.json").read_text())["runs"]


def test_every_value_and_seed_is_a_run_of_its_own(in_process, project: Path, command: Callable[..., Any]) -> None:
    code, out, _ = command(*SWEEP, OVER, "--seeds=0,3")
    assert code == 0
    assert in_process == [f"lr={rate},seed={seed}" for rate in (0.1, 0.001) for seed in (0, 3)]
    found = {}
    for run in results(project):
        folder = project / "swept" / "runs" / f"lr={run['values']['model.optimizer.lr']},seed={run['seed']}"
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert recipe["seed_everything"] == run["seed"]
        assert recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] == run["values"]["model.optimizer.lr"]
        with open(folder / "metrics.csv") as file:
            losses = [row["validation/loss"] for row in csv.DictReader(file) if row["validation/loss"]]
        assert run["metrics"]["validation/loss"] == float(losses[-1])
        found[run["values"]["model.optimizer.lr"], run["seed"]] = float(losses[-1])
    assert len(set(found.values())) == 4
    with open(project / "swept" / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation/loss"]) for row in rows] == list(found.values())
    line = next(line for line in out.splitlines() if line.startswith("0.1 "))
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d{3}", line)]
    seeds = [found[0.1, 0], found[0.1, 3]]
    assert numbers == pytest.approx([fmean(seeds), min(seeds), max(seeds)], abs=6e-4)
    page = (project / "swept" / "sweep.html").read_text()
    assert page.count("<svg") == 1 and "http://" not in page.replace("http://www.w3.org", "")
    assert "--seeds=0,3" in page


def test_complete_runs_are_skipped(in_process, project: Path, command: Callable[..., Any]) -> None:
    assert command(*SWEEP, OVER)[0] == 0
    before = results(project)
    in_process.clear()
    assert command(*SWEEP, "--over=model.optimizer.lr=0.1,1e-3,0.01")[0] == 0
    assert in_process == ["lr=0.01,seed=0"]
    assert results(project)[:2] == before
    in_process.clear()
    code, _, err = command(*SWEEP, OVER, "--trainer.max_steps=2")  # another recipe: another run
    assert code == 2 and "holds a complete run with another recipe" in err
    assert results(project)[:2] == before and not in_process
    assert command(*SWEEP, OVER, "--trainer.max_steps=2", "--overwrite")[0] == 0
    assert in_process == ["lr=0.1,seed=0", "lr=0.001,seed=0"]


def test_a_failed_run_is_reported_and_the_others_continue(
    in_process, project: Path, command: Callable[..., Any]
) -> None:
    (project / "swept").mkdir()
    code, out, _ = command(*SWEEP, "--over=model.fault=nan,''", "--metrics=validation/loss")
    assert code == 0 and len(in_process) == 2
    failed, fine = results(project)
    assert failed["error"] and not failed["metrics"] and fine["metrics"] and not fine["error"]
    assert "failed: fault nan, seed 0: what it said last" in out
    assert "failed: fault nan, seed 0" in (project / "swept" / "sweep.html").read_text()


def test_a_sweep_without_a_completed_run_is_an_error_with_its_table(in_process, project: Path, command) -> None:
    code, out, err = command(*SWEEP, "--over=model.fault=nan,user", "--metrics=validation/loss")
    assert code == 2 and len(in_process) == 2
    assert "error: no run of the sweep was completed; the first, fault=nan,seed=0: what it said last" in err
    assert "failed: fault nan, seed 0" in out and all(run["error"] for run in results(project))


def test_a_run_has_a_process_and_a_log_of_its_own(project: Path, command: Callable[..., Any]) -> None:
    code, out, _ = command(*SWEEP, "--over=model.fault=ours")
    assert code == 1  # a bug, not a user error
    assert [run["error"] for run in results(project)] == ["RuntimeError: a bug"]
    assert "fault=ours,seed=0: RuntimeError: a bug" in out
    log = project / "swept" / "runs" / "fault=ours,seed=0" / "log.txt"
    assert "Traceback" in log.read_text()
    log.write_text("Epoch 1\nerror: no such file\n\n")
    assert read_last_line(log) == "no such file"


def test_jobs_run_in_parallel(project: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2, timeout=20)

    def start(run: Run, jobs: int) -> int:
        together.wait()
        return 0

    monkeypatch.setattr(sweep_runs, "start_process", start)
    assert command(*SWEEP, OVER, "--seeds=0,1", "--jobs=2", "--metrics=none")[0] == 0
    assert len(results(project)) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--over=model.hiden=3"], "--over model.hiden: no setting 'hiden' (did you mean 'hidden'?)"),
        (["--over=model.hidden"], "--over model.hidden: expected KEY=V1,V2,..."),
        (["--over=model.hidden=many,3"], "run hidden=many,seed=0: model.hidden: expected int, got 'many'"),
        ([OVER, "--seeds=a"], "--seeds a: expected integers"),
        ([OVER, "--out="], "argument --out: its value is empty"),
        ([OVER, "--jobs=0"], "--jobs must be 1 or more, got 0"),
        ([OVER, "--model.hiden=3"], "no setting 'hiden'"),
        (["--seeds=1"], "--over"),
    ],
)
def test_invalid_arguments_are_refused_before_a_run(words, expected, in_process, project, command) -> None:
    code, _, err = command(*SWEEP, *words)
    assert code == 2 and expected in err and not in_process


def test_a_folder_of_other_files_is_left_alone(in_process, project: Path, command: Callable[..., Any]) -> None:
    folder = project / "swept" / "runs" / "lr=0.1,seed=0"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    code, _, err = command(*SWEEP, OVER)
    assert code == 2 and "holds files that are not of a sweep" in err
    assert (folder / "mine.txt").read_text() == "mine" and not in_process


CONFIG = {
    "model": {
        "class_path": "a.Module",
        "init_args": {"kl": {"class_path": "a.KL", "init_args": {"target": 1}}, "n": 2},
    },
    "data": {"class_path": "a.Data", "init_args": {"path": "world-{seed}/p.jsonl", "seed": 0}},
    "trainer": {
        "callbacks": [
            {"class_path": "a.Mix", "init_args": {"coefficient": 1}},
            {"class_path": "a.Twice", "init_args": {"n": 1}},
            {"class_path": "b.Twice", "init_args": {"n": 2}},
        ],
        "logger": [
            {"class_path": "a.CSVLogger", "init_args": {}},
            {"class_path": "a.W", "init_args": {"save_dir": "x"}},
        ],
    },
}


def test_a_setting_is_found_through_classes_and_lists() -> None:
    changed = set_value(CONFIG, "model.kl.target", 5)
    assert changed["model"]["init_args"]["kl"]["init_args"]["target"] == 5
    assert set_value(CONFIG, "model.init_args.kl.init_args.target", 5) == changed
    assert CONFIG["model"]["init_args"]["kl"]["init_args"]["target"] == 1
    assert set_value(CONFIG, "trainer.callbacks.Mix.coefficient", 7)["trainer"]["callbacks"][0]["init_args"] == {
        "coefficient": 7
    }
    assert set_value(CONFIG, "trainer.callbacks.2.n", 9)["trainer"]["callbacks"][2]["init_args"] == {"n": 9}
    with pytest.raises(UserError, match="2 entries are a Twice; name one by its index"):
        set_value(CONFIG, "trainer.callbacks.Twice.n", 9)
    with pytest.raises(UserError, match=r"no setting 'Mixx' \(did you mean 'Mix'\?\)"):
        set_value(CONFIG, "trainer.callbacks.Mixx.n", 9)


def test_seed_and_folder_are_set() -> None:
    recipe = set_output_folder(set_seed(CONFIG, 4), Path("swept/one"))
    assert recipe["seed_everything"] == 4
    assert recipe["data"]["init_args"] == {"path": "world-4/p.jsonl", "seed": 4}
    assert recipe["run_dir"] == "swept/one" and recipe["trainer"]["default_root_dir"] is None
    csv_logger, other = recipe["trainer"]["logger"]
    assert csv_logger["init_args"] == {"save_dir": "swept/one", "name": "", "version": ""}
    assert other == {"class_path": "a.W", "init_args": {"save_dir": "swept/one"}}


def test_values_are_read_as_yaml() -> None:
    assert parse_values("a.b=0,1e-3,true,[0.9,0.95],nan,null") == ("a.b", [0, 1e-3, True, [0.9, 0.95], "nan", None])
    assert make_run_name({"a.b": "x/y z", "c": [1, 2]}, 3) == "b=x_y_z,c=_1,_2_,seed=3"
    assert parse_values("a=1,1.0,true") == ("a", [1, 1.0, True])
    with pytest.raises(UserError, match=r"--over a: 0\.1 stands twice"):
        parse_values("a=0.1,2,0.1")


def test_values_that_make_one_name_have_folders_of_their_own() -> None:
    runs = [({"data.template": text}, seed) for text in ("Q: {prompt}?", "Q: {prompt}!", "plain") for seed in (0, 1)]
    names = make_run_names(runs)
    assert len(set(names)) == 6 and names == make_run_names(runs)
    assert names[0].startswith("template=Q___prompt__,seed=0,") and names[4] == "template=plain,seed=0"


def test_a_recipe_that_is_refused_removes_no_complete_run(
    in_process, project: Path, command: Callable[..., Any]
) -> None:
    done = project / "swept" / "runs" / "lr=0.1,seed=0"
    done.mkdir(parents=True)
    (done / "recipe.yaml").write_text("# another one\n")
    (done / "result.json").write_text('{"code": 0}')
    before = contents(project)
    code, _, err = command(*SWEEP, "--over=model.optimizer.lr=0.1,fast", "--overwrite")
    assert code == 2 and err == "error: run lr=fast,seed=0: model.optimizer.lr: expected float, got 'fast'\n"
    assert contents(project) == before and not in_process


def test_a_result_that_was_cut_off_is_of_a_run_that_is_not_complete(tmp_path: Path) -> None:
    run = Run("one", {}, 0, tmp_path, "")
    for text, complete in (
        ("", False),
        ('{"code": ', False),
        ("[]", False),
        ('{"code": 1}', False),
        ('{"code": 0}', True),
    ):
        (tmp_path / "result.json").write_text(text)
        assert is_complete(run) == complete, text


def test_a_second_sweep_in_a_folder_is_refused(in_process, project: Path, command: Callable[..., Any]) -> None:
    with locked_folder(project / "swept", "--out"):
        code, _, err = command(*SWEEP, "--over=model.hidden=2")
    assert code == 2 and "--out: another run is writing to swept" in err and not in_process
