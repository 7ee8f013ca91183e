"""Folders that plain transformers loads, from live models and from Lightning checkpoints."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from lit_rlhf.errors import UserError
from lit_rlhf.models.checkpoint_files import read_checkpoint
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora, has_adapter, merged_weights, policy_state_dict
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model

CHECKPOINT_KEY = "lit_rlhf"
AVERAGE_KEY = "average"  # of the trained weights, as `lit_rlhf.callbacks.EMA` keeps it
Weights = Literal["average", "current"]


def describe_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prefix: str,
    adapter: LoRA | None = None,
    four_bit_base: tuple[str, ModelLoadingConfig] | None = None,
) -> dict[str, Any]:
    """Return what a checkpoint must hold, beside its weights, to become a folder again. Plain values only.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer; its files travel inside the checkpoint, so that a checkpoint can be moved.
        prefix: where the model's weights stand in the state dict, such as "policy.".
        adapter: the LoRA settings in use.
        four_bit_base: the folder or hub name of a base that is not in the checkpoint, and how it was loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_text() for path in Path(folder).iterdir() if path.is_file()}
    return {
        "config": json.dumps(_settings(model), default=str),
        "tokenizer": files,
        "prefix": prefix,
        "adapter": None if adapter is None else vars(adapter),
        "four_bit_base": None if four_bit_base is None else [four_bit_base[0], vars(four_bit_base[1])],
    }


def export_model(model: PreTrainedModel | ScalarModel, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a folder for `AutoModelForCausalLM`, or `AutoModelForSequenceClassification` for a scalar model.

    Adapters are merged into a copy, and a 4-bit base is written in full; the live model stays as it is.
    """
    inner = model.model if isinstance(model, ScalarModel) else model
    inner.config.architectures = [type(inner).__name__]
    if has_adapter(inner):
        _write(_settings(inner), merged_weights(inner), directory)
    else:
        make_directory(directory)
        save_quietly(inner, directory)
    tokenizer.save_pretrained(directory)


def export_checkpoint(checkpoint: Path, directory: Path, which: Weights | None = None) -> None:
    """Turn a Lightning checkpoint of any module here, a file or a folder of shards, into a transformers folder.

    A PPO checkpoint gives its policy.

    Args:
        checkpoint: the file.
        directory: the folder.
        which: the average of the weights, or the weights as they were; by default the average where there is one.

    Raises:
        UserError: no such file, not a checkpoint of this library, no average in it, or a folder that cannot be written.
    """
    content = read_checkpoint(checkpoint)
    if CHECKPOINT_KEY not in content:
        raise UserError(f"{str(checkpoint)!r} is not a checkpoint of SFTModule, RewardModule or PPOModule")
    about = content[CHECKPOINT_KEY]
    prefix, state = about["prefix"], chosen_weights(content, which, checkpoint)
    weights = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    weights = policy_state_dict(weights)
    adapter = None if about["adapter"] is None else LoRA(**about["adapter"])
    make_directory(directory)
    for name, text in about["tokenizer"].items():
        (directory / name).write_text(text)
    settings = json.loads(about["config"])
    if about.get("four_bit_base"):
        base, loading = about["four_bit_base"]
        weights = _over_four_bits(base, ModelLoadingConfig(**loading), adapter, settings, weights, directory)
    elif adapter is not None:
        weights = _merged(settings, weights, adapter)
    _write(settings, weights, directory)


def chosen_weights(content: dict[str, Any], which: Weights | None, checkpoint: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by name, of which the trained ones are averaged if that was asked for."""
    average = content.get(AVERAGE_KEY)
    if which == "average" and average is None:
        raise UserError(f"--weights=average: {str(checkpoint)!r} holds none; train with -c averaging/ema")
    kept = average["weights"] if average is not None and which != "current" else {}
    return {name: kept.get(name, value) for name, value in content["state_dict"].items()}


def export_weights(
    model: PreTrainedModel, weights: dict[str, Tensor], adapter: LoRA | None, tokenizer: Tokenizer, directory: Path
) -> None:
    """Write a folder from a model's configuration and its whole state dict: for a model that is sharded over ranks."""
    settings, weights = _settings(model), policy_state_dict(weights)
    _write(settings, weights if adapter is None else _merged(settings, weights, adapter), directory)
    tokenizer.save_pretrained(directory)


def write_model(model: PreTrainedModel, directory: Path) -> None:
    """Write weights and configuration of a live model, without a tokenizer, as `export_model` does.

    By the parameters as they lie there, and not by the state dict: so within `gathered` a sharded model is whole.
    """
    with torch.autocast(model.device.type, enabled=False):  # adapters are folded in at their own precision
        weights = merged_weights(model)
    _write(_settings(model), weights, directory)


def save_quietly(model: PreTrainedModel, directory: Path) -> None:
    """Write weights and configuration without the progress bar, which would cut through the Trainer's."""
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        transformers_logging.enable_progress_bar()


def make_directory(directory: Path) -> None:
    """Create an output folder, or say in one line why that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(directory)!r}: {error.strerror}") from error


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    settings = {**model.config.to_dict()}
    settings.pop("quantization_config", None)  # what is written is not quantised
    # FSDP2 renames the class of what it shards
    return settings | {"architectures": [type(model).__name__.removeprefix("FSDP")]}


def _is_scalar(settings: dict[str, Any]) -> bool:
    return bool(settings["architectures"][0].endswith("ForSequenceClassification"))


def _merged(settings: dict[str, Any], weights: dict[str, Tensor], adapter: LoRA) -> dict[str, Tensor]:
    """Return the weights of a checkpoint with its adapters folded in."""
    model = _empty_model(settings, weights)
    add_lora(model, adapter)
    model.load_state_dict(weights)
    return merged_weights(model)


def _over_four_bits(
    base: str,
    loading: ModelLoadingConfig,
    adapter: LoRA | None,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    tokenizer: Path,
) -> dict[str, Tensor]:
    """Return whole weights of a checkpoint that holds the adapters alone: base loaded in 4 bits as for training."""
    assert adapter is not None, "a 4-bit base is not trained without an adapter"
    AutoConfig.for_model(**settings).save_pretrained(tokenizer)  # a tokenizer's folder is known by it
    words = load_tokenizer(str(tokenizer), loading)
    model = (
        load_scalar_model(base, words, loading).model if _is_scalar(settings) else load_causal_lm(base, words, loading)
    )
    add_lora(model, adapter)
    strange = model.load_state_dict(weights, strict=False).unexpected_keys
    if strange:
        raise UserError(f"the checkpoint's weight {strange[0]!r} is of another model than its base {base!r} now is")
    return merged_weights(model)


def _write(settings: dict[str, Any], weights: dict[str, Tensor], directory: Path) -> None:
    model = _empty_model(settings, weights)
    model.load_state_dict(weights)
    make_directory(directory)
    save_quietly(model, directory)


def _empty_model(settings: dict[str, Any], weights: dict[str, Tensor]) -> PreTrainedModel:
    config = AutoConfig.for_model(**settings)
    auto = AutoModelForSequenceClassification if _is_scalar(settings) else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    if "score.bias" in weights:  # of a head from elsewhere: transformers' own has none
        model.score.bias = torch.nn.Parameter(torch.zeros(1))
    return model
