"""How much memory a model takes to train, from its configuration alone: no weight is read, none is allocated."""

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.loading import checkpoint_activations
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora

# NormalFloat: half a byte a weight, a byte a block of 64, and a float32 for 256 of these (double quantisation)
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
# one byte a number, and a float32 for a block of 256; small weights keep float32 (bitsandbytes, torchao)
EIGHT_BIT, EIGHT_BIT_FROM = 1 + 4 / 256, 4096
MOMENTS = {"Lion": 1, "PagedLion": 1, "SGD": 1, "RMSprop": 1, "Adagrad": 1}


class ParameterMemory(NamedTuple):
    """What a model's weights take, in bytes.

    Args:
        parameters: how many, adapters among them.
        trained: how many of these are trained.
        weights: all weights as they are stored.
        gradients: those of the trained weights.
        optimizer: the optimizer's state.
        gathered: what is whole at a time where weights are sharded: outermost layers and two blocks, one of them on
            its way.
    """

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    gathered: int


class PassShape(NamedTuple):
    """What a forward pass is made over.

    Args:
        rows: B.
        width: T.
        num_logits: positions from the right that get logits.
        half: whether under autocast to bfloat16.
    """

    rows: int
    width: int
    num_logits: int
    half: bool = False


class ActivationMemory(NamedTuple):
    """What one forward pass keeps for its backward pass, in bytes.

    Args:
        activations: all but the logits.
        logits: logits and their gradient, which are held together; 0 for a model without.
    """

    activations: int
    logits: int


def build_meta_model(
    config: PretrainedConfig, loading: ModelLoadingConfig, adapter: LoRA | None, scalar: bool
) -> PreTrainedModel:
    """Return the model without its numbers, on the device "meta", with adapters."""
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if scalar:
        config.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(
            config, dtype=getattr(torch, loading.dtype), attn_implementation=loading.attn_implementation
        )
        if adapter is not None:
            add_lora(model, adapter)
    return model.train()


def parameter_memory(
    model: PreTrainedModel, loading: ModelLoadingConfig, optimizer: str, blocks: list[nn.Module]
) -> ParameterMemory:
    """Return what the weights of an `outline` take.

    Args:
        model: the outline.
        loading: how it is loaded.
        optimizer: class path.
        blocks: the transformer blocks, which are sharded one by one.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    in_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    weights = sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers())
    return ParameterMemory(
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        weights=weights - (_saved_by_four_bits(model) if loading.quantization else 0),
        gradients=sum(p.nbytes for p in trained),
        optimizer=round(sum(optimizer_bytes(p, optimizer) for p in trained)),
        gathered=weights - sum(in_blocks) + 2 * max(in_blocks, default=0),
    )


def _saved_by_four_bits(model: PreTrainedModel) -> int:
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and "lora_" not in name
        and name not in ("lm_head", "embed_out", "score")
    ]
    return round(sum(layer.weight.nbytes - layer.weight.numel() * FOUR_BIT for layer in layers))


def optimizer_bytes(parameter: Tensor, optimizer: str) -> float:
    """Return what an optimizer keeps for a weight; one that is not known counts as Adam's two moments."""
    name = optimizer.rsplit(".", 1)[-1]
    moments = MOMENTS.get(name.removesuffix("8bit"), 2)
    if name.endswith("8bit"):
        return parameter.numel() * moments * (EIGHT_BIT if parameter.numel() >= EIGHT_BIT_FROM else 4)
    return parameter.nbytes * moments


def activation_memory(
    config: PretrainedConfig,
    loading: ModelLoadingConfig,
    adapter: LoRA | None,
    scalar: bool,
    batch: PassShape,
) -> ActivationMemory:
    """Return what a forward pass over a batch keeps, by making one without numbers.

    Counted are the storages that autograd saves, weights apart: half precision copies of weights, which autocast makes
    and keeps, are among them. A deep model is counted by its first two blocks, for all others are like the second. With
    gradient checkpointing one block's activations are added to what is kept: they are there again when the block is
    computed again.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    depth = config.get_text_config().num_hidden_layers
    kept, again, logits = [], [], 0
    for layers in (1, 2):
        model = build_meta_model(_shallow(config, layers), loading, adapter, scalar)
        with FakeTensorMode():
            _make_fake(model)
            saved, logits = _saved(model, batch)
            kept.append(saved)
            if loading.gradient_checkpointing:
                checkpoint_activations(model)
                again.append(_saved(model, batch)[0])
    block = kept[1] - kept[0]
    if loading.gradient_checkpointing:
        inputs = again[1] - again[0]
        return ActivationMemory(again[0] + (depth - 1) * inputs + block - inputs, 2 * logits)
    return ActivationMemory(kept[0] + (depth - 1) * block, 2 * logits)


def _shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    depth = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:  # one entry a block
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shallow


def _make_fake(model: PreTrainedModel) -> None:
    """Replace weights on "meta" by fake ones on a CPU, which autocast knows."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()


def _saved(model: PreTrainedModel, batch: PassShape) -> tuple[int, int]:
    rows, width, keep, half = batch
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, or another storage could take its place
        return tensor

    inputs = {
        "input_ids": torch.zeros(rows, width, dtype=torch.int64),
        "attention_mask": torch.ones(rows, 1, width, width, dtype=torch.bool),
        "position_ids": torch.zeros(rows, width, dtype=torch.int64),
        "use_cache": False,
    }
    scalar = hasattr(model, "score")
    autocast = torch.autocast("cpu", torch.bfloat16) if half else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast:
        output = model.base_model(**inputs) if scalar else model(**inputs, logits_to_keep=keep)
    kept = sum(storage.nbytes() for storage in saved.values())
    return kept, 0 if scalar else output.logits.nbytes


def cache_bytes(config: PretrainedConfig, rows: int, width: int, bytes_a_number: int) -> int:
    """Return what keys and values of (rows, width) tokens take in generation."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * rows * width * heads * head * bytes_a_number
