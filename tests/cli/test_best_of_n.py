"""`lit-rlhf best-of-n`: the best response by a function and by a reward model, for any batch size."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from lit_rlhf.cli import main
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from tests.helpers.small_runs import write_rows

FUNCTION = """
def words(prompts, responses, rows):
    return [row["sign"] * len(response.split()) for response, row in zip(responses, rows)]

def broken(prompts, responses, rows):
    return [float("nan") if prompt == "w2 w4" else 0.0 for prompt in prompts]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best_rewards.py").write_text(FUNCTION)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"w{i} w{2 * i}", "sign": (-1) ** i} for i in range(6)])
    return tmp_path


def best(model: str, out: str, *more: str) -> list[dict[str, Any]]:
    words = ["best-of-n", "--model", model, "--prompts", "prompts.jsonl", "--out", out, "--max-new-tokens=6", *more]
    assert main(words) == 0
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def test_the_best_of_each_prompt_is_written_with_all_scores(project, llama, capsys):
    rows = best(llama, "best.jsonl", "--reward=best_rewards.words", "--n=5")
    assert [row["prompt"] for row in rows] == [f"w{i} w{2 * i}" for i in range(6)]
    for row in rows:
        assert len(row["scores"]) == 5 and row["score"] == max(row["scores"])
        assert row["score"] == row["sign"] * len(row["completion"].split())
    curve = json.loads((project / "best.curve.json").read_text())
    assert curve["k"] == [1, 2, 3, 4, 5]
    assert curve["score"][0] == pytest.approx(fmean(fmean(row["scores"]) for row in rows))
    assert curve["score"][4] == pytest.approx(fmean(row["score"] for row in rows))
    table = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:1] in (["1"], ["2"], ["4"], ["5"])
    ]
    assert [float(line[1]) for line in table] == pytest.approx([curve["score"][k - 1] for k in (1, 2, 4, 5)], abs=1e-4)
    assert [float(line[3]) for line in table] == pytest.approx([0, 0.193, 0.636, 0.809], abs=1e-3)


def test_a_batch_changes_no_response(project, llama):
    reward = ("--reward=best_rewards.words", "--n=3")
    one = best(llama, "one.jsonl", *reward, "--batch-size=3")
    assert best(llama, "all.jsonl", *reward, "--batch-size=64") == one
    assert best(llama, "other.jsonl", *reward, "--seed=1") != one
    assert best(llama, "first.jsonl", *reward, "--limit=2") == one[:2]


def test_a_reward_model_scores_as_in_ppo(project, llama, tokenizer):
    model = load_scalar_model(llama, tokenizer, ModelLoadingConfig())
    model.center(0.3, 2.0)
    export_model(model, tokenizer, project / "reward" / "model")
    rows = best(llama, "best.jsonl", "--reward=reward/model", "--n=4", "--max-new-tokens=3", "--missing-eos-score=-9")
    model.eval()
    ended = 0
    for row in rows:
        assert row["score"] == max(row["scores"])
        if row["score"] != -9:
            ids = torch.tensor(
                [[*tokenizer.encode(f"{row['prompt']} {row['completion']}".strip()), tokenizer.eos_token_id]]
            )
            assert row["score"] == pytest.approx(float(model.score(ids, torch.ones_like(ids))), abs=1e-4)
            ended += 1
    assert ended > 0 and any(-9 in row["scores"] for row in rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--n=0"], "--n must be 1 or more, got 0"),
        (["--temperature=0"], "--temperature must be above 0"),
        (["--out=prompts.jsonl"], "--out: prompts.jsonl exists already"),
        (["--out=no/where.jsonl"], "--out: there is no folder no"),
        (["--max-new-tokens=200"], "do not fit into the model's 128 positions"),
        (["--reward=best_rewards.wrods"], "best_rewards has no 'wrods' (did you mean 'words'?)"),
        (["--reward=./no/model"], "there is no folder './no/model'"),
        (["--prompts=promts.jsonl"], "promts.jsonl"),
    ],
)
def test_an_invalid_argument_is_one_line(words, expected, project, llama, capsys):
    given = ["--model", llama, "--prompts=prompts.jsonl", "--out=best.jsonl", "--reward=best_rewards.words"]
    given.append("--max-new-tokens=6")
    assert main(["best-of-n", *given, *words]) == 2
    assert expected in capsys.readouterr().err
    assert not (project / "best.jsonl").exists()


def test_scores_that_are_not_finite_are_refused(project, llama, capsys):
    words = ["best-of-n", "--model", llama, "--prompts=prompts.jsonl", "--out=best.jsonl", "--max-new-tokens=2"]
    assert main([*words, "--reward=best_rewards.broken", "--n=2"]) == 2
    assert "2 of 12 scores are not finite, first for the prompt 'w2 w4'" in capsys.readouterr().err


def test_an_interrupt_leaves_no_file_that_refuses_the_same_command(project, llama, monkeypatch):
    def stop(*_: Any) -> Any:
        assert not (project / "best.jsonl").exists() and list(project.glob(".best.jsonl.*.part"))
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr("lit_rlhf.evaluation.models.best_of_n.sample_candidates", stop)
    words = ["best-of-n", "--model", llama, "--prompts", "prompts.jsonl", "--out", "best.jsonl", "--n=2", "--limit=1"]
    assert main([*words, "--max-new-tokens=2", "--reward=best_rewards.words"]) == 130
    assert sorted(path.name for path in project.iterdir() if path.is_file()) == ["best_rewards.py", "prompts.jsonl"]
