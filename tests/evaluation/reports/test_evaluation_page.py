"""Parts of the evaluation's page: win rates by use case, agreement, colors, axes."""

import re

import pytest

from lit_rlhf.evaluation.reports import evaluation_charts
from lit_rlhf.evaluation.reports.evaluation_page import (
    collect_agreement_rows,
    collect_win_rates_by_use_case,
    render_page,
    verdict_tone,
)
from tests.helpers.html_page import Page


def test_win_rates_by_use_case_and_the_agreement_of_judges_are_on_the_page() -> None:
    win_rate = {"win_rate": 0.625, "low": 0.5, "high": 0.75, "count": 8.0}
    all_ties = {"share": None, "kappa": None, "count": 0, "ties": 9, "margin": None}
    agreement = {"share": 0.75, "kappa": 0.5, "count": 4, "ties": 1, "margin": 0.125}
    tables = {
        "groups": {"T = 1, a": {"open_qa": win_rate}, "T = 1, b": {"chat": win_rate, "open_qa": win_rate}},
        "agreement": {"T = 1": {"a": {"b": agreement, "c": all_ties}, "b": {"a": agreement}, "c": {"a": all_ties}}},
        "labeler_agreement": {"T = 1": {"b": 0.5}},
    }
    part = {
        "kind": "PairwisePreference",
        "rows": 8,
        "metrics": {},
        "notes": {},
        "samples": [],
        "tables": {"PPO": tables},
    }
    assert list(collect_win_rates_by_use_case(part)) == [
        ("chat", "T = 1, b"),
        ("open_qa", "T = 1, a"),
        ("open_qa", "T = 1, b"),
    ]
    assert [(row["judges"], row["share"]) for row in collect_agreement_rows(part)] == [
        ("a, b", 0.75),
        ("labelers within b", 0.5),
    ]
    models = {name: {"path": name, "fingerprint": name} for name in ("SFT", "PPO")}
    report = {"seed": 0, "baseline": "SFT", "models": models, "suites": {"p": part}, "versions": {}}
    page = Page(render_page({**report, "seconds": {"SFT": {"p": 1.0}, "PPO": {"p": 1.0}}}))
    text = re.sub(r"\s", "", "".join(page.text))
    assert "openqaT=1,a–62.5%50.0%to75.0%openqaT=1,b–" in text
    assert "a,bPPOT=175.0%±12.5%410.500labelerswithinbPPOT=150.0%–––" in text
    del tables["groups"]["T = 1, b"]
    assert collect_win_rates_by_use_case(part) == {}  # the only use case has the overall win rate


def test_a_verdict_is_colored_by_its_meaning() -> None:
    assert [verdict_tone("judge", value) for value in (1.0, 0.5, 0.0, None, True, "good")] == [
        "good",
        "",
        "bad",
        "",
        "good",
        "",
    ]
    assert [verdict_tone("toxicity", value) for value in (1.0, 0.5, 0.49, 0.0, None)] == ["bad", "bad", "", "", ""]
    assert {verdict_tone(name, value) for name in ("entropy", "P(first)", "P(female)") for value in (0.0, 1.0)} == {""}


@pytest.mark.parametrize("values, lowest", [((0.0, 0.0), 0.0), ((0.2, 0.3), 0.0), ((-0.2, 0.3), -0.2)])
def test_an_axis_shows_no_negative_range_without_negative_scores(values: tuple[float, float], lowest: float) -> None:
    cells = [{"value": value, "low": None, "high": None} for value in values]
    metrics = {str(index): {"unit": "score", "models": {"m": cell}} for index, cell in enumerate(cells)}
    left, right = evaluation_charts.draw_chart({"metrics": metrics}, list(metrics), {"m": "#000000"}).axes[0].get_xlim()
    assert lowest - 0.05 * (right - left) < left < min(*values, 0.0)


def test_benchmarks_are_drawn_with_one_metric_per_task_and_number_of_shots(monkeypatch) -> None:
    names = [f"{label}: {metric}" for label in ("a", "a, 2-shot", "b") for metric in ("accuracy", "exact, group 1")]
    row = {"unit": "share", "models": {"m": {"value": 0.5, "low": None, "high": None}}}
    drawn: list[list[str]] = []
    monkeypatch.setattr(evaluation_charts, "draw_chart", lambda part, names, colors: drawn.append(names))
    monkeypatch.setattr(evaluation_charts, "figure_to_svg", lambda *_: "")
    for kind in ("Benchmarks", "TruthfulQA"):
        evaluation_charts.draw_charts({"kind": kind, "metrics": dict.fromkeys(names, row)}, {"m": "#000000"}, "")
    assert drawn == [["a: accuracy", "a, 2-shot: accuracy", "b: accuracy"], names]
