"""Weights that are not the model's, adapters beside them, leftover settings: refused or said by every loader."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig, GPTJConfig

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_causal_lm, load_config, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.pretrained import say_once, split_generation_settings
from lit_rlhf.models.scalar_model import load_scalar_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
LOADERS = [load_causal_lm, load_scalar_model]
IDS = torch.tensor([[5, 6, 7, 8, 1]])
Weights = dict[str, torch.Tensor]
DAMAGE: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "_orig_mod.": (lambda w: {f"_orig_mod.{name}": x for name, x in w.items()}, r"no weight .*it holds _orig_mod\."),
    "module.": (lambda w: {f"module.{name}": x for name, x in w.items()}, r"no weight .*it holds module\."),
    "base_model.model.": (
        lambda w: {f"base_model.model.{name}": x for name, x in w.items()},
        r"no weight .*it holds base_model\.model\.",
    ),
    "a layer less": (lambda w: {name: x for name, x in w.items() if ".1." not in name}, r"no weight '[\w.]+\.1\."),
    "a layer more": (
        lambda w: w | {name.replace(".1.", ".2."): x.clone() for name, x in w.items() if ".1." in name},
        r"no use for \d+ of the weights of .*it holds [\w.]+\.2\.",
    ),
    "a value head": (lambda w: w | {"v_head.summary.weight": torch.zeros(1, 32)}, r"no use for 1 .*v_head\.summary"),
    "another width": (
        lambda w: {name: x[:-1].clone() if ".1." in name else x for name, x in w.items()},
        r"has the shape \[\d+.*by its config.json it has \[\d+",
    ),
}


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> str:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that loading says."""
    said: list[str] = []
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_info", said.append)
    say_once.cache_clear()
    return said


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_of_another_model_are_refused(name, damage, load, device, model_folders, tokenizer, tmp_path):
    """Also where a rank holds no weights (FSDP2 on other ranks than zero)."""
    change, message = DAMAGE[damage]
    folder = edit_weights(Path(shutil.copytree(model_folders[name], tmp_path / "changed")), change)
    with torch.device(device), pytest.raises(UserError, match=message) as refused:
        load(folder, tokenizer, ModelLoadingConfig())
    assert folder in str(refused.value) and "\n" not in str(refused.value)


@given(data=st.data())
def test_every_single_weight_counts(data, model_folders, tokenizer, tmp_path_factory):
    name = data.draw(st.sampled_from(ARCHITECTURES))
    folder = Path(shutil.copytree(model_folders[name], tmp_path_factory.mktemp("one") / "model"))
    lost = data.draw(st.sampled_from(sorted(load_file(folder / "model.safetensors"))))
    edit_weights(folder, lambda weights: {key: x for key, x in weights.items() if key != lost})
    with pytest.raises(UserError, match="no weight") as refused:
        load_causal_lm(str(folder), tokenizer, ModelLoadingConfig())
    tied = {"wte": "lm_head.weight", "embed_tokens": "lm_head.weight"}
    assert lost in str(refused.value) or any(part in lost and head in str(refused.value) for part, head in tied.items())


def test_four_bit_weights_are_checked_as_well(tokenizer, tmp_path):
    from transformers import LlamaConfig

    config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, bos_token_id=1)
    config.num_attention_heads, config.num_key_value_heads = 4, 4
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loading = ModelLoadingConfig(quantization="nf4")
    load_causal_lm(str(tmp_path), tokenizer, loading)
    edit_weights(tmp_path, DAMAGE["a layer less"][0])
    with pytest.raises(UserError, match=r"no weight 'model\.layers\.1\."):
        load_causal_lm(str(tmp_path), tokenizer, loading)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gemma", ["lm_head.weight"]),
    ],
)
def test_tied_heads_and_buffers_of_older_files_are_no_foreign_weights(
    name, extra, load, model_folders, tokenizer, tmp_path
):
    folder = Path(shutil.copytree(model_folders[name], tmp_path / "older"))
    shape = (32, 32) if "lm_head.weight" in extra else (1,)
    edit_weights(folder, lambda weights: weights | {key: torch.zeros(shape) for key in extra})
    load(str(folder), tokenizer, ModelLoadingConfig())


def test_buffers_of_gptj_are_no_foreign_weights(gptj, tokenizer):
    names = ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias")
    edit_weights(Path(gptj), lambda weights: weights | {name: torch.zeros(1) for name in names})
    load_causal_lm(gptj, tokenizer, ModelLoadingConfig())


