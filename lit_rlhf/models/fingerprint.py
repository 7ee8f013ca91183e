"""Which weights a folder or a hub name stands for, and which a live model holds: what tells them from others."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from lit_rlhf.hashing import hash_of_file, hash_of_files
from lit_rlhf.models.loading import load_config
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.lora import policy_state_dict

WEIGHT_FILE_PATTERNS = ("config.json", "*.safetensors", "*.bin")  # what decides what a model computes


def model_fingerprint(model: str, loading: ModelLoadingConfig) -> str:
    """Return what tells a model from another of the same name.

    A folder is known by the SHA-256 of its weight files and config.json, all bytes (dates and sizes say nothing on
    another machine), a checkpoint by its own. A model of the hub is known by its commit.
    """
    folder = Path(model)
    if folder.is_file():
        return f"sha256 {hash_of_file(folder)}"
    if not folder.is_dir():
        commit = getattr(load_config(model, loading), "_commit_hash", None)
        return f"commit {commit}" if commit else f"hub name {model}"
    return (
        f"sha256 {hash_of_files(sorted({path for pattern in WEIGHT_FILE_PATTERNS for path in folder.glob(pattern)}))}"
    )


def live_model_fingerprint(model: nn.Module) -> str:
    """Return what tells the weights that a live policy computes with from those before, whatever changed them.

    Sums of the bits of each tensor, as integers: a change of one bit shows, and only changes that cancel to the bit in
    every tensor would not. Adapters that ride on the model, a critic's or a reward model's, do not count.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [
        weight.detach().contiguous().view(-1).view(integers[weight.element_size()]).sum(dtype=torch.int64)
        for _, weight in sorted(policy_state_dict(dict(model.named_parameters())).items())
    ]
    return hashlib.sha256(str(torch.stack(sums).tolist()).encode()).hexdigest()[:16]
