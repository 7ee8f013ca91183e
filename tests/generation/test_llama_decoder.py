"""LlamaDecoder: the logits of the model's own forward pass, with whatever is on its layers; which models it refuses."""

import pytest
import torch
from torch import nn
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.functional import pad_left
from lit_rlhf.generation import CachedGenerator, llama_decoder
from lit_rlhf.generation.kv_cache import StaticCacheDecoder
from lit_rlhf.generation.llama_decoder import (
    LlamaDecoder,
    PrepackedGatedMLP,
    _round_up,
    fast_decode_unsupported_reason,
    prepack_linear,
)
from lit_rlhf.generation.sampling import SamplingParams, sampling_uniforms
from lit_rlhf.models.loading_config import LoRA
from lit_rlhf.models.lora import add_lora

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def make_gqa_model(**settings: object) -> LlamaForCausalLM:
    """Return a model of six query heads, three per key-value head, with norms that are not 1."""
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    model = LlamaForCausalLM(LlamaConfig(**size, **heads, **settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.mul_(5)
    return model


def assert_equals_forward_pass(model: LlamaForCausalLM, atol: float = 1e-5) -> None:
    ids, mask = pad_left(PROMPTS, 0)
    batch = LlamaDecoder(model).start(ids, mask, 2, 4)
    tokens = torch.randint(2, 30, (6, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = [batch.prefill(), *(batch.step(column) for column in tokens.T)]
        for row in range(6):
            prompt = PROMPTS[row // 2]
            expected = model(torch.tensor([prompt + tokens[row].tolist()])).logits[0, len(prompt) - 1 :]
            logits = torch.stack([step[row] for step in decoded])
            torch.testing.assert_close(
                log_softmax(logits.float(), -1), log_softmax(expected.float(), -1), atol=atol, rtol=0
            )


def test_grouped_query_attention():
    assert_equals_forward_pass(make_gqa_model())


@pytest.mark.parametrize("tokens", [1, 10, 1000])
def test_prefill_in_any_number_of_passes(tokens, monkeypatch):
    monkeypatch.setitem(llama_decoder._PREFILL_TOKENS, "cpu", tokens)
    assert_equals_forward_pass(make_gqa_model())


def test_scaled_rotary_embeddings():
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 100.0}
    assert_equals_forward_pass(make_gqa_model(rope_parameters=scaled, max_position_embeddings=32))


def test_half_precision_rounds_as_the_model_does():
    assert_equals_forward_pass(make_gqa_model().to(torch.bfloat16), atol=0.1)


def test_adapters_and_hooks_on_layers_take_effect():
    model = make_gqa_model()
    add_lora(model, LoRA(rank=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + torch.arange(40) / 10)
    assert_equals_forward_pass(model)


@pytest.mark.parametrize("where", ["projection", "mlp"])
def test_a_hook_within_a_decoder_layer_takes_effect(where):
    model = make_gqa_model()
    layer = model.model.layers[1]
    module = layer.self_attn.k_proj if where == "projection" else layer.mlp
    module.register_forward_hook(lambda module, inputs, output: output * 2)
    assert_equals_forward_pass(model)


needs_bfloat16 = pytest.mark.skipif(
    not llama_decoder.can_prepack(torch.bfloat16), reason="this processor has no products in bfloat16"
)


def test_autocast_takes_effect():
    with torch.autocast("cpu", torch.bfloat16):
        assert_equals_forward_pass(make_gqa_model(), atol=0.1)
        decoder = LlamaDecoder(make_gqa_model())
    expected = torch.bfloat16 if llama_decoder.can_prepack(torch.bfloat16) else torch.float32
    assert decoder.decode.layers[0].o_proj.weight.dtype == expected


def test_every_rollout_uses_the_current_weights():
    """And its tensors can be trained on, though they were sampled in inference mode."""
    model, generator = make_gqa_model(), CachedGenerator()
    ids, mask = pad_left([[5, 6, 7], [8, 9, 4]], 0)
    for _ in range(2):
        output = generator.generate(
            model, PromptBatch.from_tokens(ids, mask), SamplingParams(6), sampling_uniforms(2, 6, 0)
        )
        assert not any(tensor.is_inference() for tensor in output)
        logits = model(torch.cat([ids, output.response_ids], 1)).logits[:, 2:-1]
        logprobs = log_softmax(logits, -1).gather(2, output.response_ids[..., None])[..., 0]
        real = output.response_mask
        torch.testing.assert_close(output.logprobs[real], logprobs[real], atol=1e-4, rtol=1e-4)
        (logprobs[real] * output.logprobs[real]).sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.8)


def test_layers_of_other_packages_are_not_called_in_inference_mode():
    """They may prepare their weights in the first pass, and keep them for training."""
    modes: dict[bool, list[bool]] = {True: [], False: []}

    class OtherLinear(nn.Linear):
        """A layer as those of bitsandbytes."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            modes[is_known].append(torch.is_inference_mode_enabled())
            assert not torch.is_grad_enabled()
            return super().forward(x)

    for is_known in (True, False):
        model = make_gqa_model()
        OtherLinear.__module__ = "peft.layers" if is_known else "bitsandbytes.layers"
        model.model.layers[0].mlp.down_proj.__class__ = OtherLinear
        ids, mask = pad_left(PROMPTS, 0)
        CachedGenerator().generate(
            model, PromptBatch.from_tokens(ids, mask), SamplingParams(4), sampling_uniforms(3, 4, 0)
        )
    assert all(modes[True]) and modes[True] and modes[False] and not any(modes[False])


def test_batch_sizes_are_rounded_up_to_few():
    """oneDNN generates code for each, half a megabyte per product."""
    rounded = [_round_up(rows) for rows in range(1, 257)]
    assert all(0 <= size - rows < max(4, rows / 8) for rows, size in enumerate(rounded, 1))
    assert len(set(rounded)) <= 32


@pytest.mark.parametrize("what", ["attention", "rotary embedding", "hook", "class"])
def test_unsupported_models_use_their_own_forward_pass(what):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0, "original_max_position_embeddings": 8}
    model = make_gqa_model(**{"rope_parameters": dynamic} if what == "rotary embedding" else {})
    assert what == "rotary embedding" or fast_decode_unsupported_reason(model) is None
    if what == "attention":
        model.set_attn_implementation("eager")
    if what == "hook":
        model.model.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)
    if what == "class":
        model.__class__ = type("Sharded", (LlamaForCausalLM,), {})
    assert fast_decode_unsupported_reason(model)
    assert type(CachedGenerator().make_decoder(model, 8)) is StaticCacheDecoder


# ------------------------------------------------------------------------------------------- prepacked linear layers


def make_layers(*outputs: int, inputs: int = 24, bias: bool = False) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(inputs, size, bias=bias) for size in outputs]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, 100])
def test_one_product_equals_the_layers_concatenated(rows, bias):
    layers = make_layers(40, 8, 8, bias=bias)
    x = torch.randn(rows, 1, 24)
    exact = torch.cat(
        [nn.functional.linear(x.double(), *(p.double() for p in each.parameters())) for each in layers], -1
    )
    prepacked = prepack_linear(*layers)
    assert prepacked is not None
    with torch.no_grad():
        torch.testing.assert_close(prepacked(x), exact.float(), atol=1e-6, rtol=1e-5)


def test_prepacked_weights_are_a_copy():
    (layer,) = make_layers(8)
    prepacked, x = prepack_linear(layer), torch.randn(2, 1, 24)
    with torch.no_grad():
        before = layer(x)
        layer.weight.add_(1.0)
        torch.testing.assert_close(prepacked(x), before, atol=1e-6, rtol=1e-5)


def make_hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def make_hooked_layer() -> list[nn.Linear]:
    return [make_hooked(make_layers(8)[0])]


def make_patched_layer() -> list[nn.Linear]:
    (layer,) = make_layers(8)
    layer.forward = lambda x: x  # as accelerate does
    return [layer]


class CustomLinear(nn.Linear):
    """A layer that may compute something else, as quantized ones do."""


UNSUPPORTED_LAYERS = {
    "hook": make_hooked_layer,
    "patched": make_patched_layer,
    "subclass": lambda: [CustomLinear(24, 8, bias=False)],
    "half precision": lambda: [make_layers(8)[0].bfloat16()],
    "some with a bias": lambda: make_layers(8) + make_layers(8, bias=True),
    "not linear": lambda: [*make_layers(8), nn.Identity()],
    "DoRA": lambda: [adapt(make_layers(8)[0], use_dora=True)],
    "adapter with a bias": lambda: [adapt(make_layers(8, bias=True)[0], lora_bias=True)],
    "hook below an adapter": lambda: [adapt(make_hooked_layer()[0])],
    "hook on an adapter": lambda: [make_hooked(adapt(make_layers(8)[0]))],
}


@pytest.mark.parametrize("what", UNSUPPORTED_LAYERS)
def test_unsupported_layers_are_not_prepacked(what):
    assert prepack_linear(*UNSUPPORTED_LAYERS[what]()) is None


def test_a_type_that_the_processor_does_not_multiply_is_left_to_the_layers(monkeypatch):
    monkeypatch.setattr(llama_decoder, "can_prepack", lambda dtype: dtype == torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepack_linear(*make_layers(8)) is None
    assert prepack_linear(*make_layers(8)) is not None


def test_float16_is_not_prepacked():
    assert not llama_decoder.can_prepack(torch.float16)


@needs_bfloat16
@pytest.mark.parametrize("bias", [False, True])
def test_under_autocast_the_product_is_what_autocast_computes(bias):
    layers, x = make_layers(40, 8, bias=bias), torch.randn(5, 1, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prepacked = prepack_linear(*layers)
        expected = torch.cat([layer(x) for layer in layers], -1)
        assert prepacked is not None and prepacked(x).dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(prepacked(x), expected, atol=4e-3, rtol=8e-3)  # one rounding to bfloat16


def adapt(layer: nn.Module, **settings: object) -> nn.Module:
    """Add an adapter that changes the output."""
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(
        LoraConfig(r=2, lora_alpha=3, target_modules=["0"], **settings), nn.Sequential(layer)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model[0]


@pytest.mark.parametrize("active", [True, False])
def test_an_adapter_is_merged_as_far_as_it_is_active(active):
    layers, x = [adapt(layer) for layer in make_layers(40, 8, bias=True)], torch.randn(5, 1, 24)
    for layer in layers:
        layer._disable_adapters = not active
    bases = torch.cat([layer.base_layer(x) for layer in layers], -1)
    prepacked = prepack_linear(*layers)
    assert prepacked is not None
    with torch.no_grad():
        torch.testing.assert_close(prepacked(x), torch.cat([layer(x) for layer in layers], -1), atol=1e-5, rtol=1e-5)
        assert ((prepacked(x) - bases).abs().max() > 0.1) == active


@needs_bfloat16
def test_under_autocast_a_small_update_is_not_rounded_away():
    torch.manual_seed(0)
    layers, x = [*make_layers(40), adapt(make_layers(24)[0]), adapt(make_layers(8)[0])], torch.randn(5, 1, 24)
    for layer in layers:
        for name, parameter in layer.named_parameters():
            # weights of bfloat16, and an update of a tenth of the step between two of them
            parameter.data = parameter.data * 1e-3 if "lora_B" in name else parameter.data.bfloat16().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        prepacked = prepack_linear(*layers)
        expected = torch.cat([layer(x) for layer in layers], -1)
        assert prepacked is not None and prepacked.low_rank is not None
        torch.testing.assert_close(prepacked(x), expected, atol=8e-3, rtol=8e-3)
    down, up = (each.float() for each in prepacked.low_rank)
    updates = torch.cat([torch.zeros(40, 24), *(layer.get_delta_weight("default") for layer in layers[1:])])
    assert 0 < updates[40:].abs().max() < 1e-3
    torch.testing.assert_close(up @ down, updates, atol=1e-5, rtol=0.02)


def test_dropout_of_an_adapter_is_merged_in_eval_mode_alone():
    (layer,) = [adapt(layer, lora_dropout=0.5) for layer in make_layers(8)]
    assert prepack_linear(layer.train()) is None
    assert prepack_linear(layer.eval()) is not None


def test_a_prepacked_mlp_equals_the_module():
    torch.manual_seed(0)
    mlp = LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=2))
    prepacked, x = PrepackedGatedMLP.from_module(mlp), torch.randn(5, 1, 24)
    assert prepacked is not None
    with torch.no_grad():
        torch.testing.assert_close(prepacked(x), mlp(x), atol=1e-6, rtol=1e-5)
    mlp.down_proj.register_forward_hook(lambda module, inputs, output: output * 2)
    assert PrepackedGatedMLP.from_module(mlp) is None
    assert PrepackedGatedMLP.from_module(nn.Identity()) is None
