"""LoRA by peft, in place: the model keeps its class, its `generate` and its `save_pretrained`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

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
    layers = [layer for _, _, layer in _adapter_layers(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merge_adapter(model: PreTrainedModel) -> None:
    """Fold the adapters into the base weights and remove them: a plain transformers model remains."""
    for parent, name, layer in list(_adapter_layers(model)):
        layer.merge()
        setattr(parent, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        model._hf_peft_config_loaded = False
        del model.peft_config


def _adapter_layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                yield parent, name, child
