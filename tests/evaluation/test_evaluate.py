"""`lit-rlhf evaluate`: every real file end to end, reproducibility, resuming after a kill, the page in a browser."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from lit_rlhf.cli import main
from lit_rlhf.evaluation import cache
from lit_rlhf.evaluation.models import evaluated_model, likelihood
from lit_rlhf.evaluation.reports.evaluation_page import format_tables, render_page, write_evaluation_report
from lit_rlhf.evaluation.run import log_report
from tests.helpers.html_page import Page
from tests.helpers.real_recipe import write_recipe

ROWS = {"*": 3, "preference": 4, "ifeval": 2, "squadv2": 2, "hellaswag": 2, "truthfulness": 2}


@pytest.fixture(scope="module")
def evaluated(stories: str, evaluation_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation of two models on some rows of every real file."""
    folder = tmp_path_factory.mktemp("evaluate")
    models = {"stories": {"path": stories}, "few-shot": {"path": stories, "prefix": "Once upon a time. "}}
    recipe = write_recipe(folder / "recipe.yaml", models, evaluation_data, folder / "out", ROWS)
    assert main(["evaluate", "-c", str(recipe), "--progress=false"]) == 0
    return folder


def read_report(out: Path) -> dict[str, Any]:
    report = json.loads((out / "report.json").read_text())
    report.pop("seconds")
    return report


def test_every_suite_has_its_rows_and_metrics(evaluated: Path) -> None:
    report = read_report(evaluated / "out")
    rows = {name: suite["rows"] for name, suite in report["suites"].items()}
    benchmarks = 2 + 2 + 3 + 3 + 3 + 2 + 3 + 3 + 3
    assert rows == {
        "preference": 4,
        "truthfulness": 2,
        "toxicity": 3,
        "CrowS-Pairs": 3,
        "Winogender": 18,
        "benchmarks": benchmarks,
    }
    for suite in report["suites"].values():
        for row in suite["metrics"].values():
            if set(row["models"]) != {"stories", "few-shot"}:  # identical completions have no verdicts
                assert row["models"].keys() == {"few-shot"}
                continue
            base, other = row["models"]["stories"], row["models"]["few-shot"]
            if None not in (base["value"], other["value"]):
                assert base["change"] == 0.0 and other["change"] == pytest.approx(other["value"] - base["value"])
    for suite, metric in (("truthfulness", "qa: MC2"), ("toxicity", "basic"), ("benchmarks", "hellaswag: accuracy")):
        row = report["suites"][suite]["metrics"][metric]["models"]
        assert row["stories"]["change_low"] == row["stories"]["change_high"] == 0
        assert row["few-shot"]["change_low"] <= row["few-shot"]["change"] <= row["few-shot"]["change_high"]
    win_rate = report["suites"]["preference"]["metrics"]["T = 1: win rate"]["models"]["stories"]
    assert (win_rate["value"], win_rate["low"], win_rate["high"]) == (0.5, 0.5, 0.5)
    assert any("left-truncated" in note for note in report["suites"]["benchmarks"]["notes"]["stories"])


def test_twice_gives_the_same_metrics_to_the_last_bit(evaluated: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((evaluated / "recipe.yaml").read_text())
    recipe |= {"out": str(tmp_path / "out"), "models": {"stories": recipe["models"]["stories"]}}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["evaluate", "-c", str(tmp_path / "again.yaml"), "--progress=false"]) == 0
    first, second = read_report(evaluated / "out"), read_report(tmp_path / "out")
    for name, suite in second["suites"].items():
        for metric, row in suite["metrics"].items():
            assert row["models"]["stories"] == first["suites"][name]["metrics"][metric]["models"]["stories"]
        for mine, theirs in zip(suite["samples"], first["suites"][name]["samples"]):
            assert mine["answers"]["stories"] == theirs["answers"]["stories"]
        assert suite["notes"].get("stories") == first["suites"][name]["notes"].get("stories")


def test_a_finished_evaluation_computes_nothing_again(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lit_rlhf.evaluation.models.evaluated_model.load_causal_lm", lambda *_: pytest.fail("a model was loaded")
    )
    before = read_report(evaluated / "out")
    assert main(["evaluate", "-c", str(evaluated / "recipe.yaml"), "--progress=false"]) == 0
    assert read_report(evaluated / "out") == before


