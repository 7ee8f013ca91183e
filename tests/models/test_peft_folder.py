"""PEFT folders: what is written gives the same logits in plain peft, and what peft writes is loaded like any model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.cli import main
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import export_adapter, export_model
from lit_rlhf.models.fingerprint import loaded_model_fingerprint, model_fingerprint
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.peft_folder import find_adapter
from lit_rlhf.models.scalar_model import load_scalar_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
IDS, MASK = pad_right([[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]], 0)
LOADING = ModelLoadingConfig()


def train(model: Any) -> None:
    """Give the trainable weights other values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)


def export_lm(base: str, tokenizer: Any, folder: Path, lora: LoRA | None = None) -> Any:
    """Write the adapter of a language model to a PEFT folder; return the live model."""
    lora = lora or LoRA(rank=2, alpha=8)
    model = load_causal_lm(base, tokenizer, LOADING)
    add_lora(model, lora)
    train(model)
    export_adapter(model, dict(model.named_parameters()), lora, (base, LOADING), tokenizer, folder)
    return model.eval()


def export_scorer(base: str, tokenizer: Any, folder: Path) -> Any:
    """Write the adapter and head of a centered reward model to a PEFT folder; return the live model."""
    lora, model = LoRA(rank=2), load_scalar_model(base, tokenizer, LOADING)
    add_lora(model.model, lora)
    train(model)
    model.center(0.25, 2.0)
    weights = dict(model.model.named_parameters())
    export_adapter(model.model, weights, lora, (base, LOADING), tokenizer, folder)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    output: torch.Tensor = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    return output


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_gives_the_same_logits_in_plain_peft_and_when_it_is_loaded(name, model_folders, tokenizer, tmp_path):
    base = model_folders[name]
    live = logits(export_lm(base, tokenizer, tmp_path))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path))
    assert (live - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits(plain), live, atol=1e-6, rtol=1e-6)
    loaded = load_causal_lm(str(tmp_path), tokenizer, LOADING)
    torch.testing.assert_close(logits(loaded), live, atol=2e-5, rtol=2e-5)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["task_type"]) == (base, "CAUSAL_LM")
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_reward_model_keeps_its_head_and_its_centering_constants(name, model_folders, tokenizer, tmp_path):
    base = model_folders[name]
    live = export_scorer(base, tokenizer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain.config.pad_token_id = tokenizer.pad_token_id
    raw = logits(PeftModel.from_pretrained(plain, str(tmp_path))).squeeze(1)
    torch.testing.assert_close((raw - 0.25) / 2.0, live.score(IDS, MASK), atol=1e-6, rtol=1e-6)
    loaded = load_scalar_model(str(tmp_path), tokenizer, LOADING).eval()
    assert loaded.is_centered and not loaded.head_is_new
    torch.testing.assert_close(loaded.score(IDS, MASK), live.score(IDS, MASK), atol=2e-5, rtol=2e-5)
    with pytest.raises(UserError, match="it scores text and generates none"):
        load_causal_lm(str(tmp_path), tokenizer, LOADING)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2},
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
        {"r": 2, "use_dora": True},
        {"r": 2, "rank_pattern": {"down_proj": 5}, "bias": "none"},
        {"r": 2, "modules_to_save": ["embed_tokens"]},
    ],
)
def test_what_plain_peft_writes_is_loaded(settings, llama, tokenizer, tmp_path):
    """Without tokenizer files: they are the base's."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    settings = {"target_modules": "all-linear", **settings}
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    train(adapted)
    adapted.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), LOADING).get_vocab() == tokenizer.get_vocab()
    loaded = load_causal_lm(str(tmp_path), tokenizer, LOADING)
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=2e-5, rtol=2e-5)
    scorer = load_scalar_model(str(tmp_path), tokenizer, LOADING)  # a critic or a reward model starts from it
    assert scorer.head_is_new
    torch.testing.assert_close(
        scorer.model.model.layers[0].mlp.up_proj.weight, loaded.model.layers[0].mlp.up_proj.weight
    )


def test_an_adapter_on_an_adapter_and_a_new_one_on_both(llama, tokenizer, tmp_path):
    export_lm(llama, tokenizer, tmp_path / "one")
    one = load_causal_lm(str(tmp_path / "one"), tokenizer, LOADING)
    add_lora(one, LoRA(rank=2))
    train(one)
    lora, weights = LoRA(rank=2), dict(one.named_parameters())
    with pytest.raises(UserError, match=r"the base '.*one' is an adapter itself; use 'merged'"):
        export_adapter(one, weights, lora, (str(tmp_path / "one"), LOADING), tokenizer, tmp_path / "two")
    export_model(one, tokenizer, tmp_path / "two")
    torch.testing.assert_close(
        logits(load_causal_lm(str(tmp_path / "two"), tokenizer, LOADING)), logits(one), atol=2e-5, rtol=2e-5
    )


def test_the_row_of_an_added_padding_token_is_the_same_in_every_process(llama, tmp_path):
    """The base's file has none, nor has the adapter's."""
    bare = Path(shutil.copytree(llama, tmp_path / "bare"))
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(bare)
    padded = replace(LOADING, pad_token="<|pad|>")
    rows = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        own = load_tokenizer(str(bare), padded)
        model = load_causal_lm(str(bare), own, padded)
        add_lora(model, LoRA(rank=2))
        assert len(model.get_input_embeddings().weight) == len(own) == 33
        rows.append(model.get_input_embeddings().weight[32].clone())
    torch.manual_seed(0)
    train(model)
    weights = dict(model.named_parameters())
    export_adapter(model, weights, LoRA(rank=2), (str(bare), padded), own, tmp_path / "adapter")
    torch.manual_seed(3)
    loaded = load_causal_lm(str(tmp_path / "adapter"), load_tokenizer(str(tmp_path / "adapter"), LOADING), LOADING)
    rows.append(loaded.get_input_embeddings().weight[32])
    assert all(torch.equal(row, rows[0]) for row in rows) and rows[0].std() > 0
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-5, rtol=2e-5)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_no_adapter_of_their_base_are_refused(llama, model_folders, tokenizer, tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    def refuse(folder: Path, message: str, loading: ModelLoadingConfig = LOADING) -> None:
        with pytest.raises(UserError, match=message):
            load_causal_lm(str(folder), tokenizer, loading)

    export_lm(llama, tokenizer, tmp_path / "good")
    refuse(tmp_path / "good", "cannot be merged into 4-bit weights", replace(LOADING, quantization="nf4"))
    edit(copy("nameless"), base_model_name_or_path=None)
    refuse(tmp_path / "nameless", "names no base; set base_model_name_or_path")
    edit(copy("gone"), base_model_name_or_path=str(tmp_path / "nothing"))
    refuse(tmp_path / "gone", r"gone' is an adapter on '.*nothing', and there is no such folder: put it back")
    edit(copy("prompt"), peft_type="PROMPT_TUNING")
    refuse(tmp_path / "prompt", "is a PROMPT_TUNING adapter, which cannot be merged")
    (copy("text") / "adapter_config.json").write_text("[]")
    refuse(tmp_path / "text", "adapter_config.json of .* is no JSON object")
    (copy("empty") / "adapter_model.safetensors").unlink()
    refuse(tmp_path / "empty", "cannot read the adapter's weights of .*empty")
    edit(copy("other"), base_model_name_or_path=model_folders["gpt_neox"])
    refuse(tmp_path / "other", "other' does not fit its base")
    foreign = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
    for name, change in {
        "fewer": lambda weights: dict(list(weights.items())[1:]),
        "more": lambda weights: weights | {foreign: torch.zeros(2, 32)},
        "wider": lambda weights: {key: torch.cat([w, w]) for key, w in weights.items()},
    }.items():
        file = copy(name) / "adapter_model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})
        refuse(tmp_path / name, f"{name}' does not fit its base .*")
    shutil.copy(Path(llama) / "model.safetensors", copy("both"))
    refuse(tmp_path / "both", "holds an adapter .* beside its weights")


def test_a_fingerprint_is_of_adapter_and_base(llama, tokenizer, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    export_lm(str(base), tokenizer, tmp_path / "adapter")
    folder = str(tmp_path / "adapter")

    def identities() -> tuple[str, str]:
        return model_fingerprint(folder, LOADING), loaded_model_fingerprint(folder, LOADING)

    before = identities()
    assert identities() == before
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert all(now != then for now, then in zip(identities(), before))


def test_a_hub_name_of_an_adapter_is_loaded_from_the_cache(llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name in ("base", "adapter"):
        (tmp_path / f"models--lab--{name}" / "refs").mkdir(parents=True)
        (tmp_path / f"models--lab--{name}" / "refs" / "main").write_text(commit)
    shutil.copytree(llama, tmp_path / "models--lab--base" / "snapshots" / commit)
    folder = tmp_path / "models--lab--adapter" / "snapshots" / commit
    live = export_lm("lab/base", tokenizer, folder)
    loaded = load_causal_lm("lab/adapter", tokenizer, LOADING)
    torch.testing.assert_close(logits(loaded), logits(live), atol=2e-5, rtol=2e-5)
    assert load_tokenizer("lab/adapter", LOADING).get_vocab() == tokenizer.get_vocab()
    assert model_fingerprint("lab/adapter", LOADING) == f"commit {commit} on commit {commit}"


def test_commands_take_a_folder_of_an_adapter(llama, tokenizer, tmp_path, capsys):
    """As they take the merged model."""
    export_model(export_lm(llama, tokenizer, tmp_path / "lm"), tokenizer, tmp_path / "lm-merged")
    export_model(export_scorer(llama, tokenizer, tmp_path / "rm"), tokenizer, tmp_path / "rm-merged")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "w1 w2", "completions": ["w3", "w4 w5"]}) + "\n")
    outputs = []
    for end in ("", "-merged"):
        assert main(["generate", "--model", str(tmp_path / f"lm{end}"), "--prompt", "w1 w2", "--temperature", "0"]) == 0
        text = capsys.readouterr().out
        assert main(["rank", str(rows), "--model", str(tmp_path / f"rm{end}")]) == 0
        outputs.append((text, json.loads(capsys.readouterr().out)["scores"]))
    assert outputs[0][0] == outputs[1][0] and outputs[0][1] == pytest.approx(outputs[1][1], abs=1e-5)


def test_a_grown_embedding_of_plain_peft_is_loaded(llama, tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(llama)
    own.add_tokens(["new"])
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(own), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    train(adapted)
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    own.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path), load_tokenizer(str(tmp_path), LOADING), LOADING)
    assert loaded.get_input_embeddings().num_embeddings == 33
    torch.testing.assert_close(logits(loaded), logits(adapted), atol=2e-5, rtol=2e-5)


def test_the_revision_of_a_base_is_kept_and_a_bias_of_the_head_is_refused(llama, tokenizer, tmp_path):
    lora, model = LoRA(rank=2), load_scalar_model(llama, tokenizer, LOADING)
    add_lora(model.model, lora)
    weights, base = dict(model.model.named_parameters()), (llama, replace(LOADING, revision="v1"))
    export_adapter(model.model, weights, lora, base, tokenizer, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["revision"] == "v1"
    adapter = find_adapter(str(tmp_path / "adapter"), LOADING)
    assert adapter is not None and adapter.base_loading.revision == "v1"
    with pytest.raises(UserError, match="the score head has a bias, for which PEFT folders have no place; merge it"):
        export_adapter(model.model, weights | {"score.bias": torch.ones(1)}, lora, base, tokenizer, tmp_path / "other")
