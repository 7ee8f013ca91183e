"""What another library or the disk refuses is one line with a fix; an error of this package is a traceback."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rlhf import cli
from lit_rlhf.commands.support.library_errors import DISK, LIBRARIES, explain_library_error
from tests.cli.test_errors import error_lines


def refuse_by_wandb(folder: Path) -> None:
    import wandb

    wandb.Settings(project="team/rlhf")


def refuse_by_wandb_type(folder: Path) -> None:
    import wandb

    wandb.init(mode="sometimes")


def refuse_by_peft(folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=["q_proj"]))


def refuse_by_tokenizers_in_transformers(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def refuse_by_safetensors(folder: Path) -> None:
    from safetensors.torch import load_file

    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    load_file(folder / "model.safetensors")


def refuse_by_datasets(folder: Path) -> None:
    from datasets import load_dataset

    (folder / "rows.json").write_text('{"a": 1}\n{"a": "x", "b": [}\n')
    load_dataset("json", data_files=str(folder / "rows.json"))


def refuse_by_pyarrow(folder: Path) -> None:
    import pyarrow.parquet

    (folder / "rows.parquet").write_bytes(b"PAR1 and no more")
    pyarrow.parquet.read_table(folder / "rows.parquet")


def refuse_by_jinja2(folder: Path) -> None:
    import jinja2

    jinja2.Environment().from_string("{% if %}")


def refuse_by_jinja2_at_rendering(folder: Path) -> None:
    import jinja2

    jinja2.Environment(undefined=jinja2.StrictUndefined).from_string("{{ rows.nothing.here }}").render()


def refuse_by_huggingface_hub(folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("a/b/c", "config.json")


REFUSALS = {
    name.removeprefix("refuse_by_"): function for name, function in globals().items() if name.startswith("refuse_by_")
}


def run_command(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cli, "dispatch", lambda args: function())
    return cli.main([])


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_library_refuses_is_one_line_with_a_fix(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    library = next(library for library in LIBRARIES if name.startswith(library))
    what, fix = LIBRARIES[library]
    capsys.readouterr()
    assert run_command(lambda: REFUSALS[name](tmp_path), monkeypatch) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {what}: ") and f"; {fix} (" in line
    assert len(line) > len(what) + len(fix) + 30, "the library's own reason is missing"


def test_the_deepest_reason_is_given(tmp_path: Path) -> None:
    try:
        refuse_by_datasets(tmp_path)
    except Exception as problem:
        assert "JSON parse error" not in str(problem)
        assert "JSON parse error" in (explain_library_error(problem) or "")


def test_the_traceback_is_one_environment_variable_away(tmp_path: Path, monkeypatch, capsys) -> None:
    for value, expected in (("1", True), ("", False)):
        monkeypatch.setenv("LIT_RLHF_TRACEBACK", value)
        assert run_command(lambda: refuse_by_jinja2(tmp_path), monkeypatch) == 2
        assert ("Traceback" in capsys.readouterr().err) == expected


def raise_bug(problem: BaseException) -> None:
    raise problem


BUGS = [ValueError("ours"), KeyError("q"), TypeError("f() takes 1"), Exception("bare"), OSError("no number")]
BUGS += [FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), ConnectionRefusedError(111, "refused")]


@pytest.mark.parametrize("problem", BUGS, ids=repr)
def test_an_error_of_this_package_is_a_traceback(problem: BaseException, monkeypatch) -> None:
    with pytest.raises(type(problem)):
        run_command(lambda: raise_bug(problem), monkeypatch)


def test_a_bug_that_follows_a_refusal_is_a_traceback(tmp_path: Path, monkeypatch) -> None:
    def stumble() -> None:
        try:
            refuse_by_safetensors(tmp_path)
        except Exception as problem:
            raise RuntimeError("a bug of ours") from problem

    with pytest.raises(RuntimeError, match="a bug of ours"):
        run_command(stumble, monkeypatch)


def test_a_wrong_call_of_a_library_is_a_traceback(monkeypatch) -> None:
    import jinja2

    with pytest.raises(TypeError):
        run_command(lambda: jinja2.Environment(no_such_argument=1), monkeypatch)  # type: ignore[call-arg]


@pytest.mark.parametrize("number", DISK, ids=errno.errorcode.get)
def test_what_the_disk_refuses_names_the_file_and_a_fix(number: int, monkeypatch, capsys) -> None:
    assert run_command(lambda: raise_bug(OSError(number, os.strerror(number), "/runs/a")), monkeypatch) == 2
    assert f"error: /runs/a: {os.strerror(number)}; {DISK[number]} (" in capsys.readouterr().err


def test_a_path_that_is_too_long_is_one_line(project: Path, command) -> None:
    code, _, stderr = command("recipes", "cp", "quickstart/sft", "x" * 300)
    assert code == 2 and len(error_lines(stderr)) == 1 and "File name too long" in stderr
    for option in ("--data=toys.NeedsPath", "--run_dir=" + "x" * 300):
        code, _, stderr = command("fit", "-c", "recipe.yaml", option)
        assert code == 2 and len(error_lines(stderr)) == 1


def test_a_disk_that_fills_up_during_a_run_is_one_line(project: Path) -> None:
    """The limit on file sizes stands for the disk: 8 kB hold config.yaml, and not a checkpoint."""
    command = [sys.executable, "-m", "lit_rlhf", "fit", "-c", "recipe.yaml", "--trainer.enable_checkpointing=true"]
    limits = (8192, resource.RLIM_INFINITY)
    run = subprocess.run(
        [*command, "--model.hidden=9000", "--run_dir=run"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if line.startswith("error: ")] == [run.stderr.splitlines()[-1]]


def test_an_output_that_is_not_writable_is_one_line(project: Path, command) -> None:
    (project / "taken").write_text("")
    code, _, stderr = command("fit", "-c", "recipe.yaml", "--run_dir=taken/run")
    assert code == 2 and len(error_lines(stderr)) == 1 and "taken" in stderr
