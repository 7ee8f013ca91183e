"""Models and tokenizers as objects where a folder or a hub name may stand: what is accepted, how it is prepared."""

import copy
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import ModelLoadingConfig

ModelSource: TypeAlias = str | PreTrainedModel
"""A folder or a hub name, or a model that was loaded already."""

TokenizerSource: TypeAlias = Tokenizer | str | Path
"""A tokenizer, or the folder or hub name of one."""

M = TypeVar("M")

APPLIES_TO_OBJECTS = ("pad_token", "gradient_checkpointing", "compile")  # settings of loading


def resolve_model(model: Any, setting: str) -> Any:
    """Return a model as a setting gives it: a path as text, an object as it is.

    Raises:
        UserError: The object is no transformers model, or one whose weights cannot be trained and exported here.
    """
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        hint = "; give its base model and adapter=LoRA(...), or what merge_and_unload returns" if "Peft" in kind else ""
        raise UserError(f"{setting}: a {kind} is neither a path nor a transformers.PreTrainedModel{hint}")
    if getattr(model, "is_quantized", False):
        raise UserError(f"{setting}: its weights are quantized; give the folder, and loading.quantization")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(f"{setting}: it has an adapter already; give its base model and adapter=LoRA(...)")
    model.config.architectures = [type(model).__name__]  # of an object the class decides, not what it was loaded from
    return model


def resolve_tokenizer(tokenizer: Any, model: Any) -> Tokenizer | str:
    """Return what a tokenizer is loaded from.

    Args:
        tokenizer: What a setting gives; None is the tokenizer of the model's folder.
        model: The resolved model.

    Raises:
        UserError: The object is no tokenizer, or none is given for a model that is from no folder.
    """
    if tokenizer is None:
        if not isinstance(model, str) and not _stored_name(model):
            raise UserError(f"tokenizer: the {model_name(model)} is from no folder; give tokenizer=")
        return model_name(model)
    if isinstance(tokenizer, str | os.PathLike):
        return os.fspath(tokenizer)
    if not isinstance(tokenizer, Tokenizer):
        raise UserError(f"tokenizer: a {type(tokenizer).__name__} is neither a path nor a tokenizer of transformers")
    return tokenizer


def check_applies_to(model: Any, loading: ModelLoadingConfig) -> None:
    """Refuse settings of loading that would do nothing, for a model that is loaded already."""
    for field in () if isinstance(model, str) else fields(loading):
        if field.name not in APPLIES_TO_OBJECTS and getattr(loading, field.name) != field.default:
            raise UserError(
                f"loading.{field.name}: the model is an object, loaded already; load it so by from_pretrained, and "
                f"leave loading.{field.name} out"
            )


def model_name(model: Any) -> str:
    """Return what messages and records call a model: its path, or that of an object, else its class."""
    if isinstance(model, str):
        return model
    return _stored_name(model) or f"{type(_transformers_model(model)).__name__} object"


def _stored_name(model: nn.Module) -> str:
    """Return the folder or hub name that an object was loaded from; "" if there is none."""
    return str(getattr(_transformers_model(model), "name_or_path", ""))


def _transformers_model(model: nn.Module) -> nn.Module:
    return next((each for each in model.modules() if isinstance(each, PreTrainedModel)), model)


def copied(model: M) -> M:
    """Return a copy of an object, for a second role that must not share its weights; a path as it is."""
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model


def without_dropout(model: PreTrainedModel, residual: float = 0.0) -> PreTrainedModel:
    """Set every dropout of a model to 0, in its layers and its configuration.

    Raises:
        UserError: `residual` is not 0: which layers are residual is decided when a model is built.
    """
    if residual:
        raise UserError(
            f"dropout: {residual} is set while a model is built, and this one is an object; give its folder or hub name"
        )
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and "Dropout" in type(module).__name__)):
                setattr(module, name, 0.0)
    for name, value in model.config.to_dict().items():
        if isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            setattr(model.config, name, 0.0)
    return model
