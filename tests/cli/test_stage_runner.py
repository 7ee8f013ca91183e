"""Stages: what is done is not repeated, what was killed goes on, and what is left is estimated."""

import json
from pathlib import Path

import pytest

from lit_rlhf.commands.support.stage_runner import StageRunner, StageState, read_curves


class Work:
    """Counts its calls, and fails in those whose number is in `failing`."""

    def __init__(self, *failing: int) -> None:
        self.failing, self.resumed = failing, list[bool]()

    def __call__(self, state: StageState) -> int:
        self.resumed.append(state.resumes)
        if len(self.resumed) in self.failing:
            raise SystemExit(143)
        state.headline = f"call {len(self.resumed)}"
        return 10 * len(self.resumed)


def test_a_finished_stage_is_not_repeated_and_its_result_is_kept(tmp_path: Path, capsys) -> None:
    first, second = Work(), Work()
    for number in range(2):
        runner = StageRunner(tmp_path)
        assert runner.run("one", first, settings={"a": 1}) == 10
        assert runner.run("two", second) == 10
        assert list(runner.seconds) == ["one", "two"]
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[-2:] for line in lines] == [["call", "1"]] * 2
        assert all(("done" in line) == bool(number) for line in lines)
    assert (first.resumed, second.resumed) == ([False], [False])


def test_a_stage_that_was_killed_goes_on_and_its_seconds_add_up(tmp_path: Path) -> None:
    work = Work(1)
    with pytest.raises(SystemExit):
        StageRunner(tmp_path).run("one", work)
    spent = json.loads((tmp_path / "stages" / "one.json").read_text())["seconds"]
    runner = StageRunner(tmp_path)
    assert runner.run("one", work) == 20
    assert work.resumed == [False, True] and runner.seconds["one"] > spent > 0


@pytest.mark.parametrize("changed", [("one", {"a": 2}), ("two", {"b": 2})])
def test_other_settings_repeat_a_stage_and_those_behind_it(tmp_path: Path, changed: tuple[str, dict]) -> None:
    works = {"one": Work(), "two": Work()}
    for settings in ({}, dict([changed])):
        runner = StageRunner(tmp_path)
        for stage, work in works.items():
            runner.run(stage, work, settings=settings.get(stage))
    calls = {stage: work.resumed for stage, work in works.items()}
    assert calls == {"one": [False] * (2 if changed[0] == "one" else 1), "two": [False, False]}


def test_other_settings_than_those_of_the_killed_call_begin_anew(tmp_path: Path) -> None:
    work = Work(1)
    with pytest.raises(SystemExit):
        StageRunner(tmp_path).run("one", work, settings=1)
    StageRunner(tmp_path).run("one", work, settings=2)
    assert work.resumed == [False, False]


def test_starting_over_repeats_all(tmp_path: Path) -> None:
    work = Work()
    for _ in range(2):
        runner = StageRunner(tmp_path)
        runner.start_over()
        runner.run("one", work)
    assert work.resumed == [False, False]


def test_the_time_left_scales_with_the_stages_so_far(tmp_path: Path, monkeypatch, capsys) -> None:
    clock = iter([0.0, 20.0, 20.0, 50.0, 50.0, 51.0])
    monkeypatch.setattr("lit_rlhf.commands.support.stage_runner.time.perf_counter", lambda: next(clock))
    runner = StageRunner(tmp_path, {"one": 10.0, "two": 10.0, "three": 40.0})
    for stage in ("one", "two", "three"):
        runner.run(stage, lambda state: None)
    # 20 s of 10 so far: 50 left take 100; then 50 s of 20: 40 left take 100; then nothing is left
    assert [line.partition("; ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "about 1:40 left",
        "about 1:40 left",
        "",
    ]


def test_curves_of_a_run_without_a_csv_logger_are_empty(tmp_path: Path) -> None:
    assert read_curves(tmp_path, {"a": "a"}, "step") == {}
    (tmp_path / "metrics.csv").write_text("step,a,b\n1,0.5,\n2,,3\n")
    assert read_curves(tmp_path, {"a": "x", "b": "y"}, "step") == {"x": [[1.0, 0.5]], "y": [[2.0, 3.0]]}
