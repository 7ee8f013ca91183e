"""The page of `lit-rlhf paper`: complete, self-contained, the same bytes again, and without a fault in a browser."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.evaluation.reports.paper_report import OUTCOMES, STYLES, render_paper_page, write_paper_report
from lit_rlhf.synthetic.paper.results import build_report
from lit_rlhf.synthetic.paper.sections import LABELS, SECTIONS
from tests.helpers.browser import BROWSER, Chromium
from tests.helpers.html_page import Page
from tests.helpers.paper_values import make_values

SHOWN = ("fig1", "fig5", "reward-model", "compute")  # lines, bars, a numeric axis, other units


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    measured = {seed: {key: make_values(key, 0.01 * seed) for key in SECTIONS} for seed in (0, 1)}
    return build_report(measured, "full", {"torch": "0"})


@pytest.fixture(scope="module")
def shown(report: dict[str, Any]) -> dict[str, Any]:
    """A report of four sections: drawing all of them takes a quarter of a minute."""
    return {**report, "sections": [each for each in report["sections"] if each["key"] in SHOWN]}


@pytest.fixture(scope="module")
def page(shown: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    write_paper_report(shown, folder / "report.json", folder / "report.html")
    return folder / "report.html"


def test_every_section_is_there_once_with_its_claims_and_numbers(page: Path, shown: dict[str, Any]) -> None:
    parsed = Page(page.read_text())
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [each for each in ids if each in SECTIONS] == list(SHOWN)
    links = [a["href"] for tag, a in parsed.tags if tag == "a"]
    assert links and all((link or "")[1:] in ids for link in links)
    text = " ".join("".join(parsed.text).split())
    for section in shown["sections"]:
        assert section["title"] in text and section["paper"] in text and section["world"] in text
        for claim in section["claims"]:
            assert f"{OUTCOMES[claim['outcome']]}{claim['text']}" in text
    assert sum(tag == "svg" for tag, _ in parsed.tags) == sum(len(s["panels"]) for s in shown["sections"])
    figure = shown["sections"][0]["panels"][0]["series"][0]
    assert f"{figure['values'][0][0]:.2f}" in text and "paper 0.14" in text


def test_values_are_means_over_seeds_and_both_seeds_are_kept(report: dict[str, Any]) -> None:
    for section in report["sections"]:
        for panel in section["panels"]:
            assert len(panel["series"]) >= 2
            for series in panel["series"]:
                assert len(series["values"]) == len(panel["x"]) and len(series["paper"]) in (0, len(panel["x"]))
                assert len(series["positions"]) == (len(panel["x"]) if panel["axis"] else 0)
                for (value, low, high), seeds in zip(series["values"], series["seeds"], strict=True):
                    assert value == pytest.approx(sum(seeds) / 2) and low < value < high and len(seeds) == 2


def test_the_page_loads_nothing_and_is_the_same_again(page: Path, shown: dict[str, Any]) -> None:
    text = page.read_text()
    assert render_paper_page(copy.deepcopy(shown)) == text
    assert json.loads(page.with_suffix(".json").read_text()) == json.loads(json.dumps(shown))
    parsed = Page(text)
    references = [v for _, a in parsed.tags for k, v in a.items() if re.search("src|href", k)]
    assert [each for each in references if not (each or "").startswith(("#", "data:"))] == []
    assert not re.search(r"@import|<link|<script|<iframe", text)


def test_a_section_that_was_not_measured_is_not_listed() -> None:
    text = render_paper_page(build_report({0: {"fig1": make_values("fig1", 0)}}, "tiny", {}))
    parsed = Page(text)
    assert [a["id"] for tag, a in parsed.tags if tag == "h2"] == ["fig1", "versions"]
    assert "tiny" in "".join(parsed.text)


def test_every_kind_of_model_has_a_style_and_every_section_its_own_key() -> None:
    assert LABELS.keys() == STYLES.keys()
    assert all(key == section.key for key, section in SECTIONS.items())


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
def test_in_a_browser(page: Path, tmp_path: Path) -> None:
    browser = Chromium(tmp_path / "profile")
    try:
        for width in (400, 1280):
            tab = browser.open_tab(width)
            tab.open(page.as_uri())
            assert tab.console() == [] and tab.requests() == [page.as_uri()]
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            narrow = "[...document.querySelectorAll('.panel svg')].filter(e => e.getBoundingClientRect().width < 300)"
            assert tab.evaluate(f"{narrow}.length") == 0, "a chart is too small to be read"
            tab.screenshot(tmp_path / f"{width}.png")
        assert len(tab.call("Page.printToPDF")["data"]) > 10_000
    finally:
        browser.close()
