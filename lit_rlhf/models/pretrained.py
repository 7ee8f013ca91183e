"""Calls of transformers' `from_pretrained`; what it would initialize, drop or add silently is refused or said."""

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_MAPPING, GenerationConfig, PretrainedConfig
from transformers.utils import (
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils import logging as transformers_logging

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.model_files import find_file, looks_local
from lit_rlhf.models.peft_folder import ADAPTER_CONFIG, PeftAdapter, find_adapter
from lit_rlhf.suggestions import did_you_mean

# buffers of older checkpoints: causal masks and rotary frequencies, which transformers now computes
OLD_BUFFERS = re.compile(r"(^|\.)((attn|attention)\.(masked_)?bias|rotary_emb\.inv_freq|position_ids)$")
# what transformers raises where a JSON file of a model is valid JSON, but not what it expects
MALFORMED = (TypeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError)


def from_pretrained_quietly(load: Callable[..., Any], model: str, loading: ModelLoadingConfig, **settings: Any) -> Any:
    """Call a `from_pretrained` without output, and raise `UserError` for the ways in which it fails."""
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise UserError(f"model: folder {model!r} has no config.json; it should be one that save_pretrained wrote")
    if looks_local(model) and not folder.is_dir():
        hint = did_you_mean(folder.name, [path.name for path in folder.parent.glob("*")])
        hint = hint or "; run the stage that writes it first"
        raise UserError(f"model: there is no folder {model!r}{hint}")
    try:
        with quiet_transformers():
            return load(model, revision=loading.revision, trust_remote_code=loading.trust_remote_code, **settings)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "" if folder.is_dir() else " (neither a folder here nor a reachable hub name)"
        raise UserError(f"model: cannot load {model!r}{what}: {reason}") from error
    except Exception as error:
        if not isinstance(error, MALFORMED) and type(error) is not Exception:  # which the Rust libraries raise
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model: cannot load {model!r}: a file of it lacks a field or holds a value of another type "
            f"({type(error).__name__}: {reason}); save it again"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the context, transformers prints errors alone, and no progress bars."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()


def load_weights(
    auto: Any,
    model: str,
    config: PretrainedConfig,
    loading: ModelLoadingConfig,
    new: Iterable[str] = (),
    unused: tuple[str, ...] = (),
    **settings: Any,
) -> tuple[Any, set[str]]:
    """Call `from_pretrained` of an auto class with the dtype, attention and quantization of `loading`.

    Of a PEFT folder, the base is loaded and the adapter merged into it.

    Within `torch.device("meta")` the model is on the meta device; it is checked there as well.

    Args:
        auto: Auto class, or a model class.
        model: Folder or hub name.
        config: Of `load_config`; changed in place.
        loading: How to load.
        new: Names of weights that the files need not hold, as the caller initializes them.
        unused: Prefixes of names of weights that the files may hold and the model has no use for.
        settings: Of `from_pretrained`, before those of `loading`.

    Returns:
        The model, and the names of weights in the files that it has no use for.

    Raises:
        UserError: Weights that are missing, of another shape or type, of another model, or that are no numbers; an
            adapter beside the weights.
    """
    adapter = find_adapter(model, loading)
    if adapter is not None:
        return _load_adapted(auto, adapter, config, new, unused, **settings)
    stored = _drop_stored_quantization(config, loading)
    attention = resolve_attention(config, loading)
    generation = _read_generation_config(model, loading)
    settings = {"dtype": loading.torch_dtype, "attn_implementation": attention} | settings
    on_meta = torch.get_default_device().type == "meta"
    if on_meta:
        settings["device_map"] = "meta"
    if loading.quantization is not None:
        settings |= quantization_config(config, loading)
    if generation is not None:
        settings["generation_config"] = generation
    with torch.device("cpu") if on_meta else nullcontext():  # transformers refuses to load within torch.device("meta")
        loaded, report = from_pretrained_quietly(
            auto.from_pretrained,
            model,
            loading,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, where transformers' error does not
            **settings,
        )
    hint = f"; its config.json names weights quantized by {stored}: save it in full precision" if stored else ""
    found = _check_report(model, loaded, report, set(new), unused, hint)
    if loading.quantization is None:
        _check_stored_types(model, loaded, loading, hint)
    # a 4-bit weight is of integers
    values = ((name, weight) for name, weight in loaded.named_parameters() if weight.is_floating_point())
    check_weight_values("model", repr(model), values)
    if stored:
        say_once(f"model: config.json of {model!r} names a quantization by {stored}, ignored: its weights are in full")
    if attention == "eager" and loading.attn_implementation is None:
        say_once(
            f"model: {config.model_type} has no sdpa attention in transformers; its eager attention is used, slower"
        )
    if loaded.can_generate():
        kept, dropped = split_generation_settings(loaded.generation_config.to_diff_dict())
        if dropped:  # of a model without generation_config.json, from its config.json
            _say_dropped(model, "config.json", dropped)
            loaded.generation_config = GenerationConfig(**kept)
    return loaded, found


def _load_adapted(
    auto: Any,
    adapter: PeftAdapter,
    config: PretrainedConfig,
    new: Iterable[str],
    unused: tuple[str, ...],
    **settings: Any,
) -> tuple[Any, set[str]]:
    """Load the base of a PEFT folder and merge the adapter into it; see `load_weights`."""
    if adapter.loading.quantization is not None:
        raise UserError(
            f"model: {adapter.path!r} is an adapter, which cannot be merged into 4-bit weights: merge it into its base "
            "first (peft's merge_and_unload, or an export in the format `merged`), or set loading.quantization to null"
        )
    check_weight_values("model", repr(adapter.path), adapter.weights.items())
    new = {*new, *adapter.full_modules}
    base, found = load_weights(auto, adapter.base, config, adapter.base_loading, new, unused, **settings)
    return adapter.merge_into(base, unused), found


@cache
def say_once(line: str) -> None:
    """Print a line on rank zero, once in a process."""
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(line)


def resolve_attention(config: PretrainedConfig, loading: ModelLoadingConfig) -> str | None:
    """Return the attention implementation of a model: "sdpa", or "eager" for an architecture without it.

    None for code that comes with a model, where transformers decides.
    """
    if loading.attn_implementation is not None:
        return loading.attn_implementation
    if type(config) not in MODEL_MAPPING:
        return None
    return "sdpa" if MODEL_MAPPING[type(config)]._supports_sdpa else "eager"


def quantization_config(config: PretrainedConfig, loading: ModelLoadingConfig) -> dict[str, Any]:
    """Build the arguments of `from_pretrained` for a 4-bit base.

    Raises:
        UserError: No GPU, and a width that the CPU kernels of bitsandbytes do not support.
    """
    from transformers import BitsAndBytesConfig

    text = config.get_text_config()
    unsupported = [
        f"{name} {width}"
        for name in ("hidden_size", "intermediate_size")
        if isinstance(width := getattr(text, name, None), int) and width % 64
    ]
    if unsupported and not torch.cuda.is_available():
        raise UserError(
            f"loading.quantization: on a CPU 4-bit layers need widths that are multiples of 64, this model has "
            f"{' and '.join(unsupported)}; set loading.quantization to null"
        )
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=loading.torch_dtype,
        )
    }


