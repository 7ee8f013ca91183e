"""Weights from GPU to GPU by vLLM's own classes on both sides, with NCCL and CUDA replaced (`cpu_transfer.py`).

The server, its routes, its reading of weights layer by layer, the rendezvous and the packing are real. `make
peers-vllm` runs these; without vLLM they are skipped.
"""

import json
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.real_vllm import MISSING, PYTHON, run_vllm
from tests.helpers.vllm_models import write_model

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason=MISSING)

ROOT = Path(__file__).resolve().parents[2]
BOOTSTRAP = "import runpy, sys; sys.path.append({packages!r}); sys.argv[1:] = {arguments!r}; " + (
    "runpy.run_module('tests.contract.transfer_weights', run_name='__main__')"
)


def write_plugin(folder: Path) -> Path:
    """Write a folder for PYTHONPATH whose module a server loads as a plugin."""
    shutil.copy(ROOT / "tests" / "contract" / "cpu_transfer.py", folder / "cpu_transfer.py")
    info = folder / "cpu_transfer-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-transfer\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ncpu_transfer = cpu_transfer:install\n")
    return folder


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_weights_arrive(backend: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "model").mkdir()
    folder = write_model("llama", tmp_path / "model", tokenizer)
    variables = {
        "PYTHONPATH": str(write_plugin(tmp_path / "plugin")),
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "CPU_TRANSFER_MEMORY": str(tmp_path / "memory"),
    }
    options = ("--dtype", "float32", "--max-model-len", "128", "--weight-transfer-config")
    log = tmp_path / "log"
    with run_vllm(folder, log, *options, json.dumps({"backend": backend}), variables=variables) as server:
        arguments = [backend, server.url, folder]
        code = BOOTSTRAP.format(packages=sysconfig.get_paths()["purelib"], arguments=arguments)
        environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [PYTHON, "-c", code],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{done.stderr[-4000:]}\n{log.read_text()[-4000:]}"
        assert log.read_text().count("POST /update_weights") == 3
        assert log.read_text().count("POST /init_weight_transfer_engine") == 1
    found = json.loads(done.stdout.splitlines()[-1])
    for each in found:
        assert each["ids"] == each["ours"] and each["error"] < 1e-4
    assert found[0]["ids"] != found[1]["ids"] != found[2]["ids"]
