"""LoRA by peft, injected in place: the model keeps its class, its `generate` and its `save_pretrained`."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain, count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.distributed import full_tensor
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.suggestions import did_you_mean

POLICY = "default"  # peft's name of the first adapter, which here is the policy's own, and merged in an export


def add_lora(model: PreTrainedModel, lora: LoRA, name: str = POLICY) -> None:
    """Freeze `model` and add a trainable low-rank adapter to its linear layers.

    A new adapter changes no output: its second factor is 0. A `score` head gets no adapter and stays trainable. If the
    model has an adapter already, that one stays active (see `active_adapter`), and all stay trainable.

    Args:
        model: The model, changed in place.
        lora: Settings of the adapter.
        name: Name of the adapter.

    Raises:
        UserError: See `check_lora`.
    """
    from peft import LoraConfig

    check_lora(lora, model)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=["score"] if hasattr(model, "score") else None,
        task_type=None,
    )
    several = has_adapter(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad] if several else []
    model.add_adapter(config, name)
    for layer in _adapter_layers(model):  # peft does so too, but not on the meta device
        base = layer.get_base_layer().weight.dtype
        if base.is_floating_point:
            layer.lora_A[name].to(base)
            layer.lora_B[name].to(base)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    if several:  # peft froze the others and activated this one
        for parameter in trainable:
            parameter.requires_grad_(True)
        _set_active(list(_adapter_layers(model)), False, [POLICY])
        _recompute_with_same_adapter(model)


def check_lora(lora: LoRA, model: PreTrainedModel) -> None:
    """Refuse impossible settings of an adapter, and targets that are no linear layers of `model`.

    Args:
        lora: Settings of the adapter.
        model: The model, which may be on the meta device.

    Raises:
        UserError: Names the setting, the wrong entry, and the layers that there are.
    """
    for name, valid, needed in (
        ("rank", lora.rank >= 1, "1 or more"),
        ("alpha", 0 < lora.alpha < math.inf, "over 0"),
        ("dropout", 0 <= lora.dropout < 1, "at least 0 and below 1"),
    ):
        if not valid:
            raise UserError(f"model.adapter.{name} is {getattr(lora, name)}: it must be {needed}")
    targets = lora.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return
    layers = _linear_layer_names(model)
    exist = ", ".join(dict.fromkeys(layer.rsplit(".", 1)[-1] for layer in layers))
    if isinstance(targets, str) or not targets:
        raise UserError(
            f"model.adapter.target_modules is {targets!r}: it must be 'all-linear', or a list of linear layers of the "
            f"model: {exist}"
        )
    for target in targets:
        matched = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not matched or not set(matched) <= layers.keys():
            raise UserError(
                f"model.adapter.target_modules: {target!r} is no linear layer of the model that can have an adapter"
                f"{did_you_mean(target, exist.split(', '))}; there are {exist}"
            )


def _linear_layer_names(model: PreTrainedModel) -> dict[str, None]:
    """Return the names of linear layers, in order, without heads: `score` is trained in full, and others may be tied.

    Merging an adapter into a tied output head would change the embedding.
    """
    heads = [model.get_output_embeddings(), getattr(model, "score", None)]
    names: dict[str, None] = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D) or _is_adapter_layer(module)
        within_adapter = any(name.startswith(f"{layer}.") for layer in names)
        if is_linear and not within_adapter and all(module is not head for head in heads):
            names[name] = None
    return names


@torch.no_grad()
def fill_added_rows(model: PreTrainedModel, vocab_size: int) -> None:
    """Set the rows of embedding and output layer from `vocab_size` on, of an added padding token, to the mean row.

    Its logit is then the mean of the others, and its probability at most 1 / (vocab_size + 1) (Hewitt, 2021,
    "Initializing new word embeddings for pretrained language models"). A small random row has a logit near 0, which
    takes almost all probability from models whose logits are strongly negative, such as GPT-2.

    In a frozen base the row is neither trained nor stored: a resumed run, an export and every other reader compute it.
    """
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for rows in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
            if rows is not None and not rows.is_meta and len(rows) > vocab_size:
                rows[vocab_size:] = _mean_row(rows[:vocab_size]).to(rows)


def _mean_row(rows: Tensor) -> Tensor:
    """Return the mean over the first dimension, float64 on the CPU: the same on every device; in parts, for memory."""
    sums = [part.cpu().double().sum(0) for part in torch.split(rows, 4096)]
    return torch.stack(sums).sum(0) / len(rows)


def unique_adapter_name(model: nn.Module, wanted: str) -> str:
    """Return `wanted`, with a number appended if an adapter of `model` has that name."""
    taken = {name for layer in _adapter_layers(model) for name in layer.lora_A}
    return next(name for name in chain([wanted], (f"{wanted}_{n}" for n in count(2))) if name not in taken)


def adapter_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the weights of the adapter `name`, with that name removed from the keys."""
    own = f".{name}.weight"
    return {
        key.removesuffix(own): parameter
        for key, parameter in model.named_parameters()
        if "lora_" in key and key.endswith(own)
    }


def has_adapter(model: nn.Module) -> bool:
    """Whether `model` has LoRA layers."""
    return any(True for _ in _adapter_layers(model))


def policy_lora(model: PreTrainedModel) -> LoRA | None:
    """Return rank, scale and dropout of the policy's own adapter; None without one."""
    if not has_adapter(model):
        return None
    config = model.peft_config[POLICY]
    return LoRA(config.r, config.lora_alpha, config.lora_dropout)


