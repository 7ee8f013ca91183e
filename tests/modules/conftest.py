"""Fixtures of the module tests."""

from typing import Any

import lightning as L
import pytest
import torch


@pytest.fixture
def make_trainer(tmp_path):
    """A factory of CPU trainers that print nothing."""

    def make(**settings: Any) -> L.Trainer:
        torch.manual_seed(settings.pop("seed", 0))
        quiet = {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "enable_checkpointing": False,
        }
        return L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **{**quiet, **settings})

    return make
