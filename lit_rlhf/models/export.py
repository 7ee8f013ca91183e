"""Export of models and Lightning checkpoints to folders that transformers loads."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.checkpoint_files import read_checkpoint
from lit_rlhf.distributed import is_rank_zero
from lit_rlhf.errors import UserError
from lit_rlhf.models.fingerprint import LINEAGE_FILE, model_fingerprint
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora, has_adapter, iter_merged_weights, merged_state_dict, policy_state_dict
from lit_rlhf.models.peft_folder import ADAPTER_CONFIG, find_adapter, write_adapter
from lit_rlhf.models.pretrained import check_weight_values, quiet_transformers
from lit_rlhf.models.scalar_model import ScalarModel, load_scalar_model
from lit_rlhf.models.tokenizer_files import read_tokenizer_files, write_tokenizer_files
from lit_rlhf.paths import PART

CHECKPOINT_KEY = "lit_rlhf"
BASE_KEY = "base"  # in what a checkpoint holds under CHECKPOINT_KEY, see `describe_model`
AVERAGE_KEY = "average"  # of the trained weights, saved by `lit_rlhf.callbacks.EMA`
Weights = Literal["average", "current"]
Finish = Callable[[Path], None]  # is called with the complete temporary folder, before it takes its place
ExportFormat = Literal["merged", "peft"]

# files of an earlier export that are not carried over to the next
MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*config.json",
    "*token*.json",
    "*.jinja",
    "additional_chat_templates",
    "vocab.*",
    "merges.txt",
    "*.model",
    LINEAGE_FILE,
)


def describe_model(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prefix: str,
    adapter: LoRA | None = None,
    base: tuple[str, ModelLoadingConfig] | None = None,
) -> dict[str, Any]:
    """Describe a model in plain values, with which a checkpoint's weights can be exported to a folder.

    Args:
        model: The transformers model.
        tokenizer: Its tokenizer, whose files are stored in the checkpoint, so that the checkpoint is self-contained.
        prefix: Prefix of the model's weights in the state dict, such as "policy.".
        adapter: The LoRA settings in use.
        base: Folder or hub name of an adapter's base, which is not in the checkpoint, and how it was loaded.
    """
    return {
        "config": json.dumps(_config_dict(model), default=str),
        "generation_config": _generation_settings(model),
        "tokenizer": read_tokenizer_files(tokenizer),
        "prefix": prefix,
        "adapter": None if adapter is None else vars(adapter),
        BASE_KEY: None if base is None else [base[0], vars(base[1])],
    }


def export_model(
    model: PreTrainedModel | ScalarModel, tokenizer: Tokenizer, directory: Path, finish: Finish | None = None
) -> None:
    """Write a folder for `AutoModelForCausalLM`, or `AutoModelForSequenceClassification` for a scalar model.

    Adapters are merged into a copy, and a 4-bit base is dequantized; the model itself does not change.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        directory: the folder to write.
        finish: adds files to the folder.
    """
    inner = model.model if isinstance(model, ScalarModel) else model
    inner.config.architectures = [type(inner).__name__]
    with replaced_folder(directory, finish) as folder:
        if has_adapter(inner):
            _write(_config_dict(inner), _generation_settings(inner), merged_state_dict(inner), folder)
        else:
            save_quietly(inner, folder)
        tokenizer.save_pretrained(folder)


def export_checkpoint(
    checkpoint: Path,
    directory: Path,
    which: Weights | None = None,
    finish: Finish | None = None,
    format: ExportFormat = "merged",
) -> None:
    """Export a Lightning checkpoint of any module here, a file or a folder of shards, to a folder.

    Of a PPO checkpoint, the policy is exported.

    Args:
        checkpoint: The file or folder.
        directory: The folder to write.
        which: "average" or "current" weights; by default the average if there is one.
        finish: Adds files to the folder.
        format: "merged", a transformers folder of full weights, or "peft", the adapter alone.

    Raises:
        UserError: No such file, not a checkpoint of this library, no average in it, weights that are no numbers, no
            adapter to write, a base that is not the one of the training, or an unwritable folder.
    """
    content = read_checkpoint(checkpoint)
    if CHECKPOINT_KEY not in content:
        raise UserError(f"{str(checkpoint)!r} is not a checkpoint of SFTModule, RewardModule or PPOModule")
    about = content[CHECKPOINT_KEY]
    prefix, state = about["prefix"], select_weights(content, which, checkpoint)
    weights = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    weights = policy_state_dict(weights)
    check_weight_values("export", repr(str(checkpoint)), weights.items())
    adapter = None if about["adapter"] is None else LoRA(**about["adapter"])
    settings, base = json.loads(about["config"]), read_base(about)
    with replaced_folder(directory, finish) as folder:
        write_tokenizer_files(about["tokenizer"], folder)
        if format == "peft":
            if adapter is None or base is None:
                what = "full weights" if adapter is None else "an adapter, but not the name of its base"
                raise UserError(f"{str(checkpoint)!r} holds {what}; export it in the format 'merged'")
            write_adapter(folder, weights, adapter, check_plain_base(*base), _centering_constants(settings))
            return
        if base is not None and adapter is not None:
            check_base_fingerprint(about, str(checkpoint))
            weights = _merge_into_base(*base, adapter, settings, weights, folder)
        elif adapter is not None:
            weights = _merge_adapter(settings, weights, adapter)
        _write(settings, about.get("generation_config"), weights, folder)


def read_base(about: dict[str, Any]) -> tuple[str, ModelLoadingConfig] | None:
    """Return the base that a checkpoint of an adapter leaves out, and how it was loaded.

    Args:
        about: What the checkpoint holds under `CHECKPOINT_KEY`.
    """
    base = about.get(BASE_KEY)
    return None if base is None else (base[0], ModelLoadingConfig(**base[1]))


def check_base_fingerprint(about: dict[str, Any], checkpoint: str) -> None:
    """Refuse a base that is not the one that a checkpoint's adapter was trained on.

    Args:
        about: What the checkpoint holds under `CHECKPOINT_KEY`.
        checkpoint: Its path, for messages.

    Raises:
        UserError: The folder holds other weights now.
    """
    base, identity = read_base(about), about.get("fingerprints", {}).get("base")
    if base is None or identity is None:
        return
    now = model_fingerprint(*base)
    if now != identity:
        raise UserError(
            f"{checkpoint!r} is an adapter on {base[0]!r}, which is not the one of its training any more ({now[:19]} "
            f"now, {identity[:19]} then); put that one back"
        )


def check_plain_base(path: str, loading: ModelLoadingConfig) -> tuple[str, ModelLoadingConfig]:
    """Return a base, refused if it is an adapter itself: a PEFT folder names a base of full weights.

    Raises:
        UserError: It is a PEFT folder.
    """
    if find_adapter(path, loading) is not None:
        raise UserError(f"format 'peft': the base {path!r} is an adapter itself; use 'merged', or merge it first")
    return path, loading


def export_adapter(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    adapter: LoRA,
    base: tuple[str, ModelLoadingConfig],
    tokenizer: Tokenizer,
    directory: Path,
    finish: Finish | None = None,
) -> None:
    """Write a PEFT folder: adapter, score head, name of the base, and tokenizer.

    Args:
        model: The model, for its configuration alone.
        weights: Its weights by name, which may be gathered from a model sharded over ranks.
        adapter: Settings of the adapter.
        base: Folder or hub name of the base, and how it was loaded.
        tokenizer: Its tokenizer.
        directory: The folder to write.
        finish: Adds files to the folder.
    """
    with replaced_folder(directory, finish) as folder:
        write_adapter(folder, weights, adapter, check_plain_base(*base), _centering_constants(_config_dict(model)))
        tokenizer.save_pretrained(folder)


def _centering_constants(settings: dict[str, Any]) -> dict[str, float]:
    """Return the centering constants in the settings of a config.json; none of a model that is not centered."""
    return {name: settings[name] for name in ("score_shift", "score_scale") if name in settings}


def select_weights(content: dict[str, Any], which: Weights | None, checkpoint: Path) -> dict[str, Tensor]:
    """Return a checkpoint's weights by name, the trained ones averaged or current."""
    average = content.get(AVERAGE_KEY)
    if which == "average" and average is None:
        raise UserError(f"--weights=average: {str(checkpoint)!r} holds none; train with -c averaging/ema")
    averaged = average["weights"] if average is not None and which != "current" else {}
    state = content["state_dict"]
    return {name: averaged[name].to(value) if name in averaged else value for name, value in state.items()}


