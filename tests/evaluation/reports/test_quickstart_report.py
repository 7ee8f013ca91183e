"""The quickstart report: self-contained, escaped, complete, reproducible; the table aligned."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.evaluation.reports.quickstart_plots import frontier
from lit_rlhf.evaluation.reports.quickstart_report import MAX_SAMPLES_ON_PAGE, format_table, write_report
from tests.helpers.html_page import Page


def write(report: dict[str, Any], folder: Path) -> tuple[str, str]:
    """Write a report and return JSON and page."""
    write_report(report, folder / "new" / "report.json", folder / "new" / "report.html")
    return (folder / "new" / "report.json").read_text(), (folder / "new" / "report.html").read_text()


@pytest.fixture(scope="module")
def written(constant_report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write(constant_report, tmp_path_factory.mktemp("written"))


def test_page_is_small_and_loads_nothing(written: tuple[str, str]) -> None:
    page = written[1]
    assert len(page.encode()) < 2_000_000
    references = [
        value for _, attributes in Page(page).tags for key, value in attributes.items() if re.search("src|href", key)
    ]
    references += re.findall(r"url\(([^)]*)\)", page)
    assert len(references) > 100
    assert [r for r in references if not (r or "").startswith(("#", "data:"))] == []
    assert not re.search(r"@import|<link|<iframe|fetch\(|XMLHttpRequest|WebSocket", page)


def test_page_has_each_part_once(written: tuple[str, str]) -> None:
    page = Page(written[1])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id occurs twice"
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links and all((link or "")[1:] in ids for link in links)
    results, training = ("win_rates", "alignment_tax", "behavior", "tasks"), ("losses", "rewards", "training_metrics")
    for name in (*results, *training, "frontier", "reliability"):
        assert f"figure-{name}" in ids
    assert sum(tag == "svg" for tag, _ in page.tags) == 1 + 1 + 3 + 2 + 4 + 2 + 3 + 2 + 1
    assert all(a.get("aria-label") for tag, a in page.tags if tag == "svg")


def test_samples_cannot_write_tags(written: tuple[str, str]) -> None:
    page = Page(written[1])
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert '<script>alert("prompt")</script> & <b>bold</b>' in page.text
    assert "</td></table><script>alert('response')</script>" in page.text


def test_page_shows_every_models_metrics(written: tuple[str, str], report: dict[str, Any]) -> None:
    text = " ".join("".join(Page(written[1]).text).replace("\N{NO-BREAK SPACE}", " ").replace("−", "-").split())
    for decoding in ("models", "greedy"):
        for label, model in zip(("base", "few-shot", "SFT", "PPO", "PPO-ptx"), report[decoding].values()):
            interval = f"{model['win_rate']:.3f} {model['win_rate_low']:.3f}–{model['win_rate_high']:.3f}"
            shares = " ".join(f"{100 * model[key]:.1f} %" for key in ("success", "truthful", "toxic"))
            change = (
                ""
                if label == "SFT"
                else f" {model['pretraining_loss'] - report[decoding]['sft']['pretraining_loss']:+.3f}"
            )
            rest = f"{model['kl_to_sft']:.2f} {model['score']:+.2f} {model['response_length']:.1f}"
            row = rf"{label} {interval} {shares} {model['pretraining_loss']:.3f}{change} {rest}"
            assert row.replace(" ", "") in text.replace(" ", ""), row
    for version in report["versions"].values():
        assert version in text
    assert "4 min 55 s" in text and "peak memory 1.87 GiB" in text


def test_json_round_trips_sorted(written: tuple[str, str], report: dict[str, Any]) -> None:
    text = written[0]
    assert json.loads(text) == report
    assert text.endswith("}\n")

    def sorted_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert [key for key, _ in pairs] == sorted(key for key, _ in pairs)
        return dict(pairs)

    json.loads(text, object_pairs_hook=sorted_keys)
    assert re.search(r"^ +\[0, -?\d\.\d+\],$", text, re.MULTILINE), "a point of a curve takes one line"


def test_same_report_gives_the_same_bytes(report: dict[str, Any], tmp_path: Path) -> None:
    del report["curves"], report["tasks"], report["reward_model"]["reliability"]
    shuffled = dict(reversed(copy.deepcopy(report).items()))
    assert write(shuffled, tmp_path / "one") == write(report, tmp_path / "other")


def test_optional_parts_may_be_absent(report: dict[str, Any], tmp_path: Path) -> None:
    for part in ("curves", "best_of_n", "samples", "tasks", "greedy", "seconds_total", "peak_memory_gib"):
        del report[part]
    for name in ("score", "response_length"):
        for model in report["models"].values():
            del model[name]
    required = ("train_labelers_accuracy", "heldout_labelers_accuracy")
    report["reward_model"] = {key: report["reward_model"][key] for key in required}
    page = Page(write(report, tmp_path)[1])
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for absent in ("figure-losses", "figure-tasks", "figure-reliability", "samples", "greedy", "training"):
        assert absent not in ids
    assert {"figure-win_rates", "figure-frontier", "sampled", "reward-model"} <= ids
    assert "Greedy" not in format_table(report)
    assert "in all" not in format_table(report)


def test_best_of_n_is_drawn_with_ppo(report: dict[str, Any], tmp_path: Path) -> None:
    def dashed() -> list[tuple[list[float], list[float]]]:
        lines = frontier(report)[0].axes[0].lines
        return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines if line.get_linestyle() == "--"]

    best = report["best_of_n"]
    assert dashed() == [(best["kl"], best["score"])]
    assert "best-of-n with the SFT model" in write(report, tmp_path)[1]
    del report["best_of_n"]
    assert dashed() == []
    assert "best-of-n with the SFT model" not in write(report, tmp_path)[1]


def test_samples_beyond_the_limit_are_counted(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lit_rlhf.evaluation.reports.quickstart_report.draw_panels", lambda report: {}
    )  # plots are slow
    report["samples"] = report["samples"][2:3] * (MAX_SAMPLES_ON_PAGE + 7)
    text, page = write(report, tmp_path)
    assert len(json.loads(text)["samples"]) == MAX_SAMPLES_ON_PAGE + 7
    assert sum("data-group" in attributes for _, attributes in Page(page).tags) == MAX_SAMPLES_ON_PAGE
    assert f"The first {MAX_SAMPLES_ON_PAGE} of {MAX_SAMPLES_ON_PAGE + 7} prompts" in page


@pytest.mark.parametrize(
    "path",
    [
        "stages.ppo_ptx.seconds",
        "reward_model.heldout_labelers_accuracy",
        "models.few_shot",
        "models.ppo.kl_to_sft",
        "greedy.base.win_rate_low",
        "tasks.chat.sft",
        "seed",
        "versions",
    ],
)
def test_a_missing_required_key_is_named(report: dict[str, Any], path: str, tmp_path: Path) -> None:
    *parents, last = path.split(".")
    node = report
    for key in parents:
        node = node[key]
    del node[last]
    with pytest.raises(AssertionError, match=re.escape(path)):
        write_report(report, tmp_path / "report.json", tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_named(report: dict[str, Any], value: float, tmp_path: Path) -> None:
    report["models"]["ppo"]["toxic"] = value
    with pytest.raises(ValueError, match=rf"models\.ppo\.toxic is {value}"):
        write_report(report, tmp_path / "report.json", tmp_path / "report.html")
    report["models"]["ppo"]["toxic"] = 0.1
    report["curves"]["ppo"]["reward/kl"][3][1] = value
    with pytest.raises(ValueError, match=re.escape("curves.ppo.reward/kl[3][1]")):
        write_report(report, tmp_path / "report.json", tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_null_and_a_path_are_refused(report: dict[str, Any]) -> None:
    broken = copy.deepcopy(report)
    broken["models"]["sft"]["success"] = None
    with pytest.raises(AssertionError, match=r"models\.sft\.success, got None"):
        format_table(broken)
    report["versions"]["data"] = Path("somewhere")
    with pytest.raises(ValueError, match=r"versions\.data is a \w*Path"):
        format_table(report)


def test_an_unknown_model_is_refused(report: dict[str, Any]) -> None:
    report["models"]["dpo"] = report["models"]["ppo"]
    with pytest.raises(AssertionError, match="dpo"):
        format_table(report)


def test_a_task_name_may_contain_any_character(report: dict[str, Any], tmp_path: Path) -> None:
    del report["curves"], report["samples"], report["greedy"]
    report["tasks"] = {"a.b $x_{ <i>& --> y$": report["tasks"]["chat"]}
    Page(write(report, tmp_path)[1])


@pytest.mark.parametrize("width", [60, 80, 100])
def test_columns_that_do_not_fit_the_terminal_are_left_out(report: dict[str, Any], width: int) -> None:
    sampled, greedy, footer = format_table(report, width).split("\n\n")
    lines = [line for block in (sampled, greedy, footer) for line in block.splitlines()]
    assert max(map(len, lines)) <= width and len(sampled.splitlines()) == 8
    assert ("length" in sampled, "KL" in sampled, "success" in sampled) == (width == 100, width >= 80, True)


def test_table_columns_align(report: dict[str, Any]) -> None:
    report["models"]["base"] |= {"kl_to_sft": 123.456, "score": -12.3}
    table = format_table(report)
    assert all(len(line) <= 100 for line in table.splitlines())
    sampled, greedy, footer = table.split("\n\n")
    for block in (sampled, greedy):
        _, header, rule, *rows = block.splitlines()
        assert len({len(line) for line in (header, rule, *rows)}) == 1
        assert [row.split()[0] for row in rows] == ["base", "few-shot", "SFT", "PPO", "PPO-ptx"]
        for column in ("win rate over SFT", "success", "truthful", "toxic", "pretrain loss", "KL", "score", "length"):
            end = header.index(column) + len(column)
            assert all(row[end - 1] != " " and row[end : end + 2].strip() == "" for row in rows), column
    assert "0.563 [0.532, 0.594]   70.1 %    81.3 %   0.3 %" in sampled
    assert "72.7 % of training labelers (they agree on 75.3 %)" in " ".join(footer.split())
    assert "295 in all. Peak memory 1.87 GiB. Seed 0." in " ".join(footer.split())
