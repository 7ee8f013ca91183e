"""`lit-rlhf labelers`: a miniature of the paper's five groups, the tables, and refused arguments."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from lit_rlhf.cli import main
from tests.helpers.small_runs import write_rows

RECIPE = """
model:
  class_path: lit_rlhf.modules.RewardModule
  init_args:
    model: {model}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 4.0e-3}}}}
data:
  class_path: lit_rlhf.data.ComparisonDataModule
  init_args: {{path: {path}, micro_batch_size: 8}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 2, enable_progress_bar: false, enable_checkpointing: false}}
"""
GROUPS = 5


def ranking(group: int, number: int, random: Random) -> dict[str, Any]:
    """All prefer w3; each group also prefers a word of its own, and preferences are noisy."""
    completions, utility = [], []
    while len(completions) < 4:
        words = [random.choice(["w3", *(f"w{10 + g}" for g in range(GROUPS)), "w20", "w21"]) for _ in range(4)]
        if " ".join(words) not in completions:
            completions.append(" ".join(words))
            utility.append(words.count("w3") + 0.8 * words.count(f"w{10 + group}") + random.gauss(0, 0.5))
    order = sorted(range(4), key=lambda index: -utility[index])
    labeler = f"labeler-{group}{'ab'[number % 2]}"
    ranks = [order.index(index) for index in range(4)]
    prompt = f"w{number % 28} w{number // 28} w{group}"
    return {"prompt": prompt, "completions": completions, "ranks": ranks, "labeler": labeler, "team": f"team {group}"}


@pytest.fixture
def recipe(llama: str, tmp_path: Path) -> Path:
    random = Random(0)
    rows = [ranking(group, number, random) for number in range(60) for group in range(GROUPS)]
    path = write_rows(tmp_path / "rankings.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=llama, path=path))
    return tmp_path / "recipe.yaml"


def test_accuracy_is_higher_on_training_groups_than_on_held_out_ones(recipe, tmp_path, capsys):
    words = ["--group-column", "team", "--seeds", "1", "--unseen", "0.2", "--out", str(tmp_path / "out")]
    assert main(["labelers", "folds", "-c", str(recipe), *words, "--data.seed=1"]) == 0
    result = json.loads((tmp_path / "out" / "folds.json").read_text())
    summary = result["summary"]
    assert summary["training_labelers"]["mean"] > summary["heldout_labelers"]["mean"] > 0.6
    assert len(result["runs"]) == GROUPS and set(result["groups"]) == {f"team {g}" for g in range(GROUPS)}
    assert result["groups"]["team 2"] == ["labeler-2a", "labeler-2b"]
    table = capsys.readouterr().out
    assert f"{100 * summary['heldout_labelers']['mean']:.1f} ±" in table and "5 folds × 1 seeds" in table
    for run in result["runs"]:
        assert run["heldout_pairs"] == 60 * 6 and run["rankings"] + run["training_pairs"] / 6 == 240
    trained = [json.loads(line) for line in (tmp_path / "out/team 0/seed-0/training.jsonl").read_text().splitlines()]
    assert {row["team"] for row in trained} == {f"team {g}" for g in range(1, GROUPS)}


def test_labelers_are_grouped_without_a_group_column(recipe, tmp_path):
    words = ["--groups", "2", "--seeds", "2", "--unseen", "0.2", "--out", str(tmp_path / "out")]
    assert main(["labelers", "folds", "-c", str(recipe), *words, "--trainer.max_steps=2"]) == 0
    result = json.loads((tmp_path / "out" / "folds.json").read_text())
    assert [(run["group"], run["seed"]) for run in result["runs"]] == [
        (f"group-{g}", s) for g in (1, 2) for s in (0, 1)
    ]
    assert sorted(len(own) for own in result["groups"].values()) == [5, 5]
    for run in result["runs"]:  # the recipe's logger is kept: by default metrics.csv
        folder = tmp_path / "out" / run["group"] / f"seed-{run['seed']}"
        assert "train/loss" in (folder / "metrics.csv").read_text() and (folder / "config.yaml").is_file()
    before = (tmp_path / "out" / "folds.json").read_text()
    assert main(["labelers", "folds", "-c", str(recipe), *words, "--trainer.max_steps=2"]) == 2
    assert (tmp_path / "out" / "folds.json").read_text() == before
    assert main(["labelers", "folds", "-c", str(recipe), *words, "--trainer.max_steps=2", "--overwrite"]) == 0
    assert (tmp_path / "out" / "folds.json").read_text() == before
    scores = [run["heldout_labelers"] for run in result["runs"] if run["group"] == "group-1"]
    assert scores[0] != scores[1], "a seed is another head and another order"


def test_agreement_prints_a_table_and_writes_json(tmp_path, capsys):
    pytest.importorskip("krippendorff")
    rows = [
        {"prompt": f"p{n}", "completions": ["x", "y", "z"], "ranks": ranks, "labeler": name}
        for n in range(4)
        for name, ranks in (("ann", [0, 1, 2]), ("bob", [0, 2, 1]), ("cid", [0, 1, 1]))
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["labelers", "agreement", path, "--out", str(tmp_path / "agreement.json")]) == 0
    out = capsys.readouterr().out
    # ann and bob: 2 of 3; with cid, who ties the last two: 2 of 2 each
    report = json.loads((tmp_path / "agreement.json").read_text())
    assert report["all"]["comparisons"] == 4 * 7 and report["all"]["share"] == pytest.approx(6 / 7)
    assert "85.7 %" in out and "Krippendorff's alpha" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("ann", "bob", "cid"))] == [
        "ann",
        "bob",
        "cid",
    ]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["agreements"], "no action 'agreements' (did you mean 'agreement'?): it is agreement or folds"),
        (["folds", "-c", "RECIPE", "--seeds", "0"], "--seeds must be 1 or more"),
        (["folds", "-c", "RECIPE", "--unseen", "1"], "--unseen must lie between"),
        (["folds", "-c", "RECIPE", "--groups", "11"], "11 groups cannot be made of 10 labelers"),
        (["folds", "-c", "RECIPE", "--group-column", "vendor"], "names the column 'vendor'"),
        (["folds", "-c", "RECIPE", "--data.pathh=x"], "no setting 'pathh'"),
        (["folds", "-c", "quickstart/ppo"], "must train a RewardModule"),
    ],
)
def test_what_is_refused(args, words, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["labelers", *(str(recipe) if word == "RECIPE" else word for word in args)]) == 2
    assert words in capsys.readouterr().err


def test_a_wrong_overlay_is_refused_before_the_table_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "p", "completions": ["x", "y"], "ranks": [0, 1], "labeler": name} for name in ("ann", "bob")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "typo.yaml").write_text("trainer: {logger: {class_path: lightning.pytorch.loggers.WandbLoger}}")
    for overlay in ("logger/wandbb", "typo.yaml"):
        assert main(["labelers", "agreement", path, "--out", "agreement.json", "-c", overlay]) == 2
        assert "did you mean" in capsys.readouterr().err and not (tmp_path / "agreement.json").exists()