def export_weights(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    adapter: LoRA | None,
    tokenizer: Tokenizer,
    directory: Path,
    finish: Finish | None = None,
) -> None:
    """Write a folder from a model's configuration and its full state dict, gathered from a model sharded over ranks."""
    settings, weights = _config_dict(model), policy_state_dict(weights)
    merged = weights if adapter is None else _merge_adapter(settings, weights, adapter)
    with replaced_folder(directory, finish) as folder:
        _write(settings, _generation_settings(model), merged, folder)
        tokenizer.save_pretrained(folder)


def write_untied_model(model: PreTrainedModel, directory: Path) -> None:
    """Write weights and configuration of a live model, merged as by `export_model`, without a tokenizer.

    Tied weights are written under each of their names, and the configuration says that they are untied: a vLLM server
    that reads such a folder would otherwise leave its output layer as it was, where that is a copy of the embedding.

    Of a model that is sharded over ranks, every rank must call it; rank zero gathers the weights in host memory, one at
    a time, and writes them.
    """
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if not (sharded or is_rank_zero()):
        return
    weights: dict[str, Tensor] = {}
    with torch.autocast(model.device.type, enabled=False):  # adapters are merged at their own precision
        for each in iter_merged_weights(model):
            weight = each.compute()
            if is_rank_zero():
                weights[each.name] = weight.cpu() if sharded else weight
    if not is_rank_zero():
        return
    seen: set[int] = set()
    for name, weight in weights.items():
        if weight.data_ptr() in seen:
            weights[name] = weight.clone()  # safetensors writes no tensor twice
        seen.add(weight.data_ptr())
    make_directory(directory)
    with torch.device("meta"):  # the weights are written from where they are
        empty = _empty_model(_config_dict(model) | {"tie_word_embeddings": False}, weights)
    with quiet_transformers():
        empty.save_pretrained(directory, state_dict=weights)


