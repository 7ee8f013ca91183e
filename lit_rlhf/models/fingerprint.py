"""Fingerprints of model folders, hub models and live models, by their content."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.distributed import sum_over_shards
from lit_rlhf.hashing import hash_file, hash_files
from lit_rlhf.models.loading import load_config, load_stored_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.lora import policy_state_dict
from lit_rlhf.models.model_files import find_commit
from lit_rlhf.models.peft_folder import ADAPTER_CONFIG, find_adapter
from lit_rlhf.models.tokenizer_files import read_tokenizer_files
from lit_rlhf.paths import expand_path

WEIGHT_FILE_PATTERNS = (
    "config.json",
    "adapter_config.json",
    "score_config.json",
    "*.safetensors",
    "*.bin",
)  # files that decide what a model computes
MODEL_FILE_SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")  # weights, config and tokenizer
LINEAGE_FILE = "lineage.json"  # in every exported folder; says where the model comes from, not what it computes
FINGERPRINT_FORMAT = 1  # increase it when the meaning of `loaded_model_fingerprint` changes


def model_fingerprint(
    model: str | nn.Module, loading: ModelLoadingConfig, hash_file: Callable[[Path], str] = hash_file
) -> str:
    """Compute a fingerprint that distinguishes models of the same name.

    Of a folder, the SHA-256 of its weight files, config.json and adapter_config.json; of a checkpoint file, its
    SHA-256; of a hub model, its commit; of an object, a hash of its weights. Of a PEFT folder or repository also the
    fingerprint of its base.

    Args:
        model: folder, checkpoint file, hub name or object.
        loading: how the model is loaded.
        hash_file: returns the SHA-256 of a file; a caller may cache it.
    """
    if isinstance(model, nn.Module):
        return f"weights {live_model_fingerprint(model)}"
    folder = Path(model)
    if folder.is_file():
        return f"sha256 {hash_file(folder)}"
    adapter = find_adapter(model, loading)
    base = "" if adapter is None else f" on {model_fingerprint(adapter.base, adapter.base_loading, hash_file)}"
    if folder.is_dir():
        return f"sha256 {hash_files(find_weight_files(folder), hash_file)}{base}"
    if adapter is None:
        commit = load_config(model, loading)._commit_hash
    else:
        commit = find_commit(model, ADAPTER_CONFIG, loading)
    return (f"commit {commit}" if commit else f"hub name {model}") + base


def find_weight_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that decide what the model computes, by name."""
    return sorted({path for pattern in WEIGHT_FILE_PATTERNS for path in folder.glob(pattern)})


def loaded_model_fingerprint(
    model: str | nn.Module,
    loading: ModelLoadingConfig,
    hash_file: Callable[[Path], str] = hash_file,
    tokenizer: Tokenizer | str | None = None,
) -> str:
    """Return a hash of everything that decides the outputs of a loaded model: weights, config, tokenizer, loading.

    A hub model is identified by its name and revision, without network access; an object by all its weights.

    Args:
        model: folder, hub name or object.
        loading: how the model is loaded.
        hash_file: returns the SHA-256 of a file; a caller may cache it.
        tokenizer: if it is not the one of the model's folder: a tokenizer, or its folder or hub name.
    """
    parts: list[Any] = [asdict(loading)]
    if tokenizer is not None and tokenizer != model:
        parts.append(read_tokenizer_files(load_stored_tokenizer(tokenizer, loading)))
    if isinstance(model, nn.Module):
        return f"object {_digest([*parts, _describe_object(model)])}"
    folder = expand_path(model)
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix in MODEL_FILE_SUFFIXES)
        files = [file for file in files if file.name != LINEAGE_FILE]
        parts += [[file.name, hash_file(file)] for file in files]
        adapter = find_adapter(str(folder), loading)
        if adapter is not None:
            parts.append(loaded_model_fingerprint(adapter.base, adapter.base_loading, hash_file))
    return _digest(parts) if folder.is_dir() else f"{model} {_digest(parts)}"


def _digest(parts: list[Any]) -> str:
    text = json.dumps([FINGERPRINT_FORMAT, parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:24]


def _describe_object(model: nn.Module) -> list[Any]:
    """Return the classes, the configurations and the SHA-256 of the weights of an object."""
    content = hashlib.sha256()
    for name, weight in model.state_dict().items():
        content.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        content.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    inner = [each for each in model.modules() if isinstance(each, PreTrainedModel)]
    return [type(model).__name__, *(each.config.to_json_string() for each in inner[:1]), content.hexdigest()]


def live_model_fingerprint(model: nn.Module) -> str:
    """Compute the `live_weights_fingerprint` of a live policy.

    Adapters of a critic or a reward model that share the policy's base are ignored.
    """
    return live_weights_fingerprint(policy_state_dict(dict(model.named_parameters())))


def live_weights_fingerprint(named: Mapping[str, Tensor]) -> str:
    """Compute a fingerprint of live weights, cheap enough for every iteration.

    A hash of the sum of each tensor's bits as integers: it changes with any bit, unless changes cancel in every tensor.
    Of weights that are sharded over ranks, every rank must call it, and gets the fingerprint of the whole.

    Args:
        named: the weights; their order does not matter.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [named[name].detach() for name in sorted(named)]
    shards = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    bits = [shard.contiguous().view(-1).view(integers[shard.element_size()]) for shard in shards]
    sums = sum_over_shards(weights, torch.stack([each.sum(dtype=torch.int64) for each in bits]))
    return hashlib.sha256(str(sums.tolist()).encode()).hexdigest()[:16]
