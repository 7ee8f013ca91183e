"""LoRA by peft, in place: the model keeps its class, its `generate` and its `save_pretrained`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.loading_config import LoRA

POLICY = "default"  # peft's name for a model's first adapter: its own, which an export merges


def add_lora(model: PreTrainedModel, lora: LoRA, name: str = POLICY) -> None:
    """Freeze `model` and put trainable low-rank adapters on its linear layers.

    A fresh adapter changes nothing: its second factor is 0. A `score` head stays trainable and takes no adapter.
    Of several adapters on one base, the first stays the active one (`active_adapter`), and all stay trainable.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=["score"] if hasattr(model, "score") else None,
        task_type=None,
    )
    several = has_adapter(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] if several else []
    model.add_adapter(config, name)
    for layer in _adapter_layers(model):  # peft does so too, but not on the device "meta"
        base = layer.get_base_layer().weight.dtype
        if base.is_floating_point:
            layer.lora_A[name].to(base)
            layer.lora_B[name].to(base)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    if several:  # peft froze the others, and made this one active
        for parameter in trained:
            parameter.requires_grad_(True)
        _set_active(list(_adapter_layers(model)), False, [POLICY])
        _recompute_under_the_same_adapter(model)


def unique_adapter_name(model: nn.Module, wanted: str) -> str:
    """Return `wanted`, or with a number behind it where an adapter of `model` has that name."""
    taken = {name for layer in _adapter_layers(model) for name in layer.lora_A}
    return next(name for name in chain([wanted], (f"{wanted}_{n}" for n in count(2))) if name not in taken)


def adapter_weights(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the weights of the adapter `name`, by what they are called without that name."""
    own = f".{name}.weight"
    return {
        key.removesuffix(own): parameter
        for key, parameter in model.named_parameters()
        if "lora_" in key and key.endswith(own)
    }


def has_adapter(model: nn.Module) -> bool:
    """Return whether LoRA layers are present."""
    return any(True for _ in _adapter_layers(model))


def policy_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the adapters that ride on the model: a critic's, a reward model's."""
    return {key: weight for key, weight in weights.items() if ".lora_" not in key or f".{POLICY}." in key}


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the block, `model` computes with the adapter `name` alone; with None as its frozen base.

    The frozen base is the reference policy of a LoRA run, at no memory.
    """
    layers = list(_adapter_layers(model))
    before = [(layer._disable_adapters, layer._active_adapter) for layer in layers]
    _set_active(layers, name is None, [name or POLICY])
    try:
        yield
    finally:
        for layer, (off, active) in zip(layers, before):
            _set_active([layer], off, active)


def _set_active(layers: list[Any], off: bool, active: Any) -> None:
    """Say what the layers compute with.

    Not by peft's own `set_adapter` and `enable_adapters`: they also freeze what is switched off, and a weight that is
    frozen when its gradient arrives drops it without a word.
    """
    for layer in layers:
        layer._disable_adapters, layer._active_adapter = off, active


def _recompute_under_the_same_adapter(model: PreTrainedModel) -> None:
    """Let gradient checkpointing recompute a block with the adapter of its forward pass, not with the active one."""

    def contexts() -> tuple[Any, Any]:
        layer = next(_adapter_layers(model))
        name = None if layer._disable_adapters else layer.active_adapters[0]
        return nullcontext(), active_adapter(model, name)

    if model.is_activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


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
            whole = dequantize(module, value) if key == "weight" else value.detach()
            if key == "weight" and name.endswith(".base_layer"):
                # added in float32: a sum in half precision would lose what the adapter learnt
                delta = adapted[name.removesuffix(".base_layer")].get_delta_weight(POLICY)
                whole = (whole.float() + (delta.T if _is_transposed(module) else delta).float()).to(whole.dtype)
            weights[f"{plain}.{key}" if plain else key] = whole
    return weights


def dequantize(module: nn.Module, weight: Tensor) -> Tensor:
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
