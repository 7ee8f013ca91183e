"""The results of `lit-rlhf real` in docs/real-data.md are those of docs/real-results.json."""

import json
from math import sqrt
from typing import Any

import pytest

from tests.helpers.pages import replace_between
from tests.helpers.real_results import (
    BEGIN,
    END,
    PAGE,
    README,
    README_BEGIN,
    README_END,
    RESULTS,
    keep_numbers,
    pool_cells,
    render_changes,
    render_differences,
    replace_readme_table,
    replace_results,
)

is_committed = pytest.mark.skipif(not RESULTS.is_file(), reason="no docs/real-results.json: make real-results")


@is_committed
def test_the_tables_of_the_page_are_those_of_the_committed_numbers() -> None:
    reports, text = json.loads(RESULTS.read_text()), PAGE.read_text()
    assert len(reports) == len({report["seed"] for report in reports}) >= 2
    assert replace_results(text, reports) == text
    assert replace_readme_table(README.read_text(), reports) == README.read_text()


@is_committed
def test_no_text_of_the_data_and_no_sample_is_committed() -> None:
    assert not {"samples", "prompt", "completion", "response"} & keys_of(json.loads(RESULTS.read_text()))


def test_a_mean_over_seeds_has_the_interval_of_independent_prompts() -> None:
    cells = [{"value": 0.5, "low": 0.2, "high": 0.8}, {"value": 0.7, "low": 0.3, "high": 1.1}]
    pooled = pool_cells(cells)
    assert pooled is not None
    assert pooled["value"] == pytest.approx(0.6)
    assert pooled["high"] - pooled["value"] == pytest.approx(sqrt(0.3**2 + 0.4**2) / 2)
    assert pool_cells([cells[0], None]) is None
    assert pool_cells([{"value": 1.0, "low": None, "high": None}, cells[0]]) == {
        "value": 0.75,
        "low": None,
        "high": None,
    }


def test_differences_are_those_against_sft_over_seeds() -> None:
    def report(change: float) -> dict[str, Any]:
        cell = {"value": 1.0, "low": 0.0, "high": 2.0, "change": change, "change_low": 0.1, "change_high": 0.9}
        metrics = {"gold score": {"models": {"SFT": cell, "PPO": cell}}}
        return {"evaluation": {"models": {"SFT": None, "PPO": None}, "suites": {"scores": {"metrics": metrics}}}}

    lines = render_differences([report(0.5), report(0.7)]).splitlines()
    assert len(lines) == 3  # not SFT itself
    # (0.4, 0.6) and (0.4, 0.2) below and above: the half widths of the mean are half the root of their squares' sum
    assert lines[2].startswith("| PPO | – | 0.60 [0.") and lines[2].endswith("| – | – | – | – | – |")


def test_changes_are_those_since_the_first_iteration() -> None:
    curves = {
        "reward/gold": [[0, 1.0], [1, 3.0], [2, 2.0]],
        "reward/proxy": [[0, 0.5], [1, 1.0], [2, 4.5]],
        "reward/kl": [[0, 0.0], [1, 1.5], [2, 6.0]],
        "reward/score_std": [[0, 2.0], [1, 9.0], [2, 9.0]],
    }
    table = render_changes([{"seed": 7, "curves": {"ppo": curves, "ppo-ptx": {}}}])
    assert table.splitlines()[2:] == ["| PPO | 7 | 2 of 3 | 1.50 | +2.00 | +0.50 | 6.00 | +1.00 | +4.00 | +2.00 |"]


def test_a_tiny_run_and_a_page_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="tiny"):
        keep_numbers({"scale": "tiny"})
    with pytest.raises(ValueError, match="has no <!--"):
        replace_between(BEGIN, BEGIN, END, "")
    assert BEGIN in PAGE.read_text() and END in PAGE.read_text()
    assert README_BEGIN in README.read_text() and README_END in README.read_text()


def keys_of(value: Any) -> set[str]:
    """Return all keys, of every level."""
    if isinstance(value, dict):
        return set(value) | {key for each in value.values() for key in keys_of(each)}
    return {key for each in value for key in keys_of(each)} if isinstance(value, list) else set()
