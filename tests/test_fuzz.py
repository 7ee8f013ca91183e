"""Random breakages of every command's inputs: the right result, or exit code 2 and one line; nothing else changes."""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_rlhf.cli import main
from lit_rlhf.commands.support import sweep_runs
from lit_rlhf.commands.support.sweep_runs import Run
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import load_scalar_model
from tests.helpers.fuzzing import CASES, FIT, break_one, hash_files, write_inputs

DRAWS = int(os.environ.get("LIT_RLHF_FUZZ_DRAWS", "40"))
FIRST = int(os.environ.get("LIT_RLHF_FUZZ_FIRST", "0"))
ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "gemma")  # transformers keeps the word tokenizer of these
SECONDS = 120  # a machine may be busy
LONGEST = 600  # characters of a message


@pytest.fixture(scope="module")
def sources(
    model_folders: dict[str, str], tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The folder of a reward model, and a checkpoint of the SFT recipe."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    scorer = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig())
    scorer.center(0.3, 2.0)
    export_model(scorer, tokenizer, folder / "scorer")
    write_inputs(folder / "run", model_folders["llama"], str(folder / "scorer"), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "run")
        assert main(["fit", "-c", "sft.yaml", *FIT]) == 0
    (checkpoint,) = (folder / "run" / "out").rglob("*.ckpt")
    return str(folder / "scorer"), checkpoint


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a folder of this test, sweeps in this process, and stop what runs for too long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sweep_runs, "start_process", lambda run, jobs: run_here(run))

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def run_here(run: Run) -> int:
    """Execute a run of a sweep in this process; its stderr is in its log, as in a process of its own."""
    with (run.folder / "log.txt").open("w") as log, contextlib.redirect_stderr(log):
        return main(["fit", "-c", str(run.recipe)])


@pytest.mark.parametrize("name", CASES)
def test_the_unbroken_inputs_run(name, sources, model_folders, tmp_path, monkeypatch, capfd):
    write_inputs(tmp_path / "p", model_folders["llama"], *sources)
    monkeypatch.chdir(tmp_path / "p")
    before = hash_files(Path())
    assert main(CASES[name].args) == 0, capfd.readouterr().err
    assert hash_files(Path()) == before


@pytest.mark.slow
@pytest.mark.parametrize("draw", range(FIRST, FIRST + DRAWS))
def test_a_broken_input_is_refused_in_one_line_or_right(draw, sources, model_folders, tmp_path, monkeypatch, capfd):
    names = list(CASES)
    name, architecture = names[draw % len(names)], ARCHITECTURES[draw // len(names) % len(ARCHITECTURES)]
    if "last.ckpt" in CASES[name].inputs:
        architecture = ARCHITECTURES[0]  # the checkpoint's
    write_inputs(tmp_path / "p", model_folders[architecture], *sources)
    monkeypatch.chdir(tmp_path / "p")
    args, broken = break_one(draw, Path(), name)
    told = f"draw {draw}: {name}, {architecture}, {broken.what}"
    before = hash_files(Path())
    capfd.readouterr()
    try:
        code = main(args)
    except BaseException:  # a panic of a Rust library is no Exception
        record(draw, name, architecture, broken.what, "traceback", traceback.format_exc(limit=-4))
        raise AssertionError(f"{told}: traceback") from None
    err = capfd.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    record(draw, name, architecture, broken.what, code, errors)
    assert "Traceback (most recent call last)" not in err, told
    assert code in (0, 2), told
    assert code == 2 or not broken.invalid, f"{told}: invalid, but exit code 0"
    assert len(errors) == (code == 2), f"{told}: {errors}"
    for line in errors:
        assert len(line) < LONGEST, f"{told}: {line}"
        # a sweep repeats the last words of its first run
        assert name == "sweep" or any(word in line for word in broken.names), f"{told}: {line}"
    after = hash_files(Path())  # an argument may name another output
    assert after.items() >= before.items() if broken.what.startswith("arguments") else after == before, told


def record(*values: object) -> None:
    """Append the outcome of a draw to the file that LIT_RLHF_FUZZ_LOG names."""
    if log := os.environ.get("LIT_RLHF_FUZZ_LOG"):
        with open(log, "a") as file:
            file.write(json.dumps(values) + "\n")
