"""`lit-rlhf rank`: scores equal those of transformers; several models are aggregated; bad rows are named."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lit_rlhf.cli import main
from tests.helpers.pages import ROOT, named_blocks
from tests.helpers.small_runs import write_rows

ROWS = [
    {"prompt": "w1 w2", "completions": ["w3", "w4 w5 w6", "w7 w8"], "id": 0},
    {"prompt": "w9", "completions": ["w3 w3", "w3 w3"], "id": 1},
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, llama: str, tokenizer: Any) -> list[str]:
    """Three reward models with random heads."""
    folders = []
    for seed in range(3):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp(f"reward-{seed}")
        model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def plain_scores(folder: str, tokenizer: Any, row: dict[str, Any]) -> list[float]:
    """Scores by transformers alone, one completion at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [f"{row['prompt']} {completion} <eos>" for completion in row["completions"]]
    return [float(model(input_ids=torch.tensor([tokenizer.encode(text)])).logits) for text in texts]


def ranked(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert main(["rank", *args]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_scores_and_ranks_of_a_file(models, tokenizer, tmp_path, capsys):
    rows = ranked(capsys, "--model", models[0], write_rows(tmp_path / "rows.jsonl", ROWS))
    for row, given in zip(rows, ROWS, strict=True):
        expected = plain_scores(models[0], tokenizer, given)
        assert row["scores"] == pytest.approx(expected, abs=1e-5)
        assert {name: row[name] for name in given} == given
    order = sorted(range(3), key=lambda i: -rows[0]["scores"][i])
    assert [rows[0]["ranks"][i] for i in order] == [0, 1, 2]
    assert rows[1]["ranks"] == [0, 0]


def test_the_page_scores_alike_with_transformers_alone(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs/small/reward/model"
    shutil.copytree(models[0], folder)
    config = json.loads((folder / "config.json").read_text()) | {"score_shift": 0.5, "score_scale": 2.0}
    (folder / "config.json").write_text(json.dumps(config))
    names: dict[str, Any] = {}
    exec(named_blocks(ROOT / "docs" / "reward-model.md", "python")["plain_score.py"], names)
    row = {"prompt": names["prompt"], "completions": [names["completion"]]}
    (ranked_row,) = ranked(capsys, "--model", str(folder), write_rows(tmp_path / "rows.jsonl", [row]))
    assert ranked_row["scores"] == pytest.approx([names["score"]], abs=1e-5)


def test_an_ensemble_from_stdin_and_a_written_file(models, tokenizer, tmp_path, capsys, monkeypatch):
    args = [word for model in models for word in ("--model", model)]
    members = torch.tensor([plain_scores(model, tokenizer, ROWS[0]) for model in models])
    std = (members - members.mean(0)).square().mean(0).sqrt()
    text = json.dumps(ROWS[0]) + "\n"
    for more, expected in (
        ([], members.mean(0)),
        (["--aggregation=min"], members.min(0).values),
        (["--aggregation=mean_minus_std", "--num-std=2"], members.mean(0) - 2 * std),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert ranked(capsys, *args, *more, "--out", str(tmp_path / "out.jsonl")) == []
        row = json.loads((tmp_path / "out.jsonl").read_text())
        assert row["scores"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["std"] == pytest.approx(std.tolist(), abs=1e-5)


def test_the_table_starts_with_the_best(models, tmp_path, capsys):
    assert main(["rank", "--model", models[0], "--table", write_rows(tmp_path / "rows.jsonl", ROWS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "w1 w2" and lines[4] == "w9"
    scores = [float(line.split()[1]) for line in lines[1:4]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("", [], "stdin holds no row"),
        ('{"prompt": "w1"}\n', [], "stdin:1: no column of completions"),
        ('{"completions": ["w1"]}\n', [], "stdin:1: no column 'prompt'"),
        ('{"prompt": "w1", "completions": [1]}\n', [], "stdin:1: the completions must be texts"),
        (
            '{"prompt": "w1", "completions": ["w2", "\\ud83d"]}\n',
            [],
            "stdin:1: a text holds \\ud83d, half of a surrogate",
        ),
        ('{"prompt": "w1", "prompt": "w2", "completions": ["w2"]}\n', [], "stdin:1: the key 'prompt' is given twice"),
        ('{"prompt": NaN, "completions": ["w2"]}\n', [], "stdin:1: column 'prompt' must be text, it is NaN"),
        ('{"prompt": [], "completions": ["w2"]}\n', [], "stdin:1: the prompt is empty"),
        ("[1]\n", [], "stdin:1: a row must be a JSON object or a string"),
        ('\n{"prompt"\n', [], "stdin:2: this line does not parse as JSON"),
        (
            '{"prompt": "' + "w1 " * 130 + '", "completions": ["w1"]}\n',
            [],
            "stdin:1: prompt and completion have 132 tokens",
        ),
        ("", ["--aggregation=median"], "--aggregation must be one of mean, min, mean_minus_std"),
        ("", ["--modle=x"], "no option '--modle' (did you mean '--model'?)"),
        ("", ["no.jsonl"], "no data file 'no.jsonl'"),
    ],
)
def test_what_is_wrong_is_named(text, more, message, models, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["rank", "--model", models[0], *more]) == 2
    assert message in capsys.readouterr().err


def test_a_language_model_is_no_reward_model(llama, tmp_path, capsys):
    assert main(["rank", "--model", llama, write_rows(Path(tmp_path / "rows.jsonl"), ROWS)]) == 2
    assert "is a language model, not a reward model" in capsys.readouterr().err


def test_standard_input_in_bytes_is_read_as_a_file_is(models, capsys, monkeypatch):
    for content, message in ((b'{"prompt": "w1", "completions": ["w\xe9"]}', "stdin:1: not UTF-8 text"), (None, "")):
        content = content or b'\xef\xbb\xbf{"prompt": "w1", "completions": ["w2"]}\r\n'
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["rank", "--model", models[0]]) == (2 if message else 0)
        captured = capsys.readouterr()
        assert message in captured.err and bool(captured.out) != bool(message)


def test_a_table_with_dates_is_written_and_what_is_not_read_is_said(models, tmp_path, capsys):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    columns = {"prompt": ["w1"], "completion": ["w2"], "on": [datetime.date(2024, 1, 2)], "system": ["w3"]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert main(["rank", "--model", models[0], str(tmp_path / "rows.parquet")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["on"] == "2024-01-02"
    assert captured.err == "1 of 1 rows: column 'system' is not read by the format\n"


def test_scores_that_are_not_finite_are_refused(models, capsys, monkeypatch):
    monkeypatch.setattr("lit_rlhf.models.scoring.score_rows", lambda *_: torch.tensor([0.5, 1.0, 2.0, float("nan"), 0]))
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(row) + "\n" for row in ROWS)))
    assert main(["rank", "--model", models[0]]) == 2
    assert "1 of 5 scores of" in (err := capsys.readouterr().err) and "not finite, first in stdin:2" in err
