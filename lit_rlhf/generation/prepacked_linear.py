"""Linear layers as products of few rows: weights in the order in which a CPU reads them, layers of one input together.

A product of a few dozen rows is done before its weights have come from memory; with their blocks in the order in which
they are read it takes down to half the time. PyTorch's compiler packs weights too, but as constants, and those of a
policy change at every update. So a rollout packs them when it begins: a copy, for as long as it lasts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: takes (n, T, inputs), returns (n, T, outputs)
Layer = Callable[[Tensor], Tensor]

_AVAILABLE = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # not in every build of PyTorch
_ROWS = 16  # what the order of the weights is chosen for; with others the product is the same


class ConcatLinear:
    """Layers of one input, called as they are; their outputs one behind the other in the last dimension."""

    def __init__(self, *layers: nn.Module) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        """Return them."""
        return torch.cat([layer(x) for layer in self.layers], -1)


class PrepackedLinear:
    """The same as one product, with the layers' weights as they were when this was made."""

    def __init__(self, layers: tuple[nn.Linear, ...]) -> None:
        weights = [layer.weight.detach() for layer in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        """Return it."""
        product: Tensor
        if torch.compiler.is_compiling():
            product = torch.ops.lit_rlhf.packed_product(x, self.weight, self.bias)
        else:
            product = _product(x, self.weight, self.bias)
        return product


class PrepackedGatedMLP:
    """A feed-forward layer of Llama's kind: the gate and what it lets through in one product."""

    def __init__(self, widen: PrepackedLinear, gate: Callable[[Tensor], Tensor], narrow: PrepackedLinear) -> None:
        self.widen, self.gate, self.narrow = widen, gate, narrow

    @classmethod
    def from_module(cls, mlp: Any) -> "PrepackedGatedMLP | None":
        """Return one that does what the module does, or None where that is not known."""
        if not type(mlp).__module__.startswith("transformers.models.") or _is_wrapped(mlp):
            return None
        widen, narrow = prepack_linear(mlp.gate_proj, mlp.up_proj), prepack_linear(mlp.down_proj)
        return cls(widen, mlp.act_fn, narrow) if widen and narrow else None

    def __call__(self, x: Tensor) -> Tensor:
        """Return it."""
        gate, up = self.widen(x).chunk(2, -1)
        return self.narrow(self.gate(gate) * up)


def prepack_linear(*layers: nn.Module) -> PrepackedLinear | None:
    """Return plain linear layers of one input as one product, in float32 on a CPU; None for all others."""
    # autocast would compute the layers in half precision, and the product as it is
    if not _AVAILABLE or torch.is_autocast_enabled("cpu"):
        return None
    plain = [layer for layer in layers if type(layer) is nn.Linear and not _is_wrapped(layer)]
    kinds = {(type(each.weight), each.weight.device.type, each.weight.dtype, each.bias is None) for each in plain}
    known = len(plain) == len(layers) and len(kinds) == 1 and kinds.pop()[:3] == (nn.Parameter, "cpu", torch.float32)
    return PrepackedLinear(tuple(plain)) if known else None


def _is_wrapped(module: nn.Module) -> bool:
    """Whether a call of the module does something besides what its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


# PyTorch's compiler takes packed weights as constants alone. As an operator that it does not look into they are inputs.
torch.library.define("lit_rlhf::packed_product", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("lit_rlhf::packed_product", "default", _product)


@torch.library.register_fake("lit_rlhf::packed_product")
def _shape_of_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