def policy_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the adapters of a critic or a reward model that share the policy's base."""
    return {key: weight for key, weight in weights.items() if ".lora_" not in key or f".{POLICY}." in key}


@contextmanager
def active_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the context, `model` computes with the adapter `name` alone, or with None as its frozen base.

    The frozen base is the reference policy of a LoRA run, without memory of its own.
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
    """Set the active adapter of the layers.

    Not by peft's `set_adapter` and `enable_adapters`: they also freeze inactive adapters, and a weight that is frozen
    during the backward pass silently loses its gradient.
    """
    for layer in layers:
        layer._disable_adapters, layer._active_adapter = off, active


def _recompute_with_same_adapter(model: PreTrainedModel) -> None:
    """Make gradient checkpointing recompute a block with the adapter of its forward pass, not the one active later."""

    def contexts() -> tuple[Any, Any]:
        layer = next(_adapter_layers(model))
        name = None if layer._disable_adapters else layer.active_adapters[0]
        return nullcontext(), active_adapter(model, name)

    if model.is_activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})


@torch.no_grad()
def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the state dict of an equivalent model with adapters merged and 4-bit weights dequantized.

    `model` does not change.
    """
    return {each.name: each.compute() for each in iter_merged_weights(model)}


class MergedWeight(NamedTuple):
    """A weight of an equivalent model without adapters, before it is computed."""

    name: str
    module: nn.Module
    value: Tensor  # of the module, which may be a shard of a rank, or quantized
    adapted: Any  # the layer with an adapter that the module is the base of; None without one
    is_weight: bool  # not a bias or a buffer

    def plain(self) -> Tensor:
        """Return the weight without adapter, in the shape and dtype of the merged one; a shard stays one."""
        return dequantize(self.module, self.value) if self.is_weight else self.value.detach()

    def compute(self) -> Tensor:
        """Return the merged weight; of a sharded model, every rank must call it, and gets the full tensor."""
        full = full_tensor(self.plain())
        if self.adapted is None:
            return full
        # summed in float32: in half precision small updates of the adapter would be rounded away
        delta = full_tensor(self.adapted.get_delta_weight(POLICY))
        return (full.float() + (delta.T if _is_transposed(self.module) else delta).float()).to(full.dtype)


class LinearParts(NamedTuple):
    """A linear layer: x → (weight + Σ up @ down) x + bias."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    adapters: list[tuple[Tensor, Tensor]]  # down (r, in) and up (out, r), which is scaled, of each active adapter


@torch.no_grad()
def split_linear(layer: nn.Module) -> LinearParts | None:
    """Return weight, bias and active adapters of a linear layer, plain or with LoRA.

    None for a layer that may compute something else than a product and a bias: a subclass, one with hooks, a quantized
    one, or an adapter that is no plain LoRA (its dropout in train mode, DoRA and the like).
    """
    adapted: Any = layer
    base = adapted.get_base_layer() if _is_adapter_layer(layer) else layer
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter or has_own_call(base):
        return None
    parts = LinearParts(base.weight.detach(), None if base.bias is None else base.bias.detach(), [])
    if base is layer:
        return parts
    from peft.tuners.lora.layer import Linear

    active = [] if adapted.disable_adapters else [name for name in adapted.active_adapters if name in adapted.lora_A]
    is_plain = type(layer) is Linear and not adapted.merged and not has_own_call(layer)
    for name in active:
        has_dropout = adapted.training and type(adapted.lora_dropout[name]) is not nn.Identity
        is_plain = is_plain and name not in adapted.lora_variant and not adapted.lora_bias[name] and not has_dropout
    if not is_plain:
        return None
    pairs = ((adapted.lora_A[name].weight, adapted.lora_B[name].weight * adapted.scaling[name]) for name in active)
    return parts._replace(adapters=[(down.detach(), up.detach()) for down, up in pairs])


def has_own_call(module: nn.Module) -> bool:
    """Whether a call of the module does something beyond its class's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def iter_merged_weights(model: PreTrainedModel) -> Iterator[MergedWeight]:
    """Yield the weights of `merged_state_dict`, to be computed one at a time."""
    adapted = {name: layer for name, layer in model.named_modules() if _is_adapter_layer(layer)}
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
            is_weight = key == "weight"
            layer = adapted[name.removesuffix(".base_layer")] if is_weight and name.endswith(".base_layer") else None
            yield MergedWeight(f"{plain}.{key}" if plain else key, module, value, layer, is_weight)


def dequantize(module: nn.Module, weight: Tensor) -> Tensor:
    """Return a layer's weight as a plain tensor in the shape of the unquantized layer."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    module.state_dict()  # undoes the repacking of a CPU layer in eval mode, which dequantize_4bit does not support
    layer: Any = module
    full: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return full.T.contiguous() if _is_transposed(module) else full


def _is_transposed(module: nn.Module) -> bool:
    """Whether the layer was converted from a `Conv1D`, GPT-2's linear layer with transposed weight."""
    return getattr(module, "source_cls", None) is Conv1D


def _is_adapter_layer(module: nn.Module) -> bool:
    if "peft" not in sys.modules:  # which has made no layer then; importing it takes over a second
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _adapter_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _is_adapter_layer(module))