def save_quietly(model: PreTrainedModel, directory: Path) -> None:
    """Write weights and configuration without a progress bar, which would interrupt the Trainer's."""
    with quiet_transformers():
        model.save_pretrained(directory)


def make_directory(directory: Path) -> None:
    """Create an output folder.

    Raises:
        UserError: It cannot be created.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {str(directory)!r}: {error.strerror}") from error


@contextmanager
def replaced_folder(directory: Path, finish: Finish | None = None) -> Iterator[Path]:
    """Within the context, write to a temporary folder, which then takes the place of `directory` by a rename.

    So there is never half a model, and an earlier one stays until then. Its files that are not of a model stay after.

    Args:
        directory: the folder.
        finish: adds files to it when the model's are written.

    Raises:
        UserError: It cannot be written, or `directory` holds something else than a model.
    """
    target = directory.resolve()  # of a link, the folder that it names
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PART}")
    try:
        is_model = any((target / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
        if target.exists() and not is_model and (target.is_file() or any(target.iterdir())):
            raise UserError(f"cannot write to {str(directory)!r}: it is there and no model folder; name another")
        part.mkdir(parents=True)
        yield part
        if finish is not None:
            finish(part)
        _swap(part, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write to {str(directory)!r}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_exportable(directory: Path) -> None:
    """Refuse a folder that `replaced_folder` could not write; leaves it as it is.

    Raises:
        UserError: See `replaced_folder`.
    """
    target = directory.resolve()
    if target.is_mount():
        raise UserError(f"cannot write to {str(directory)!r}: a mount point cannot be replaced; name a folder in it")
    with suppress(_Probed), replaced_folder(directory):
        raise _Probed


class _Probed(Exception):
    """Ends `check_exportable` before the folder is replaced."""


def _swap(part: Path, target: Path) -> None:
    """Put `part` in the place of `target`, and carry over files that are not of a model."""
    if not target.exists():
        part.rename(target)
        return
    old = part.with_name(f"{part.name}.old")
    target.rename(old)
    try:
        part.rename(target)
    except OSError:
        old.rename(target)
        raise
    for path in old.iterdir():
        if not (target / path.name).exists() and not any(path.match(pattern) for pattern in MODEL_FILES):
            path.rename(target / path.name)
    shutil.rmtree(old)


def _config_dict(model: PreTrainedModel) -> dict[str, Any]:
    settings = {**model.config.to_dict()}
    settings.pop("quantization_config", None)  # what is written is not quantized
    # FSDP2 renames the class of a sharded model
    return settings | {"architectures": [type(model).__name__.removeprefix("FSDP")]}


def _generation_settings(model: PreTrainedModel) -> str | None:
    """Return the content of a model's generation_config.json, None of a model that does not generate."""
    return model.generation_config.to_json_string() if model.can_generate() else None


def _is_scalar(settings: dict[str, Any]) -> bool:
    return bool(settings["architectures"][0].endswith("ForSequenceClassification"))


def _merge_adapter(settings: dict[str, Any], weights: dict[str, Tensor], adapter: LoRA) -> dict[str, Tensor]:
    """Return a checkpoint's weights with its adapters merged."""
    model = _empty_model(settings, weights)
    add_lora(model, adapter)
    model.load_state_dict(weights)
    return merged_state_dict(model)


def _merge_into_base(
    base: str,
    loading: ModelLoadingConfig,
    adapter: LoRA,
    settings: dict[str, Any],
    weights: dict[str, Tensor],
    tokenizer: Path,
) -> dict[str, Tensor]:
    """Return the full weights of a checkpoint of adapters alone; the base is loaded as in training."""
    AutoConfig.for_model(**settings).save_pretrained(tokenizer)  # AutoTokenizer needs config.json
    loaded = load_tokenizer(str(tokenizer), loading)
    scalar = _is_scalar(settings)
    model = load_scalar_model(base, loaded, loading).model if scalar else load_causal_lm(base, loaded, loading)
    add_lora(model, adapter)
    unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    if unexpected:
        raise UserError(f"the checkpoint's weight {unexpected[0]!r} is of another model than its base {base!r} now is")
    return merged_state_dict(model)


def _write(settings: dict[str, Any], generation: str | None, weights: dict[str, Tensor], folder: Path) -> None:
    """Write weights and configuration to an existing folder; `generation` is of `_generation_settings`."""
    model = _empty_model(settings, weights)
    model.load_state_dict(weights)
    if generation is not None:
        model.generation_config = GenerationConfig(**json.loads(generation))
    save_quietly(model, folder)


def _empty_model(settings: dict[str, Any], weights: dict[str, Tensor]) -> PreTrainedModel:
    config = AutoConfig.for_model(**settings)
    auto = AutoModelForSequenceClassification if _is_scalar(settings) else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    if "score.bias" in weights:  # of an imported head: the class of transformers has no bias
        model.score.bias = torch.nn.Parameter(torch.zeros(1))
    return model