@pytest.fixture
def gptj(tokenizer, tmp_path) -> str:
    """A tiny GPT-J, which has no sdpa attention in transformers."""
    config = GPTJConfig(vocab_size=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    config.bos_token_id = config.eos_token_id = 1
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gptj")
    tokenizer.save_pretrained(tmp_path / "gptj")
    return str(tmp_path / "gptj")


def test_an_architecture_without_sdpa_is_loaded_with_eager_attention_and_it_is_said(gptj, llama, tokenizer, lines):
    assert load_causal_lm(gptj, tokenizer, ModelLoadingConfig()).config._attn_implementation == "eager"
    assert lines == ["model: gptj has no sdpa attention in transformers; its eager attention is used, slower"]
    assert load_causal_lm(llama, tokenizer, ModelLoadingConfig()).config._attn_implementation == "sdpa"
    assert len(lines) == 1
    with pytest.raises(UserError, match="does not support an attention implementation"):
        load_causal_lm(gptj, tokenizer, ModelLoadingConfig(attn_implementation="sdpa"))


def test_a_damaged_file_is_refused(llama, tokenizer, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "cut"))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"cannot load '{folder}': ") as refused:
        load_causal_lm(str(folder), tokenizer, ModelLoadingConfig())
    assert "hub name" not in str(refused.value), "the folder is there"


