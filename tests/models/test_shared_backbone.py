"""Several adapters on one base: independent hidden states and gradients."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lit_rlhf.functional import pad_right
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter, adapter_state_dict, add_lora, unique_adapter_name
from lit_rlhf.models.shared_backbone import hidden_states_with_adapter
from lit_rlhf.packing import PackedBatch, pack_batch

ROWS = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]


def two_adapters(path: str, tokenizer: Any, checkpointing: bool = False) -> Any:
    """Load a model with the adapters "default" and "critic", both with random weights."""
    model = load_causal_lm(path, tokenizer, ModelLoadingConfig(gradient_checkpointing=checkpointing))
    add_lora(model, LoRA(rank=2))
    add_lora(model, LoRA(rank=3), "critic")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in ("default", "critic"):
            for weight in adapter_state_dict(model, name).values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def packed_rows(model: PreTrainedModel) -> PackedBatch:
    """Pack the rows; the first token of each is its prompt."""
    ids, mask = pad_right(ROWS, 0)
    return pack_batch(ids, mask, ids.shape[1] - 1, model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_adapters_are_independent_and_switching_freezes_none(name, model_folders, tokenizer):
    model = two_adapters(model_folders[name], tokenizer).eval()
    rows = packed_rows(model)
    policy, critic = (hidden_states_with_adapter(model, each, rows) for each in (None, "critic"))
    with active_adapter(model, None):
        base = hidden_states_with_adapter(model, None, rows)
    differences = [(a - b).abs().max() for a, b in ((policy, critic), (policy, base), (critic, base))]
    assert min(differences) > 1e-2
    torch.testing.assert_close(hidden_states_with_adapter(model, None, rows), policy)
    plain = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    torch.testing.assert_close(hidden_states_with_adapter(plain, None, rows), base)
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, _ in model.named_parameters() if "lora_" in key}
    assert unique_adapter_name(model, "critic") == "critic_2" and unique_adapter_name(model, "reward") == "reward"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["saved", "recomputed"])
def test_both_adapters_get_their_own_gradient_from_one_backward_pass(checkpointing, llama, tokenizer):
    """A block is recomputed after the adapter was switched back, and must use the adapter of its forward pass."""
    joint = two_adapters(llama, tokenizer, checkpointing).train()
    rows = packed_rows(joint)
    critic = hidden_states_with_adapter(joint, "critic", rows)[:, :, 0].sum()
    policy = hidden_states_with_adapter(joint, None, rows)[:, :, 1].sum()
    (policy + 2 * critic).backward()
    separate = two_adapters(llama, tokenizer).train()
    for name, factor, column in ((None, 1, 1), ("critic", 2, 0)):
        (factor * hidden_states_with_adapter(separate, name, rows)[:, :, column].sum()).backward()
    for name in ("default", "critic"):
        expected = adapter_state_dict(separate, name)
        for key, weight in adapter_state_dict(joint, name).items():
            assert weight.grad.abs().max() > 0
            torch.testing.assert_close(weight.grad, expected[key].grad, atol=1e-5, rtol=1e-4)
