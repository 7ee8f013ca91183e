"""Estimate of training memory from a model's configuration alone: no weight is loaded or allocated."""

import copy
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.loading import enable_gradient_checkpointing
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.pretrained import resolve_attention

# NormalFloat: half a byte per weight, a byte per block of 64 weights, a float32 per 256 blocks (double quantization)
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# one byte per element and a float32 per block of 256; small weights keep float32 moments (bitsandbytes, torchao)
BYTES_PER_8BIT_MOMENT, MIN_8BIT_SIZE = 1 + 4 / 256, 4096
NUM_MOMENTS = {"Lion": 1, "PagedLion": 1, "SGD": 1, "RMSprop": 1, "Adagrad": 1}


class ParameterMemory(NamedTuple):
    """Memory of a model's weights and their training state, in bytes.

    Args:
        parameters: Number of parameters, adapters included.
        trainable: Number of trainable parameters.
        weights: Stored weights.
        gradients: Gradients of the trainable weights.
        optimizer: Optimizer state.
        unsharded: Weights that FSDP2 holds unsharded at a time: the outermost layers and two blocks, one of them
            prefetched.
    """

    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    unsharded: int


class PassShape(NamedTuple):
    """Shape and precision of a forward pass.

    Args:
        rows: B.
        width: T.
        num_logits: Positions per row, from the right, whose logits are computed.
        bf16_autocast: Whether it runs under autocast to bfloat16.
    """

    rows: int
    width: int
    num_logits: int
    bf16_autocast: bool = False


class ActivationMemory(NamedTuple):
    """Memory that one forward pass holds until its backward pass, in bytes.

    Args:
        activations: All saved tensors but the logits.
        logits: Logits and their gradient, which are held at the same time; 0 for a scalar model.
    """

    activations: int
    logits: int


def build_meta_model(
    config: PretrainedConfig, loading: ModelLoadingConfig, adapter: LoRA | None, scalar: bool
) -> PreTrainedModel:
    """Build the model with its adapter on the meta device.

    Args:
        config: Of the model.
        loading: How it is loaded.
        adapter: Its LoRA settings; None for full fine-tuning.
        scalar: Whether it has a scalar head instead of an `lm_head`.
    """
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    config = copy.deepcopy(config)
    if scalar:
        config.num_labels = 1
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(
            config,
            dtype=loading.torch_dtype,
            attn_implementation=resolve_attention(config, loading),
            trust_remote_code=loading.trust_remote_code,
        )
        if adapter is not None:
            add_lora(model, adapter)
    return model.train()


def parameter_memory(
    model: PreTrainedModel, loading: ModelLoadingConfig, optimizer: str, blocks: list[nn.Module]
) -> ParameterMemory:
    """Compute the memory of a model's weights and their training state.

    Args:
        model: Of `build_meta_model`.
        loading: How it is loaded.
        optimizer: Class path of the optimizer.
        blocks: The transformer blocks, each an FSDP2 unit.
    """
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    in_blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    weights = sum(p.nbytes for p in parameters) + sum(b.nbytes for b in model.buffers())
    return ParameterMemory(
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in trained),
        weights=weights - (_bytes_saved_by_quantization(model) if loading.quantization else 0),
        gradients=sum(p.nbytes for p in trained),
        optimizer=round(sum(optimizer_state_bytes(p, optimizer) for p in trained)),
        unsharded=weights - sum(in_blocks) + 2 * max(in_blocks, default=0),
    )


def _bytes_saved_by_quantization(model: PreTrainedModel) -> int:
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and "lora_" not in name
        and name not in ("lm_head", "embed_out", "score")
    ]
    return round(sum(layer.weight.nbytes - layer.weight.numel() * NF4_BYTES_PER_WEIGHT for layer in layers))


def optimizer_state_bytes(parameter: Tensor, optimizer: str) -> float:
    """Compute the bytes of optimizer state of a parameter; an unknown optimizer counts as Adam, with two moments."""
    name = optimizer.rsplit(".", 1)[-1]
    moments = NUM_MOMENTS.get(name.removesuffix("8bit"), 2)
    if name.endswith("8bit"):
        return parameter.numel() * moments * (BYTES_PER_8BIT_MOMENT if parameter.numel() >= MIN_8BIT_SIZE else 4)
    return parameter.nbytes * moments


def activation_memory(
    config: PretrainedConfig,
    loading: ModelLoadingConfig,
    adapter: LoRA | None,
    scalar: bool,
    shape: PassShape,
) -> ActivationMemory:
    """Compute the memory that a forward pass holds until its backward pass, by running one on fake tensors.

    It counts the storages that autograd saves, except weights, but with the bfloat16 copies of weights that autocast
    caches. Only two blocks are run, since all further blocks are like the second. With gradient checkpointing, the
    activations of one block are added, which exist while it is recomputed.

    Args:
        config: Of the model.
        loading: How it is loaded.
        adapter: Its LoRA settings; None for full fine-tuning.
        scalar: Whether it has a scalar head instead of an `lm_head`.
        shape: Of the forward pass.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    depth = config.get_text_config().num_hidden_layers
    plain, checkpointed, logits = [], [], 0
    for layers in (1, 2):
        model = build_meta_model(_shallow(config, layers), loading, adapter, scalar)
        with FakeTensorMode():
            _make_fake(model)
            saved, logits = _saved_bytes(model, shape)
            plain.append(saved)
            if loading.gradient_checkpointing:
                enable_gradient_checkpointing(model)
                checkpointed.append(_saved_bytes(model, shape)[0])
    block = plain[1] - plain[0]
    if loading.gradient_checkpointing:
        inputs = checkpointed[1] - checkpointed[0]
        return ActivationMemory(checkpointed[0] + (depth - 1) * inputs + block - inputs, 2 * logits)
    return ActivationMemory(plain[0] + (depth - 1) * block, 2 * logits)


def _shallow(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    shallow = copy.deepcopy(config)
    text = shallow.get_text_config()
    depth = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == depth:  # one entry per block
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return shallow


def _make_fake(model: PreTrainedModel) -> None:
    """Replace weights on the meta device by fake CPU tensors, which autocast supports."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    model.tie_weights()


def _saved_bytes(model: PreTrainedModel, shape: PassShape) -> tuple[int, int]:
    rows, width, keep, half = shape
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # keep a reference, or another storage could reuse the address
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
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return saved_bytes, 0 if scalar else output.logits.nbytes


def kv_cache_bytes(config: PretrainedConfig, rows: int, width: int, bytes_per_element: int) -> int:
    """Compute the bytes of a KV cache for (rows, width) tokens."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * rows * width * heads * head * bytes_per_element
