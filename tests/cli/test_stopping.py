"""A signal stops a run with a checkpoint at the next optimizer step, and the run can be resumed from it."""

import os
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.broken_runs import assert_same_run, fit, fit_in_a_process, write_project
from tests.helpers.ranks import on_ranks

LAST = "--ckpt_path=last"


@pytest.fixture
def project(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "user_code", raising=False)
    write_project(tmp_path, llama, max_epochs=3)
    return tmp_path


def step_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["global_step"]


def test_a_signal_stops_at_the_next_step_and_last_resumes(project: Path) -> None:
    assert fit("complete") == 0
    stopped = project / "resumed" / "checkpoints" / "stopped.ckpt"
    # in the second rollout, whose first step is 5; at the last step of an epoch; at Ctrl-C within a minibatch
    for fault, code, step in (("TERM:generate:12", 143, 5), ("TERM:step:3", 143, 8), ("INT:batch:1", 130, 9)):
        assert fit_in_a_process("resumed", fault, LAST) == code
        assert step_of(stopped) == step
        *_, notice, line = (project / "resumed.log").read_text().splitlines()
        assert notice == f"SIG{fault[:4].strip(':')}: stopping after this optimizer step; once more to stop at once"
        path = stopped.relative_to(project)
        assert line.startswith(f"interrupted after step {step}; the last checkpoint is {path}; resume: lit-rlhf fit")
        assert line.endswith(f"--ckpt_path={path}")
    assert fit_in_a_process("resumed", "", LAST) == 0
    assert_same_run("complete", "resumed", 12)


def test_a_second_signal_ends_at_once(project: Path) -> None:
    assert fit_in_a_process("resumed", "INT:batch:3,INT:batch:4") == 130
    assert not (project / "resumed" / "checkpoints" / "stopped.ckpt").exists()
    assert [path.name for path in (project / "resumed" / "checkpoints").iterdir()] == ["step=1.ckpt"]


def test_two_ranks_stop_at_the_same_step(project: Path) -> None:
    two = ("--trainer.devices=2", "--trainer.strategy=ddp")

    def runs() -> list[int]:
        codes = [fit("complete", *two)]
        if os.environ["RANK"] == "1":  # one rank's signal is enough; the other is in another micro-batch by then
            os.environ["FAULT"] = "TERM:batch:3"
        codes.append(fit("resumed", *two))
        os.environ["FAULT"] = "TERM:generate:3" if os.environ["RANK"] == "0" else ""
        codes.append(fit("resumed", *two, LAST))
        os.environ["FAULT"] = ""
        codes.append(fit("resumed", *two, LAST))
        return codes

    assert on_ranks(runs, project) == [[0, 143, 143, 0], [0, 0, 0, 0]]
    assert step_of(project / "resumed" / "checkpoints" / "stopped.ckpt") == 3
    assert_same_run("complete", "resumed", 6)
