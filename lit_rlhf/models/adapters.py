"""LoRA by peft, in place: the model keeps its class, its `generate` and its `save_pretrained`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.options import LoRA


def add_lora(model: PreTrainedModel, lora: LoRA) -> None:
    """Freeze `model` and put trainable low-rank adapters on its linear layers.

    A fresh adapter changes nothing: its second factor is 0. A `score` head stays trainable and takes no adapter.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        exclude_modules=["score"] if hasattr(model, "score") else None,
        task_type=None,
    )
    model.add_adapter(config)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)


def has_adapter(model: nn.Module) -> bool:
    """Return whether LoRA layers are present."""
    return any(True for _ in _adapter_layers(model))


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` computes as its frozen base: the reference policy of a LoRA run, at no memory."""
    layers = list(_adapter_layers(model))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict of a plain model that computes what `model` does: adapters folded in, nothing in 4 bits.

    `model` stays as it is.
    """
    adapted = {name: layer for name, layer in model.named_modules() if _is_adapter_layer(layer)}
    weights: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer", "")
        owned = dict(module.named_parameters(recurse=False)) | {
            key: value
            for key, value in module.named_buffers(recurse=False)
            if key not in module._non_persistent_buffers_set
        }
        for key, value in owned.items():
            whole = _in_full(module, value) if key == "weight" else value.detach()
            if key == "weight" and name.endswith(".base_layer"):
                # added in float32: a sum in half precision would lose what the adapter learnt
                delta = adapted[name.removesuffix(".base_layer")].get_delta_weight("default")
                whole = (whole.float() + (delta.T if _is_transposed(module) else delta).float()).to(whole.dtype)
            weights[f"{plain}.{key}" if plain else key] = whole
    return weights


def _in_full(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as a plain tensor of the shape that the unquantised layer has."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    module.state_dict()  # in eval mode a CPU layer lies repacked, which dequantisation does not know; this undoes it
    layer: Any = module
    whole: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return whole.T.contiguous() if _is_transposed(module) else whole


def _is_transposed(module: nn.Module) -> bool:
    """Return whether the layer comes of a `Conv1D`, GPT-2's linear layer with its weight the other way round."""
    return getattr(module, "source_cls", None) is Conv1D


def _is_adapter_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _is_adapter_layer(module))