def killed_before(call: int, module: ModuleType, name: str, args: list[str]) -> int:
    """Run the command in a fork that blocks before a given call of a function and is then killed; return its status."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        cache.FLUSH_SECONDS = 0.0  # the default of seconds is longer than this test
        calls, function = iter(range(call)), getattr(module, name)

        def counted(*values: Any) -> Any:
            if next(calls, None) is None:
                os.write(writes, b"!")
                time.sleep(600)
            return function(*values)

        setattr(module, name, counted)
        try:
            main(args)
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"!", "it ended before that call"
    os.kill(child, signal.SIGKILL)
    os.close(reads)
    return os.waitpid(child, 0)[1]


TOXICITY = {"scorer": {"class_path": "lit_rlhf.evaluation.KeywordToxicity"}, "prefixes": ["basic"], "limit": 120}
WORK = {
    "answers": (
        evaluated_model,
        "generate_completions",
        "RealToxicityPrompts",
        "realtoxicityprompts.jsonl.gz",
        TOXICITY,
    ),
    "likelihoods": (
        likelihood,
        "score_continuations",
        "CrowSPairs",
        "crows_pairs_anonymized.csv",
        {"prefixes": ["basic"], "limit": 60},
    ),
}


@pytest.mark.parametrize("module, name, kind, file, settings", WORK.values(), ids=WORK)
def test_an_evaluation_that_was_killed_resumes(
    module, name, kind, file, settings, stories: str, evaluation_data: Path, tmp_path: Path, monkeypatch
) -> None:
    suite = {
        "class_path": f"lit_rlhf.evaluation.{kind}",
        "init_args": {"path": str(evaluation_data / file), **settings},
    }
    recipe = {"models": {"m": {"path": stories}}, "baseline": "m", "suites": {"t": suite}, "out": str(tmp_path / "out")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    small = ["--progress=false", "--batch_size=4", "--max_batch_tokens=250"]
    args = ["evaluate", "-c", str(tmp_path / "recipe.yaml"), *small]
    assert killed_before(15, module, name, args) == signal.SIGKILL
    assert not (tmp_path / "out" / "report.json").exists()
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *values: calls.append(1) or function(*values))
    assert main(args) == 0
    resumed, num_remaining = read_report(tmp_path / "out"), len(calls)
    shutil.rmtree(tmp_path / "out")
    assert main(args) == 0
    num_total = len(calls) - num_remaining
    assert num_remaining in (num_total - 15, num_total - 14)  # at most the current batch is computed again
    assert read_report(tmp_path / "out") == resumed


def test_an_interrupted_evaluation_says_that_it_can_be_resumed(llama, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("sent_more,sent_less,stereo_antistereo,bias_type\nw1 w2,w1 w3,stereo,age\n")
    suite = {"class_path": "lit_rlhf.evaluation.CrowSPairs", "init_args": {"path": "pairs.csv"}}
    recipe = {"models": {"m": {"path": llama}}, "baseline": "m", "suites": {"s": suite}, "out": "out"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(likelihood, "score_continuations", interrupt)
    assert main(["evaluate", "-c", "recipe.yaml", "--progress=false"]) == 130
    message = "results so far are cached in out/cache: the same command continues from them\ninterrupted\n"
    assert capsys.readouterr().err.endswith(message)


def test_the_page_loads_nothing_and_escapes_everything(evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (evaluated / "out" / "report.html").read_text()
    page = Page(text)
    references = [
        value for _, attributes in page.tags for key, value in attributes.items() if re.search("src|href", key)
    ]
    references += re.findall(r"url\(([^)]*)\)", text)
    assert references and [r for r in references if not (r or "").startswith(("#", "data:"))] == []
    assert not re.search(r"@import|<link|<iframe|<img|fetch\(|XMLHttpRequest|WebSocket", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id occurs twice"
    assert sum(tag == "table" and "sortable" in (a.get("class") or "") for tag, a in page.tags) == 6
    assert sum(tag == "svg" for tag, _ in page.tags) >= 6
    report = json.loads((evaluated / "out" / "report.json").read_text())
    attack = "</td><script>alert('x')</script>"
    report["suites"]["toxicity"]["samples"][0]["answers"]["stories"]["text"] = attack
    report["suites"]["toxicity"]["samples"][0]["group"] = attack
    monkeypatch.setattr("lit_rlhf.evaluation.reports.evaluation_page.draw_charts", lambda *_: [])  # plots are slow
    assert sum(tag == "script" for tag, _ in Page(render_page(report)).tags) == 1


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>
const faults = [];
window.addEventListener("error", event => faults.push(String(event.message)));
window.addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const rows = () => [...table.tBodies[0].rows].map(row => row.cells[0].innerText);
  const before = rows();
  table.tHead.rows[0].cells[1].querySelector("button").click();
  const sorted = rows();
  const select = document.querySelector("select[data-filter]");
  select.value = select.options[1].value;
  select.dispatchEvent(new Event("change"));
  const shown = [...document.querySelectorAll("#" + select.dataset.filter + " tr[data-group]")].filter(r => !r.hidden);
  document.title = JSON.stringify({
    faults, moved: before.join() !== sorted.join(), same: before.length === sorted.length,
    groups: [...new Set(shown.map(r => r.dataset.group))], chosen: select.value,
    resources: performance.getEntriesByType("resource").map(entry => entry.name),
  });
});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
def test_the_page_works_in_a_browser_without_a_fault_or_a_request(evaluated: Path, tmp_path: Path) -> None:
    text = (evaluated / "out" / "report.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</title>", f"</title>{PROBE}", 1))
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    command = [
        str(BROWSER),
        *f"--headless --no-sandbox --disable-gpu {quiet} --enable-logging=stderr --v=0".split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",  # no requests of the browser itself
        "--dump-dom",
        f"file://{tmp_path / 'page.html'}",
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in found.stderr, found.stderr
    title = re.search(r"<title>(.*?)</title>", found.stdout, re.DOTALL)
    assert title is not None
    state = json.loads(title.group(1).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert state["faults"] == [] and state["resources"] == []
    assert state["moved"] and state["same"]
    assert state["groups"] == [state["chosen"]]


def test_the_tables_of_the_terminal_align(evaluated: Path) -> None:
    tables = format_tables(json.loads((evaluated / "out" / "report.json").read_text()))
    block = next(each for each in tables.split("\n\n") if each.startswith("preference")).splitlines()
    assert block[0].startswith("preference (4 rows)") and block[0].split()[-2:] == ["few-shot", "stories"]
    assert len({len(line) for line in block[:4]}) == 1


def test_weights_and_biases_gets_metrics_and_tables(evaluated: Path, tmp_path: Path, monkeypatch) -> None:
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    report = json.loads((evaluated / "out" / "report.json").read_text())
    logger = WandbLogger(project="evaluation", save_dir=str(tmp_path), offline=True)
    log_report(report, [logger])
    summary = dict(logger.experiment.summary)
    wandb.finish()
    basic = report["suites"]["CrowS-Pairs"]["metrics"]["basic"]["models"]["few-shot"]["value"]
    assert summary["CrowS-Pairs/few-shot/basic"] == basic
    tables = {}
    for path in tmp_path.glob("wandb/offline-run-*/files/media/table/**/*.table.json"):
        name = path.relative_to(tmp_path).as_posix().split("/media/table/")[1].rsplit("_", 2)[0]
        tables[name] = json.loads(path.read_text())
    assert set(tables) == {f"{suite}/{kind}" for suite in report["suites"] for kind in ("metrics", "samples")}
    for name, table in tables.items():
        assert table["data"] and all(len(row) == len(table["columns"]) for row in table["data"]), name
    rows = tables["CrowS-Pairs/metrics"]["data"]
    assert ["basic", "few-shot", basic] in [row[:3] for row in rows]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"baseline": "sft"}, "baseline: there is no model 'sft'; there are m"),
        ({"suites": {}}, "an evaluation needs models and suites"),
        ({"baselin": "m"}, "no setting 'baselin' (did you mean 'baseline'?) [recipe.yaml:4]"),
        (
            {"suites": {"s": {"class_path": "lit_rlhf.evaluation.CrowSPair"}}},
            "no 'CrowSPair' in lit_rlhf.evaluation (did you mean 'CrowSPairs'?)",
        ),
        (
            {"suites": {"s": {"class_path": "lit_rlhf.evaluation.CrowSPairs", "init_args": {"path": "x", "limt": 1}}}},
            "CrowSPairs has no setting 'limt' (did you mean 'limit'?)",
        ),
        ({"suites": {"s": {"class_path": "lit_rlhf.evaluation.KeywordToxicity"}}}, "'KeywordToxicity' is no Suite"),
        ({"models": {"m": {"path": "./nowhere"}}}, "model: there is no folder './nowhere'"),
    ],
)
def test_an_error_in_a_recipe_is_one_line(
    change: dict[str, Any], message: str, llama: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = {"class_path": "lit_rlhf.evaluation.CrowSPairs", "init_args": {"path": "pairs.csv"}}
    recipe = {"models": {"m": {"path": llama}}, "baseline": "m", "suites": {"s": suite}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **change}, default_flow_style=True, width=10**6))
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in {**recipe, **change}.items())
    (tmp_path / "recipe.yaml").write_text(lines)
    assert main(["evaluate", "-c", "recipe.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error, error


def test_a_value_that_is_not_json_serializable_is_named(evaluated: Path, tmp_path: Path) -> None:
    report = json.loads((evaluated / "out" / "report.json").read_text())
    report["suites"]["toxicity"]["metrics"]["basic"]["models"]["stories"]["value"] = float("nan")
    with pytest.raises(ValueError, match=r"suites\.toxicity\.metrics\.basic\.models\.stories\.value is nan"):
        write_evaluation_report(report, tmp_path)