def split_generation_settings(stored: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a generation_config.json into the settings that `GenerationConfig` saves together, and the others.

    Such as a temperature beside `do_sample: false`: transformers refuses to save it, or to load it at all.
    """
    if _is_valid(stored):
        return stored, {}
    kept: dict[str, Any] = {}
    dropped = dict(stored)
    while accepted := next((name for name in dropped if _is_valid({**kept, name: dropped[name]})), None):
        kept[accepted] = dropped.pop(accepted)
    return kept, dropped


def _is_valid(settings: dict[str, Any]) -> bool:
    try:
        with quiet_transformers():
            GenerationConfig(**settings).validate(strict=True)
    except (ValueError, TypeError, AttributeError):
        return False
    return True


def _read_generation_config(model: str, loading: ModelLoadingConfig) -> GenerationConfig | None:
    """Return the valid settings of a generation_config.json; None if there is none or transformers can read it itself.

    Raises:
        UserError: The file is no JSON object, which transformers would ignore.
    """
    path = find_file(model, GENERATION_CONFIG_NAME, loading)
    if path is None:
        return None
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise UserError(f"model: {GENERATION_CONFIG_NAME} of {model!r} is no JSON object; repair it or delete it")
    kept, dropped = split_generation_settings(stored)
    if not dropped:
        return None
    _say_dropped(model, GENERATION_CONFIG_NAME, dropped)
    return GenerationConfig(**kept)


def _say_dropped(model: str, file: str, dropped: dict[str, Any]) -> None:
    names = ", ".join(f"{name} {value!r}" for name, value in dropped.items())
    say_once(f"model: {file} of {model!r}: left out, as transformers cannot save it with the other settings: {names}")


def _drop_stored_quantization(config: PretrainedConfig, loading: ModelLoadingConfig) -> str | None:
    """Delete the quantization in a config.json, with which transformers would quantize full weights; return its name.

    With `loading.quantization`, one of the same kind stays: the weights may be stored in it.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    if loading.quantization is not None and fields.get("bnb_4bit_quant_type") == loading.quantization:
        return None
    del config.quantization_config
    return str(fields.get("quant_method", "an unnamed method"))


def _check_report(
    model: str, loaded: Any, report: dict[str, Any], new: set[str], unused: tuple[str, ...], hint: str
) -> set[str]:
    """Refuse weights that transformers initialized at random or dropped; return the unused ones."""
    buffers = {name for name, _ in loaded.named_buffers()}
    unexpected = {name for name in report["unexpected_keys"] if not OLD_BUFFERS.search(name) and name not in buffers}
    found = {name for name in unexpected if name.startswith(unused)} if unused else set()
    foreign = sorted(unexpected - found)
    missing = sorted(report["missing_keys"] - new - buffers)
    holds = f" (it holds {', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''})" if foreign else ""
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        hint = "; a trained head must be one linear layer named `score`" if missing == ["score.weight"] else hint
        raise UserError(f"model: {model!r} has no weight {missing[0]!r}{more}{holds}{hint}")
    for name, stored, own in sorted(report["mismatched_keys"]):
        raise UserError(
            f"model: the weight {name!r} of {model!r} has the shape {list(stored)}, by its config.json it has "
            f"{list(own)}{hint}"
        )
    if foreign:
        raise UserError(
            f"model: {type(loaded).__name__} has no use for {len(foreign):,} of the weights of {model!r}{holds}: its "
            f"config.json is of another model, or another program added them, and they are to be removed{hint}"
        )
    return found


def _check_stored_types(model: str, loaded: Any, loading: ModelLoadingConfig, hint: str) -> None:
    """Refuse integer and complex weights, which transformers would convert to `loading.dtype`."""
    prefix = f"{loaded.base_model_prefix}."
    buffers = {name.removeprefix(prefix) for name, _ in loaded.named_buffers()}
    for path in _find_weight_files(model, loading):
        for name, dtype in _read_other_types(path):
            if not (OLD_BUFFERS.search(name) or name.removeprefix(prefix) in buffers):
                raise UserError(
                    f"model: the weight {name!r} of {model!r} is stored as {dtype}, no floating-point type: the file "
                    f"is of another program, or damaged; save it in float32 or bfloat16{hint}"
                )


def _find_weight_files(model: str, loading: ModelLoadingConfig) -> list[str]:
    """Return the paths of the files that transformers reads weights from."""
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = find_file(model, name, loading)
        if path is not None and name.endswith(".json"):
            shards = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
            return [shard for each in sorted(shards) if (shard := find_file(model, each, loading))]
        if path is not None:
            return [path]
    return []


def _read_other_types(path: str) -> list[tuple[str, str]]:
    """Return name and type of every tensor of a weight file that is no floating-point one; reads no values."""
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            names = file.keys()
            types = [(name, file.get_slice(name).get_dtype()) for name in names]
        return [(name, dtype) for name, dtype in types if not dtype.startswith(("F", "BF"))]
    mmap = zipfile.is_zipfile(path)  # not of PyTorch before 1.6
    tensors = torch.load(path, map_location="meta", weights_only=True, mmap=mmap)
    return [(name, str(value.dtype)) for name, value in tensors.items() if not value.is_floating_point()]


def check_weight_values(setting: str, source: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that hold NaN or infinity, or are of no floating-point type; on the meta device none is refused.

    Args:
        setting: That names their source, for the message.
        source: Folder, hub name or file, as it is shown.
        weights: Names and tensors.

    Raises:
        UserError: Names the first such weight.
    """
    for name, weight in weights:
        if weight.is_meta or not weight.numel():
            continue
        if not weight.is_floating_point():
            reason = f"is stored as {weight.dtype}, no floating-point type"
        elif not all(extreme.isfinite() for extreme in weight.detach().aminmax()):  # NaN is both
            reason = "holds NaN or infinity"
        else:
            continue
        raise UserError(
            f"{setting}: the weight {name!r} of {source} {reason}: its training diverged, or the file is damaged; "
            "use an earlier checkpoint, or copy it again"
        )
