"""`lit-rlhf real --tiny` on SmolLM2-135M-Instruct and the real data: LIT_RLHF_REAL=1, or the path of a model folder."""

import json
import os
from pathlib import Path

import pytest

from lit_rlhf.cli import main

REAL = os.environ.get("LIT_RLHF_REAL", "")


@pytest.mark.skipif(not REAL, reason="it takes minutes: LIT_RLHF_REAL=1 gets the model, or names its folder")
def test_the_tiny_run_of_the_real_model(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("profanity_check", reason="the toxicity classifier of lit-rlhf[real] is not installed")
    model = ["--model", REAL] if Path(REAL, "config.json").is_file() else []
    assert main(["real", "--tiny", "--data", str(real_data), "-c", "logger/csv", "--out", str(tmp_path), *model]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    suites = report["evaluation"]["suites"]
    assert suites["text"]["metrics"]["novels"]["models"]["base"]["value"] < 4  # nats per token: it knows English
    answers = {row["prompt"]: row["answers"]["base"]["text"] for row in suites["samples"]["samples"]}
    assert len(answers) == 6 and all(answers.values())
