"""A run that is killed with SIGKILL and resumed with ckpt_path=last equals an uninterrupted one, bit for bit."""

import random
import sys
from pathlib import Path

import pytest

from tests.helpers.broken_runs import assert_same_run, fit, fit_in_a_process, logged, write_project

EVENTS = {"generate": 12, "batch": 9, "step": 5, "batch_end": 9, "write": 4, "epoch_end": 2}


@pytest.fixture
def project(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    write_project(tmp_path, llama)
    return tmp_path


def test_ten_kills_at_random_moments(project: Path) -> None:
    assert fit("complete") == 0  # in this process, so that forks need not import again
    assert len([row for row in logged("complete") if "reward/score" in row]) == 8
    draw = random.Random(0)
    faults = [(event, draw.randint(1, EVENTS[event])) for event in [*EVENTS, "generate", "write", "batch", "write"]]
    draw.shuffle(faults)
    for event, count in faults:
        assert fit_in_a_process("resumed", f"KILL:{event}:{count}", "--ckpt_path=last") == -9, (event, count)
    assert fit_in_a_process("resumed", "", "--ckpt_path=last") == 0
    assert_same_run("complete", "resumed", 32)
    assert not list((project / "resumed" / "checkpoints").glob(".*"))
