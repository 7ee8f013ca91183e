"""Results of a sweep: means over seeds, plots, failed runs on the page."""

from pathlib import Path

import pytest

from lit_rlhf.evaluation.reports.sweeps import (
    RunResult,
    Sweep,
    build_table_rows,
    draw_sweep,
    format_sweep,
    read_final_metrics,
    read_results,
    select_default_metrics,
    write_results,
    write_sweep_page,
)

KEY, OTHER = "model.kl.coefficient", "model.ppo.ppo_epochs"


def run_result(value: float, seed: int, score: float | None, epochs: int = 1) -> RunResult:
    metrics = {} if score is None else {"validation/score": score, "validation/kl": 2 * score}
    return RunResult({KEY: value, OTHER: epochs}, seed, 1.5, metrics, "" if metrics else "<b>diverged</b>")


@pytest.fixture
def sweep() -> Sweep:
    runs = [run_result(v, s, v + s, e) for v in (0, 0.1) for e in (1, 2) for s in (0, 1)]
    runs[-1] = run_result(0.1, 1, None, 2)
    return Sweep("β", {KEY: [0, 0.1], OTHER: [1, 2]}, runs, ["validation/score"], {"validation/score": {"SFT": 0.3}})


def test_lines_are_means_over_seeds_and_references_are_dashed(sweep):
    (figure,) = draw_sweep(sweep)
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label()[0] != "_"}
    assert lines == {"ppo_epochs 1": pytest.approx([0.5, 0.6]), "ppo_epochs 2": pytest.approx([0.5, 0.1])}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0", "0.1"]
    dashed = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [[0.3, 0.3]]
    dots = [value for line in axes.lines if line.get_marker() == "o" for value in line.get_ydata()]
    assert sorted(dots) == pytest.approx(sorted([0.0, 1.0, 0.0, 1.0, 0.1, 1.1, 0.1]))


def test_a_table_has_a_row_per_combination(sweep):
    assert build_table_rows(sweep) == [
        ["coefficient", "ppo_epochs", "runs", "validation/score"],
        ["0", "1", "2", "0.500 [0.000, 1.000]"],
        ["0", "2", "2", "0.500 [0.000, 1.000]"],
        ["0.1", "1", "2", "0.600 [0.100, 1.100]"],
        ["0.1", "2", "1", "0.100"],
    ]
    assert format_sweep(sweep).endswith("failed: coefficient 0.1, ppo_epochs 2, seed 1: <b>diverged</b>")


def test_a_page_is_self_contained_and_escaped(sweep, tmp_path: Path):
    write_sweep_page([sweep, sweep._replace(title="γ")], "Two sweeps", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2 and "http://" not in page.replace("http://www.w3.org", "")
    assert "&lt;b&gt;diverged" in page and "<b>diverged" not in page
    write_sweep_page([sweep, sweep._replace(title="γ")], "Two sweeps", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_a_metric_that_no_run_has_gives_an_empty_panel(sweep, tmp_path: Path):
    empty = sweep._replace(metrics=["none"])
    write_sweep_page([empty], "Empty", tmp_path / "page.html")
    assert build_table_rows(empty)[1][-1] == "–"


def test_results_round_trip(sweep, tmp_path: Path):
    write_results(sweep, tmp_path)
    again = read_results(tmp_path)
    assert again.runs == sweep.runs and again.over == sweep.over


def test_final_metrics_are_means_of_the_last_values(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,a,b\n0,1,1.0,\n0,2,,5.0\n1,3,2.0,\n1,4,4.0,\n")
    assert read_final_metrics(path) == {"a": 4.0, "b": 5.0}
    assert read_final_metrics(path, last=2) == {"a": 3.0, "b": 5.0}


def test_default_metrics():
    def select(*names: str) -> list[str]:
        return select_default_metrics([RunResult({}, 0, 1.0, dict.fromkeys(names, 0.0))])

    assert select("reward/kl", "reward/score", "validation/score", "x") == ["validation/score", "reward/kl"]
    assert select("train/loss", "validation/loss") == ["validation/loss"]
    assert select("mine", "another") == ["another", "mine"]
