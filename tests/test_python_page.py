"""docs/python.md and docs/tutorial.ipynb: their code runs in order, in one namespace, as a reader would run it."""

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.pages import ROOT, blocks

PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "tutorial.ipynb"


def run(parts: list[str], name: str) -> dict[str, Any]:
    """Run pieces of code in one namespace, and return it."""
    namespace: dict[str, Any] = {"__name__": name}
    for number, text in enumerate(parts):
        exec(compile(text, f"{name}[{number}]", "exec"), namespace)
    return namespace


def test_the_page_runs(tmp_path: Path, llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained("base")
    AutoTokenizer.from_pretrained(llama).save_pretrained("base")
    namespace = run(blocks(PAGE, "python"), "python_page")
    exported = AutoModelForCausalLM.from_pretrained("exported").state_dict()
    assert all((weight == namespace["ppo"].policy.state_dict()[name]).all() for name, weight in exported.items())
    assert [row["prompt"] for batch in namespace["answers"] for row in batch] == ["w1 w2", "w3"]
    assert len(namespace["scores"][0]) == 1 and "test/accuracy" in namespace["losses"][0]
    assert namespace["loaded"].ppo.rollout_batch_size == 64


def test_a_stage_takes_ten_lines() -> None:
    for text in blocks(PAGE, "python")[:3]:
        statements = re.split(r"^def .*\n    .*\n", text, flags=re.MULTILINE)
        lines = [line for part in statements for line in part.splitlines() if line and "import" not in line]
        assert len(lines) <= 10


@pytest.mark.slow
def test_the_notebook_runs_and_ppo_improves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = json.loads(NOTEBOOK.read_text())
    code = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code")
    with matplotlib.rc_context({"backend": "agg"}):
        namespace = run(code, "tutorial")
    means = {name: sum(values) / len(values) for name, values in namespace["judged"].items()}
    assert means["PPO"] > means["SFT"] + 0.05, means
    assert namespace["accuracy"] > 0.5
    assert len(namespace["axes"][0].lines[0].get_ydata()) == 12
    assert isinstance(namespace["ppo"], L.LightningModule)
