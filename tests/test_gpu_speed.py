"""`make gpu-check ARGS=speed`: all its steps run, here tiny and on the CPU, with a reference for the GPU's kernel."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.generation import cached, kv_cache
from lit_rlhf.packing import packed_batch, varlen_attention
from tests.helpers.varlen_kernel import use_reference_kernel

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture
def gpu_speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, whose workers run in this process."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_speed
    import workload

    # what workers set for the process that they usually have
    for module in (cached, kv_cache):
        monkeypatch.setattr(module, "can_capture_steps", module.can_capture_steps)
    for module in (packed_batch, varlen_attention):
        monkeypatch.setattr(module, "can_use_varlen_kernel", module.can_use_varlen_kernel)
    threads = torch.get_num_threads()

    def run_here(script: list[str], folder: Path, paths: Any, python: str, timeout: float) -> dict[str, Any]:
        if not timeout:
            raise TimeoutError
        monkeypatch.setattr(sys, "argv", [script[0], str(folder), *script[1:]])
        with contextlib.redirect_stdout(io.StringIO()) as out:
            runpy.run_path(str(BENCHMARKS / script[0]), run_name="__main__")
        *text, report = out.getvalue().strip().splitlines()
        return json.loads(report) | {"text": "\n".join(text)}

    monkeypatch.setattr(workload, "run_worker", run_here)
    yield gpu_speed
    torch.set_num_threads(threads)


def test_all_steps_run_and_give_a_figure(gpu_speed, monkeypatch, tmp_path, capsys):
    use_reference_kernel(monkeypatch)
    monkeypatch.setattr(gpu_speed, "TRL", tmp_path)
    monkeypatch.setattr(gpu_speed, "VLLM", tmp_path)
    steps = gpu_speed.list_steps(tmp_path)
    own = [step for step in steps if step.script.startswith(("ours", "hf", "packed", "profile"))]
    monkeypatch.setattr(gpu_speed, "list_steps", lambda _: own)
    assert gpu_speed.main(["--tiny", f"--out={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert (
        len(re.findall(r"^\| [14] \| (?:kernel|mask) \| \d+ \| [\d.]+ \| \S+e[+-]\d\d \| \S+e[+-]\d\d \|$", text, re.M))
        == 4
    )
    assert re.search(r"^\| the update \| [\d.]+ \| \d+% ", text, re.M)
    numbers = dict(re.findall(r"^\| ([^|]+) \| ([\d.,e+-]+) (?:s|tokens/s) \|$", text, re.M))
    assert list(numbers) == [step.name for step in own[1:-1]] and "| packed attention | above |" in text
    assert (tmp_path / "trace.json").stat().st_size


def test_a_kernel_that_is_off_fails_and_time_that_is_up_is_said(gpu_speed, monkeypatch, tmp_path, capsys):
    use_reference_kernel(monkeypatch, scale=1.1)
    (packed, *_), name = gpu_speed.list_steps(tmp_path), "rollout, eager"
    with pytest.raises(AssertionError, match="the kernel is off by"):
        monkeypatch.setattr(gpu_speed, "list_steps", lambda _: [packed, packed])
        gpu_speed.main(["--tiny"])
    monkeypatch.setattr(gpu_speed, "list_steps", lambda _: [packed._replace(name=name), packed])
    assert gpu_speed.main(["--tiny", "--limit=0"]) == 0
    assert f"| {name} | no time left |" in capsys.readouterr().out
