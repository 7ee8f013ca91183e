"""Two nodes of one process each, in the environments of torchrun and SLURM; the launch scripts in the docs."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rlhf.commands.recipes import recipe_file, shipped_recipes
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.modules import SFTModule
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.pages import ROOT, blocks
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import assert_same_weights, demonstrations, full_weights, quiet_trainer, sgd, write_rows

PAGE = ROOT / "docs" / "hardware.md"


def set_torchrun_environment() -> None:
    """Set the environment of torchrun with --nproc-per-node=1."""
    os.environ |= {"GROUP_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def set_slurm_environment() -> None:
    """Set the environment of srun with one task per node."""
    rank = os.environ["RANK"]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"):
        del os.environ[name]
    tasks = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "lit-rlhf", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1"}
    mine = {"SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank, "SLURM_NODELIST": "127.0.0.1"}
    os.environ |= tasks | mine


def train(model: str, folder: Path, micro_batch_size: int, **settings: Any) -> list[torch.Tensor]:
    rows = write_rows(folder / "rows.jsonl", demonstrations(16))
    module, data = SFTModule(model, sgd(0.1)), DemonstrationDataModule(rows, micro_batch_size=micro_batch_size)
    trainer = quiet_trainer(folder, max_epochs=1, **settings)
    trainer.fit(module, datamodule=data)
    assert trainer.world_size == settings.get("num_nodes", 1)
    return full_weights(module)


@pytest.mark.parametrize("environment", [set_torchrun_environment, set_slurm_environment])
def test_two_nodes_equal_one_process(environment, llama, tmp_path):
    def node() -> Any:
        environment()
        ddp = train(llama, tmp_path, 4, num_nodes=2, strategy="ddp")
        return ddp, train(llama, tmp_path, 4, num_nodes=2, strategy=FSDP2Strategy())

    one = train(llama, tmp_path, 8)
    for runs in on_ranks(node, tmp_path):
        for weights in runs:
            assert_same_weights(weights, one)


def test_the_scripts_start_as_many_processes_as_their_recipe_has_devices():
    scripts = [text for text in blocks(PAGE, "sh") if "lit_rlhf fit" in text or "lit-rlhf fit" in text]
    assert len(scripts) == 2
    for script in scripts:
        (name,) = re.findall(r"fit -c (\S+)", script)
        trainer = yaml.safe_load(recipe_file(name, shipped_recipes()).read_text())["trainer"]
        (nodes,), (processes,) = (re.findall(rf"--{word}=(\d+)", script) for word in ("n?nodes", "n[-a-z]*per-node"))
        assert (trainer["num_nodes"], trainer["devices"]) == (int(nodes), int(processes))
