"""Killed with SIGKILL at any moment and resumed with ckpt_path=last, a run ends as the unbroken one, bit for bit."""

import random
import sys
from pathlib import Path

import pytest

from tests.helpers.broken_runs import assert_same_run, fit, fit_in_a_process, logged, write_project

PLACES = {"generate": 12, "batch": 9, "step": 5, "batch_end": 9, "write": 4, "epoch_end": 2}


@pytest.fixture
def project(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    write_project(tmp_path, llama)
    return tmp_path


def test_ten_kills_at_random_moments(project: Path) -> None:
    assert fit("whole") == 0  # here, so that what it imports need not be imported in every process
    assert len(logged("whole")) == 8
    draw = random.Random(0)
    faults = [(place, draw.randint(1, PLACES[place])) for place in [*PLACES, "generate", "write", "batch", "write"]]
    draw.shuffle(faults)
    for place, count in faults:
        assert fit_in_a_process("broken", f"KILL:{place}:{count}", "--ckpt_path=last") == -9, (place, count)
    assert fit_in_a_process("broken", "", "--ckpt_path=last") == 0
    assert_same_run("whole", "broken", 32)
    assert not list((project / "broken" / "checkpoints").glob(".*"))