@pytest.mark.parametrize(
    "file, text",
    [
        ("tokenizer_config.json", "null"),
        ("tokenizer_config.json", '{"eos_token": 0.5}'),
        ("tokenizer_config.json", '{"pad_token": true}'),
        ("tokenizer.json", "{}"),
        (
            "tokenizer.json",
            '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"w1": []}, "unk_token": "w1"}}',
        ),
        ("config.json", '{"model_type": "llama", "intermediate_size": ""}'),
        ("config.json", "[]"),
        ("config.json", '{"model_type": ["llama"]}'),
    ],
)
def test_a_json_file_of_other_content_is_refused_with_the_folder(file, text, llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=re.escape(f"cannot load '{folder}': ")):
        load_config(str(folder), ModelLoadingConfig())
        load_tokenizer(str(folder), ModelLoadingConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("load", LOADERS)
def test_weights_that_are_no_numbers_are_refused(load, value, llama, tokenizer, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"the weight '[\w.]*layers.1.mlp.up_proj.weight' of '{folder}' holds NaN"):
        load(str(folder), tokenizer, ModelLoadingConfig())


@pytest.mark.parametrize("files", ["safetensors", "shards", "bin", "old bin"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_no_floating_point_type_are_refused(dtype, files, llama, tokenizer, tmp_path):
    """transformers would convert them."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    changed = weights | {"model.norm.weight": weights["model.norm.weight"].to(dtype)}
    for load in LOADERS:
        for content in (weights, changed):
            write_weights(folder, content, files)
            if content is weights:
                load(str(folder), tokenizer, ModelLoadingConfig())
                continue
            with pytest.raises(UserError, match=rf"the weight 'model.norm.weight' of '{folder}' is stored as"):
                load(str(folder), tokenizer, ModelLoadingConfig())


def write_weights(folder: Path, weights: Weights, files: str) -> None:
    """Write them to one file, or to two with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if "bin" in files:
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=files == "bin")
    elif files == "safetensors":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        names = list(weights)
        shards = {"1.safetensors": names[:3], "2.safetensors": names[3:]}
        for file, part in shards.items():
            save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_buffers_of_no_floating_point_type_are_no_weights(dtype, model_folders, tokenizer, tmp_path):
    folder = Path(shutil.copytree(model_folders["gpt2"], tmp_path / "older"))
    mask = torch.ones(1, 1, 4, 4, dtype=dtype)
    for prefix in ("", "transformer."):
        edit_weights(folder, lambda weights: weights | {f"{prefix}h.0.attn.bias": mask})  # noqa: B023
        load_causal_lm(str(folder), tokenizer, ModelLoadingConfig())


def with_adapter(llama: str, tokenizer: Any, folder: Path) -> Path:
    """Write an adapter beside the weights of a model, as peft's `save_pretrained` does."""
    model = load_causal_lm(llama, tokenizer, ModelLoadingConfig())
    add_lora(model, LoRA(rank=2))
    shutil.copytree(llama, folder)
    model.save_pretrained(folder)  # transformers saves the adapter alone
    assert (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file()
    return folder


@pytest.mark.parametrize("load", LOADERS)
def test_an_adapter_beside_the_weights_is_refused(load, llama, tokenizer, tmp_path):
    folder = with_adapter(llama, tokenizer, tmp_path / "both")
    with pytest.raises(UserError, match=r"both' holds an adapter \(adapter_config.json\).*merge it into them first"):
        load(str(folder), tokenizer, ModelLoadingConfig())


@pytest.mark.parametrize("load", LOADERS)
def test_a_hub_name_is_checked_like_a_folder(load, llama, tokenizer, tmp_path, monkeypatch):
    """By a cache of the hub, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = {}
    for name in ("plain", "adapter", "prefixed"):
        cached[name] = tmp_path / f"models--lab--{name}" / "snapshots" / "0123"
        (tmp_path / f"models--lab--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--lab--{name}" / "refs" / "main").write_text("0123")
    shutil.copytree(llama, cached["plain"])
    with_adapter(llama, tokenizer, cached["adapter"])
    edit_weights(Path(shutil.copytree(llama, cached["prefixed"])), DAMAGE["module."][0])
    load("lab/plain", tokenizer, ModelLoadingConfig())
    with pytest.raises(UserError, match="'lab/adapter' holds an adapter"):
        load("lab/adapter", tokenizer, ModelLoadingConfig())
    with pytest.raises(UserError, match=r"'lab/prefixed' has no weight .*it holds module\."):
        load("lab/prefixed", tokenizer, ModelLoadingConfig())
    with pytest.raises(UserError, match="neither a folder here nor a reachable hub name"):
        load("lab/nothing", tokenizer, ModelLoadingConfig())


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "gptq", "fp8"])
@pytest.mark.parametrize("load", LOADERS)
def test_a_leftover_quantization_is_ignored_and_said(load, method, llama, tokenizer, tmp_path, lines):
    """With it transformers would quantize full weights by bitsandbytes."""
    folder = Path(shutil.copytree(llama, tmp_path / "leftover"))
    leftover = {"quant_method": method, "bits": 4} | ({"load_in_4bit": True} if method == "bitsandbytes" else {})
    edit_json(folder / "config.json", quantization_config=leftover)
    loaded, plain = (load(str(path), tokenizer, ModelLoadingConfig()) for path in (folder, llama))
    assert lines == [
        f"model: config.json of '{folder}' names a quantization by {method}, ignored: its weights are in full"
    ]
    for (name, weight), (_, expected) in zip(loaded.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(weight, expected), name
    edit_weights(folder, DAMAGE["another width"][0])
    with pytest.raises(UserError, match=f"config.json names weights quantized by {method}: save it in full precision"):
        load(str(folder), tokenizer, ModelLoadingConfig())


# ------------------------------------------------------------------------------------------- generation_config.json


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "do_sample": st.booleans(),
        "temperature": st.sampled_from([0.0, 0.6, 1.0]),
        "top_p": st.sampled_from([0.9, 1.0]),
        "top_k": st.sampled_from([20, 50]),
        "num_beams": st.sampled_from([1, 4]),
        "early_stopping": st.booleans(),
        "length_penalty": st.sampled_from([1.0, 2.0]),
        "num_return_sequences": st.sampled_from([1, 3]),
        "eos_token_id": st.sampled_from([1, [1, 3]]),
        "max_new_tokens": st.sampled_from([0, 64]),
        "cache_implementation": st.sampled_from(["static", "nonsense"]),
    },
)


@given(stored=SETTINGS)
def test_what_can_be_saved_together_is_kept_and_no_more_is_left_out(stored):
    def can_be_saved(settings: dict[str, Any]) -> bool:
        try:
            GenerationConfig(**settings).validate(strict=True)
        except ValueError:
            return False
        return True

    kept, dropped = split_generation_settings(stored)
    assert kept | dropped == stored and not kept.keys() & dropped.keys()
    assert can_be_saved(kept)
    assert not any(can_be_saved({**kept, name: value}) for name, value in dropped.items())
    assert bool(dropped) != can_be_saved(stored)


@pytest.mark.parametrize(
    ("stored", "dropped"),
    [
        ({"do_sample": False, "temperature": 0.0, "eos_token_id": [1, 3]}, "temperature 0.0"),
        ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, "early_stopping True, length_penalty 2.0"),
        ({"do_sample": False, "num_return_sequences": 3}, "num_return_sequences 3"),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_left_out_when_loading(
    stored, dropped, llama, tokenizer, tmp_path, lines
):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps(stored))
    model = load_causal_lm(str(folder), tokenizer, ModelLoadingConfig())
    assert len(lines) == 1 and lines[0].endswith(f"with the other settings: {dropped}") and str(folder) in lines[0]
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == stored.get("eos_token_id", 1)
    assert all(saved[name] == stored[name] for name in stored if name not in dropped and stored[name] not in (1, False))


@pytest.mark.parametrize("text", ["{", "[1]", "not json", ""])
def test_a_generation_config_that_is_no_json_is_refused(text, llama, tokenizer, tmp_path):
    """Transformers would ignore it, and its end tokens with it."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"generation_config.json of .* is no JSON object"):
        load_causal_lm(str(folder), tokenizer, ModelLoadingConfig())


# ------------------------------------------------------------------------------------------------ other architectures


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reward_model_is_no_policy(name, model_folders, tokenizer, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(model_folders[name], num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    with pytest.raises(UserError, match=r"reward' is a \w+ForSequenceClassification: it scores text"):
        load_causal_lm(str(tmp_path / "reward"), tokenizer, ModelLoadingConfig())


def test_encoders_are_no_policies_and_no_reward_models(tokenizer, tmp_path):
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel, T5Config, T5ForConditionalGeneration

    size = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = BertConfig(**size, intermediate_size=64)
    t5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    for model in (BertForMaskedLM(bert), BertLMHeadModel(bert), T5ForConditionalGeneration(t5)):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        with pytest.raises(UserError, match=r"not a causal language model|no causal language model"):
            load_causal_lm(str(folder), tokenizer, ModelLoadingConfig())
        with pytest.raises(UserError, match=r"use a decoder-only one|neither a language model"):
            load_scalar_model(str(folder), tokenizer, ModelLoadingConfig())
    bert.is_decoder = True
    BertLMHeadModel(bert).save_pretrained(tmp_path / "decoder")
    load_causal_lm(str(tmp_path / "decoder"), tokenizer, ModelLoadingConfig())
