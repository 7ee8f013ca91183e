"""Reward model metrics against loops over pairs; degenerate answers; the page."""

import json
import math
import statistics
from itertools import combinations
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.evaluation.degenerate_answers import DEGENERATE_KINDS, DegenerateAnswers
from lit_rlhf.evaluation.reports.reward_model_page import write_reward_model_report
from lit_rlhf.evaluation.reward_model_metrics import (
    ScoredRankings,
    compute_reward_model_metrics,
    degenerate_win_rates,
    summarize_metrics,
)

# (ranking, rank, score, length); few values, so that ties of every kind are common
completions = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.sampled_from([-1.5, 0.0, 0.25, 4.0]), st.integers(1, 4)),
    min_size=1,
    max_size=14,
)


def scored(rows) -> ScoredRankings:
    ranking, ranks, scores, length = zip(*rows)
    return ScoredRankings(torch.tensor(scores), torch.tensor(ranking), torch.tensor(ranks), torch.tensor(length))


def pairs(rows) -> list[dict[str, Any]]:
    """Every untied pair: margin, correct, K, length difference."""
    untied = []
    for one, other in combinations(rows, 2):
        if one[0] == other[0] and one[1] != other[1]:
            better, worse = (one, other) if one[1] < other[1] else (other, one)
            margin = better[2] - worse[2]
            correct = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
            K = sum(row[0] == one[0] for row in rows)
            untied.append({"margin": margin, "correct": correct, "K": K, "length_difference": better[3] - worse[3]})
    return untied


@given(completions)
def test_metrics_equal_loops_over_pairs(rows):
    metrics, expected = compute_reward_model_metrics(scored(rows)), pairs(rows)
    json.dumps(metrics, allow_nan=False)
    ties = sum(one[0] == other[0] and one[1] == other[1] for one, other in combinations(rows, 2))
    assert (metrics["pairs"], metrics["ties"]) == (len(expected), ties)
    assert metrics["rankings"] == len({row[0] for row in rows})
    if not expected:
        assert "accuracy" not in metrics and summarize_metrics(metrics)["accuracy"] is None
        return
    correct = [pair["correct"] for pair in expected]
    assert metrics["accuracy"]["value"] == pytest.approx(statistics.fmean(correct))
    losses = [math.log1p(math.exp(-pair["margin"])) for pair in expected]
    assert metrics["log_loss"] == pytest.approx(statistics.fmean(losses))
    confidences = [1 / (1 + math.exp(-abs(pair["margin"]))) for pair in expected]
    bins: dict[int, list[float]] = {}
    for confidence, outcome in zip(confidences, correct):
        bins.setdefault(min(int(confidence * 20), 19), []).append(outcome - confidence)
    error = sum(abs(math.fsum(gaps)) for gaps in bins.values()) / len(expected)
    assert metrics["calibration_error"] == pytest.approx(error, abs=1e-9)
    assert sum(metrics["reliability"]["count"]) == len(expected)
    for row in metrics["by_size"]:
        own = [pair["correct"] for pair in expected if pair["K"] == row["K"]]
        assert (row["pairs"], row["accuracy"]) == (len(own), pytest.approx(statistics.fmean(own)))
    for name, value in (
        ("by_margin", lambda pair: abs(pair["margin"])),
        ("by_length", lambda pair: pair["length_difference"]),
    ):
        assert sum(row["pairs"] for row in metrics[name]) == len(expected)
        for row in metrics[name]:
            own = [pair["correct"] for pair in expected if row["low"] <= value(pair) <= row["high"]]
            assert (row["pairs"], row["accuracy"]) == (len(own), pytest.approx(statistics.fmean(own)))


@given(completions)
def test_longer_preferred(rows):
    unequal = [pair for pair in pairs(rows) if pair["length_difference"]]
    longer = compute_reward_model_metrics(scored(rows)).get("longer_preferred", {"labelers": None, "model": None})
    if not unequal:
        assert longer == {"labelers": None, "model": None}
        return
    by_labelers = [float(pair["length_difference"] > 0) for pair in unequal]
    by_model = [pair["correct"] if pair["length_difference"] > 0 else 1 - pair["correct"] for pair in unequal]
    assert longer == {
        "labelers": pytest.approx(statistics.fmean(by_labelers)),
        "model": pytest.approx(statistics.fmean(by_model)),
    }


def test_win_rates_of_degenerate_answers():
    best = torch.tensor([1.0, 1.0, 1.0, 1.0])
    rows = degenerate_win_rates(
        best, {"empty": torch.tensor([2.0, 1.0, 0.0, math.nan]), "thanks": torch.full((4,), math.nan)}
    )
    assert rows == [{"kind": "empty", "prompts": 3, "outscores": pytest.approx(0.5), "gap": pytest.approx(0.0)}]


def test_degenerate_answers(tokenizer):
    degenerate_answers = DegenerateAnswers(tokenizer, "w9 w8", "w7")
    w, eos = (lambda *numbers: [number + 4 for number in numbers]), tokenizer.eos_token_id
    answers = degenerate_answers.build(w(1, 2), [*w(5, 6, 7), eos], max_tokens=20)
    assert list(answers) == list(DEGENERATE_KINDS)
    assert answers == {
        "empty": [eos],
        "repeated_token": [*w(5, 5, 5), eos],
        "repeated_sentence": [*w(5, 6, 7, 5, 6, 7, 5, 6, 7), eos],
        "thanks": [*w(9, 8), eos],
        "prompt_copied": [*w(1, 2), eos],
        "refusal": [*w(7), eos],
    }
    short = degenerate_answers.build(w(1, 2), [*w(5, 6, 7), eos], max_tokens=2)
    assert all(len(ids) <= 2 and ids[-1] == eos for ids in short.values())


@pytest.fixture
def report() -> dict[str, Any]:
    """Two hundred rankings whose scores follow the ranks and, a little, the length."""
    random, rows = Random(0), []
    for ranking in range(200):
        for rank in range(random.randint(2, 5)):
            length = random.randint(3, 40)
            rows.append((ranking, rank, -0.5 * rank + 0.02 * length + random.gauss(0, 0.7), length))
    metrics = compute_reward_model_metrics(scored(rows))
    kinds = {kind: torch.randn(20, generator=torch.Generator().manual_seed(0)) for kind in DEGENERATE_KINDS}
    history = [{"step": step, **summarize_metrics(metrics)} for step in (10, 20)]
    example = {"prompt": "<script>", "answers": [{"kind": "best", "text": "a & b", "score": 1.0}]}
    degenerate = degenerate_win_rates(torch.ones(20), kinds)
    return {"step": 20, **metrics, "degenerate": degenerate, "examples": [example], "history": history}


def test_the_page_has_every_plot_and_loads_nothing(report, tmp_path):
    page = write_reward_model_report(report, tmp_path / "new").read_text()
    assert json.loads((tmp_path / "new" / "reward_quality.json").read_text()) == report
    names = ("reliability", "by_margin", "by_size", "by_length", "length", "degenerate_answers", "training")
    assert [f'id="figure-{name}"' in page for name in names] == [True] * 7
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "a &amp; b" in page
    for name in DEGENERATE_KINDS:
        assert name.replace("_", " ") in page


def test_a_page_without_pairs_or_degenerate_answers(tmp_path):
    metrics = compute_reward_model_metrics(scored([(0, 1, 0.5, 3), (0, 1, 0.7, 4)]))
    page = write_reward_model_report({"step": 0, **metrics, "history": []}, tmp_path).read_text()
    assert "1 ties" in page and "figure-reliability" not in page and "figure-degenerate_answers" not in page
