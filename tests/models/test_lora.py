"""LoRA adapters on six architectures: a new one changes nothing, a trained one is merged in an export."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import export_model
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import active_adapter, add_lora, has_adapter
from lit_rlhf.models.memory_estimate import build_meta_model
from lit_rlhf.models.scalar_model import load_scalar_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
ROWS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_adapter_changes_nothing_and_a_trained_one_merges_exactly(name, model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig())
    ids, mask = pad_right(ROWS, 0)
    before = model.eval()(ids, attention_mask=mask).logits
    add_lora(model, LoRA(rank=2))
    torch.testing.assert_close(model.eval()(ids, attention_mask=mask).logits, before)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert 0 < sum(p.numel() for p in trainable) < 0.5 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in trainable:
            parameter.normal_(0, 0.1)
    after = model(ids, attention_mask=mask).logits
    assert (after - before).abs().max() > 1e-2
    with active_adapter(model, None):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, before)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, after)
    export_model(model, tokenizer, tmp_path)
    assert has_adapter(model), "the live model keeps its adapter"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits, after, atol=1e-4, rtol=1e-4)


def test_the_score_head_is_trained_with_the_adapter(model_folders, tokenizer):
    model = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig())
    add_lora(model.model, LoRA(rank=2))
    assert model.model.score.weight.requires_grad
    assert not model.model.model.embed_tokens.weight.requires_grad


LINEAR = {
    "llama": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
    "gpt2": "c_attn, c_proj, c_fc",
    "gpt_neox": "query_key_value, dense, dense_h_to_4h, dense_4h_to_h",
}


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize(
    ("name", "targets", "wrong"),
    [
        ("llama", ["query_key_value"], "query_key_value"),
        ("gpt_neox", ["q_proj", "v_proj"], "q_proj"),
        ("llama", ["q_proj", "k_prj", "v-proj"], "k_prj"),
        ("llama", ["embed_tokens", "lm_head"], "embed_tokens"),
        ("llama", ["input_layernorm"], "input_layernorm"),
        ("llama", ["q_proj", "mlp"], "mlp"),
        ("gpt2", ["lm_head"], "lm_head"),
        ("gpt2", ["c_fc", "score"], "score"),
        ("gpt2", [""], ""),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused_by_name(name, targets, wrong, scalar, model_folders):
    config, loading = AutoConfig.from_pretrained(model_folders[name]), ModelLoadingConfig()
    with pytest.raises(UserError, match=f"target_modules: '{wrong}' is no linear layer") as refused:
        build_meta_model(config, loading, LoRA(target_modules=targets), scalar)
    assert str(refused.value).endswith(f"; there are {LINEAR[name]}")


@pytest.mark.parametrize("targets", ["q_proj", "", []])
def test_targets_that_are_no_list_are_refused(targets, llama):
    with pytest.raises(UserError, match=f"target_modules is .*a list of linear layers of the model: {LINEAR['llama']}"):
        build_meta_model(
            AutoConfig.from_pretrained(llama), ModelLoadingConfig(), LoRA(target_modules=targets), scalar=False
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is 0: it must be 1 or more"),
        ({"rank": -4}, "rank is -4"),
        ({"alpha": 0.0}, "alpha is 0.0: it must be over 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0: it must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
    ],
)
def test_numbers_of_an_adapter_out_of_range_are_refused(changes, message, llama):
    with pytest.raises(UserError, match=f"model.adapter.{message}"):
        build_meta_model(AutoConfig.from_pretrained(llama), ModelLoadingConfig(), LoRA(**changes), scalar=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=10)
@given(data=st.data())
def test_every_list_of_linear_layers_is_accepted_and_each_of_them_gets_an_adapter(name, data, model_folders):
    config, loading = AutoConfig.from_pretrained(model_folders[name]), ModelLoadingConfig()
    with_all = build_meta_model(config, loading, LoRA(), scalar=False)
    layers = sorted({key.split(".lora_A")[0] for key, _ in with_all.named_parameters() if ".lora_A" in key})
    names = {layer.rsplit(".", 1)[-1] for layer in layers} | {layer.split(".", 1)[1] for layer in layers}
    targets = data.draw(st.lists(st.sampled_from(sorted(names)), min_size=1, max_size=4))
    model = build_meta_model(config, loading, LoRA(target_modules=targets), scalar=False)
    adapted = {key.split(".lora_A")[0] for key, _ in model.named_parameters() if ".lora_A" in key}
    assert adapted == {layer for layer in layers if any(f".{layer}".endswith(f".{target}") for target in targets)}
    add_lora(model, LoRA(target_modules=targets), "second")  # the layers are the same beneath an adapter
