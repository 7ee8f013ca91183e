"""Linear layers as one product of packed weights: against float64, and which layers are left as they are."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lit_rlhf.generation.llama_decoder import PrepackedGatedMLP, prepack_linear


def layers(*outputs: int, inputs: int = 24, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(inputs, size, bias=bias) for size in outputs]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_one_product_is_all_of_them(rows, bias):
    several = layers(40, 8, 8, bias=bias)
    x = torch.randn(rows, 1, 24)
    exact = torch.cat(
        [nn.functional.linear(x.double(), *(p.double() for p in each.parameters())) for each in several], -1
    )
    one = prepack_linear(*several)
    assert one is not None
    with torch.no_grad():
        torch.testing.assert_close(one(x), exact.float(), atol=1e-6, rtol=1e-5)


def test_it_keeps_the_weights_of_its_making():
    (layer,) = layers(8)
    one, x = prepack_linear(layer), torch.randn(2, 1, 24)
    with torch.no_grad():
        before = layer(x)
        layer.weight.add_(1.0)
        torch.testing.assert_close(one(x), before, atol=1e-6, rtol=1e-5)


def hooked() -> list[nn.Linear]:
    (layer,) = layers(8)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return [layer]


def patched() -> list[nn.Linear]:
    (layer,) = layers(8)
    layer.forward = lambda x: x  # as accelerate does
    return [layer]


class Own(nn.Linear):
    """A layer that computes something else, as quantised ones do."""


OTHERS = {
    "hook": hooked,
    "patched": patched,
    "subclass": lambda: [Own(24, 8, bias=False)],
    "half precision": lambda: [layers(8)[0].bfloat16()],
    "some with a bias": lambda: layers(8) + layers(8, bias=True),
    "one that is none": lambda: [*layers(8), nn.Identity()],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_layers_are_left_as_they_are(what):
    assert prepack_linear(*OTHERS[what]()) is None


def test_autocast_would_compute_in_half_precision():
    with torch.autocast("cpu", torch.bfloat16):
        assert prepack_linear(*layers(8)) is None
    assert prepack_linear(*layers(8)) is not None


def test_a_feed_forward_layer():
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2))
    one, x = PrepackedGatedMLP.from_module(mlp), torch.randn(5, 1, 24)
    assert one is not None
    with torch.no_grad():
        torch.testing.assert_close(one(x), mlp(x), atol=1e-6, rtol=1e-5)
    mlp.down_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    assert PrepackedGatedMLP.from_module(mlp) is None
    assert PrepackedGatedMLP.from_module(nn.Identity()) is None
