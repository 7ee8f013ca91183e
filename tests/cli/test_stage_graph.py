"""The graph of stages: order, cache, failures, and what is left after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_rlhf.commands.support.stage_graph import Stage, StageGraph, compute_fingerprints, select_stages
from lit_rlhf.errors import UserError

SCRIPT = """
import sys, time
from pathlib import Path
name, folder, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
with open(folder / "calls.txt", "a") as calls:
    calls.write(f"{name} starts\\n")
time.sleep(seconds)
if name.startswith("bad"):
    sys.exit("error: no such thing")
with open(folder / "calls.txt", "a") as calls:
    calls.write(f"{name} ends\\n")
"""
DRIVER = """
import sys
from pathlib import Path
from lit_rlhf.commands.support.stage_graph import Stage, StageGraph
root = Path(sys.argv[1])
stages = [Stage(name, ("step", name, str(root), sys.argv[2])) for name in ("a", "b")]
stages.append(Stage("c", ("step", "c", str(root), "0"), ("a", "b")))
StageGraph(stages, root, 2).run()
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, and a module `step` that writes what it does there."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "step.py").write_text(SCRIPT)
    path = os.pathsep.join([str(tmp_path / "modules"), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def step(root: Path, name: str, *inputs: str, settings: str = "", seconds: float = 0.0) -> Stage:
    return Stage(name, ("step", name, str(root), str(seconds)), inputs, settings=settings)


def read_calls(root: Path) -> list[str]:
    file = root / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_a_stage_runs_after_its_inputs_and_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [step(root, "a"), step(root, "b"), step(root, "c", "a", "b")]
    StageGraph(stages, root, 2).run()
    calls = read_calls(root)
    assert sorted(calls[:4]) == ["a ends", "a starts", "b ends", "b starts"] and calls[4:] == ["c starts", "c ends"]
    assert "about" in capsys.readouterr().out
    StageGraph(stages, root, 2).run()
    assert read_calls(root) == calls
    assert "3 of 3 stages are done already" in capsys.readouterr().out


def test_another_setting_runs_a_stage_and_those_behind_it_again(root: Path) -> None:
    stages = [step(root, "a"), step(root, "b"), step(root, "c", "b")]
    StageGraph(stages, root, 2).run()
    before = len(read_calls(root))
    StageGraph([stages[0], step(root, "b", settings="other"), stages[2]], root, 2).run()
    assert read_calls(root)[before:] == ["b starts", "b ends", "c starts", "c ends"]


def test_a_failure_is_one_line_and_stops_only_what_needs_it(root: Path) -> None:
    stages = [step(root, "bad"), step(root, "user", "bad"), step(root, "other")]
    with pytest.raises(UserError, match=r"stage bad failed: no such thing \(.*bad\.log\)"):
        StageGraph(stages, root, 1).run()
    calls = read_calls(root)
    assert "other ends" in calls and "user starts" not in calls


def test_a_moved_folder_is_still_done(root: Path) -> None:
    StageGraph([step(root, "a")], root, 1).run()
    moved = root.rename(root.with_name("moved"))
    assert StageGraph([step(moved, "a")], moved, 1).is_done("a")


def test_after_sigkill_the_same_command_goes_on(root: Path) -> None:
    (root.parent / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(root.parent / "driver.py"), str(root), "1.5"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(read_calls(root)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
    calls = read_calls(root)
    # a stage of the killed call ended before it was started again: never two of them at a time in one folder
    for name in ("a", "b"):
        assert [call for call in calls if call.startswith(name)] == [f"{name} starts", f"{name} ends"] * 2
    assert calls[-2:] == ["c starts", "c ends"]
    assert {path.stem for path in (root / "stages").glob("*.json")} == {"a", "b", "c"}


def test_stages_are_selected_with_what_they_need(root: Path) -> None:
    stages = [step(root, "a"), step(root, "b", "a"), step(root, "c", "a"), step(root, "d", "c")]
    assert [stage.name for stage in select_stages(stages, ["d"])] == ["a", "c", "d"]
    with pytest.raises(KeyError):
        select_stages(stages, ["e"])
    with pytest.raises(KeyError):
        compute_fingerprints([step(root, "user", "late"), step(root, "late")], root)


def test_a_record_has_fingerprint_and_seconds(root: Path) -> None:
    graph = StageGraph([step(root, "a")], root, 1)
    graph.run()
    record = json.loads((root / "stages" / "a.json").read_text())
    assert record["fingerprint"] == graph.fingerprints["a"] and record["seconds"] >= 0


def test_a_stage_that_another_call_has_done_meanwhile_is_not_repeated(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [step(root, "a"), step(root, "b", "a")]
    graph, other = StageGraph(stages, root, 1), StageGraph(stages, root, 1)
    looked: list[str] = []
    ask = graph.is_done

    def is_done(name: str) -> bool:
        looked.append(name)
        if len(looked) == 2:  # all were looked at once: now the other call does them
            answer = ask(name)
            other.run()
            return answer
        return ask(name)

    graph.is_done = is_done  # type: ignore[method-assign]
    graph.run()
    assert read_calls(root) == ["a starts", "a ends", "b starts", "b ends"]
    assert capsys.readouterr().out.count("done by another call") == 2
