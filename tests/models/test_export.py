"""Exported folders: the same in plain transformers, by every way of export, and never half written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.callbacks import EMA, ExportModel
from lit_rlhf.data import DemonstrationDataModule
from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_right
from lit_rlhf.models.export import check_exportable, export_checkpoint, export_model, write_untied_model
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import LoRA, ModelLoadingConfig
from lit_rlhf.models.lora import add_lora
from lit_rlhf.models.scalar_model import load_scalar_model
from lit_rlhf.models.tokenizer_files import write_tokenizer_files
from lit_rlhf.modules import SFTModule
from lit_rlhf.strategies import FSDP2Strategy
from tests.helpers.ranks import on_ranks
from tests.helpers.small_runs import demonstrations, quiet_trainer, sgd, write_rows

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
ROWS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_policy_gives_the_same_logits_in_plain_transformers(name, model_folders, tokenizer, tmp_path):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig())
    export_model(model, tokenizer, tmp_path)
    ids, mask = pad_right(ROWS, 0)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits, model.eval()(ids, attention_mask=mask).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["gpt2", "gemma", "llama", "gpt_neox"])
def test_an_untied_copy_holds_the_output_layer_and_gives_the_same_logits(
    name, adapter, model_folders, tokenizer, tmp_path
):
    model = load_causal_lm(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    if adapter:
        add_lora(model, LoRA(rank=2, alpha=4))
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data.normal_(0.0, 0.1)
    before = model.config.tie_word_embeddings
    write_untied_model(model, tmp_path)
    assert model.config.tie_word_embeddings == before
    weights = load_file(tmp_path / "model.safetensors")
    assert (
        model.get_output_embeddings().weight.shape
        == weights.get("lm_head.weight", weights.get("embed_out.weight")).shape
    )
    untied = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert untied.config.tie_word_embeddings is False
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(untied(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_reward_model_gives_the_same_scores_in_plain_transformers(name, model_folders, tokenizer, tmp_path):
    model = load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    ids, mask = pad_right(ROWS, tokenizer.pad_token_id)
    raw = model.score(ids, mask)
    model.center(0.25, 2.0)
    export_model(model, tokenizer, tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    torch.testing.assert_close(plain(ids, attention_mask=mask).logits.squeeze(1), raw, atol=1e-5, rtol=1e-5)
    again = load_scalar_model(str(tmp_path), tokenizer, ModelLoadingConfig()).eval()
    assert again.is_centered and not again.head_is_new
    torch.testing.assert_close(again.score(ids, mask), (raw - 0.25) / 2.0, atol=1e-6, rtol=1e-6)


# ----------------------------------------------------------------------------- every way of export, and what it writes


TEMPLATES = {"default": "{{ 'é' }}{{ messages[0]['content'] }}", "tool_use": "{{ tools }}"}
SAMPLING = {"eos_token_id": [1, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def chat(llama, tokenizer, tmp_path) -> Path:
    """A model with two end tokens, sampling settings, two chat templates and words that are not ASCII."""
    folder = Path(shutil.copytree(llama, tmp_path / "chat"))
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    own = AutoTokenizer.from_pretrained(folder)
    own.chat_template = TEMPLATES
    own.save_pretrained(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_bytes(text.replace('"w27"', '"wörd"').encode())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but weights and config.json, which names the dtype it was saved in."""
    found = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.name != "config.json"}


@pytest.mark.parametrize("way", ["full", "lora", "ema", "sharded", "sharded lora"])
def test_every_way_of_export_writes_what_loading_had(way, chat, tmp_path):
    rows, run = write_rows(tmp_path / "rows.jsonl", demonstrations(8)), tmp_path / "run"
    expected = files(export_loaded(chat, tmp_path / "expected"))
    adapter = LoRA(rank=2) if "lora" in way else None
    averaging = [EMA(0.5)] if way == "ema" else []

    def train() -> None:
        kept = ModelCheckpoint(run / "kept", save_last=True)
        settings = {"devices": 2, "strategy": FSDP2Strategy()} if "sharded" in way else {}
        callbacks = [*averaging, ExportModel(), kept]
        trainer = quiet_trainer(run, max_epochs=1, callbacks=callbacks, enable_checkpointing=True, **settings)
        module = SFTModule(str(chat), sgd(0.5), adapter=adapter)
        trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=2))

    on_ranks(train, tmp_path) if "sharded" in way else train()
    export_checkpoint(run / "kept" / "last.ckpt", tmp_path / "by-command")
    export_checkpoint(run / "kept" / "last.ckpt", tmp_path / "current", "current")
    assert (run / "model" / "lineage.json").is_file() and (run / "model" / "README.md").is_file()
    for name in ("lineage.json", "README.md"):
        (run / "model" / name).unlink()
    for folder in (run / "model", tmp_path / "by-command", tmp_path / "current"):
        assert files(folder) == expected
    generation = json.loads(expected["generation_config.json"])
    assert {name: generation[name] for name in SAMPLING} == SAMPLING
    again = AutoTokenizer.from_pretrained(run / "model")
    assert again.chat_template == TEMPLATES and "wörd" in again.get_vocab()


def export_loaded(model: Path, folder: Path) -> Path:
    tokenizer = load_tokenizer(str(model), ModelLoadingConfig())
    export_model(load_causal_lm(str(model), tokenizer, ModelLoadingConfig()), tokenizer, folder)
    return folder


def test_tokenizer_files_are_the_same_bytes_whatever_the_locale(chat, tmp_path):
    """Bytes that are no text as well, as in a sentencepiece model."""
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.save_pretrained(tmp_path / "plain")
    program = (
        "import sys, locale; from pathlib import Path; from transformers import AutoTokenizer;"
        "from lit_rlhf.models.tokenizer_files import read_tokenizer_files, write_tokenizer_files;"
        "assert locale.getpreferredencoding(False) not in ('UTF-8', 'utf-8');"
        "write_tokenizer_files(read_tokenizer_files(AutoTokenizer.from_pretrained(sys.argv[1])), Path(sys.argv[2]))"
    )
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [sys.executable, "-c", program, str(chat), str(tmp_path / "written")]
    subprocess.run(arguments, check=True, env={**os.environ, **ascii_locale})
    assert files(tmp_path / "written") == files(tmp_path / "plain")
    write_tokenizer_files({"spiece.model": b"\x0a\xff\xfe\x80".decode("utf-8", "surrogateescape")}, tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == b"\x0a\xff\xfe\x80"


# ------------------------------------------------------------------------------------------- the folder that is written


def no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["save_quietly", "write_tokenizer_files"])
@pytest.mark.parametrize("earlier", [True, False])
def test_an_export_that_fails_leaves_an_earlier_folder_as_it_was(step, earlier, llama, tmp_path, monkeypatch):
    module, run = SFTModule(llama, sgd(0.5)), tmp_path / "run"
    rows = write_rows(tmp_path / "rows.jsonl", demonstrations(4))
    trainer = quiet_trainer(run, max_epochs=1)
    trainer.fit(module, datamodule=DemonstrationDataModule(rows, micro_batch_size=4))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    if earlier:
        shutil.copytree(llama, run / "model")
        (run / "model" / "notes.md").write_text("mine")
    before = sorted(run.rglob("*")), files(run / "model")
    monkeypatch.setattr(f"lit_rlhf.models.export.{step}", no_space)
    with pytest.raises(UserError, match=r"cannot write to '.*run/model': No space left on device"):
        export_checkpoint(tmp_path / "run.ckpt", run / "model")
    assert (sorted(run.rglob("*")), files(run / "model")) == before
    monkeypatch.undo()
    export_checkpoint(tmp_path / "run.ckpt", run / "model")
    assert (run / "model" / "model.safetensors").is_file() and not list(run.glob(".*"))
    assert (run / "model" / "notes.md").exists() == earlier, "a file that is not of a model is carried over"


def test_an_export_that_cannot_be_renamed_leaves_the_earlier_folder(llama, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    before, rename = files(folder), Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: no_space() if path.suffix == ".part" else rename(path, to))
    with pytest.raises(UserError, match="No space left on device"):
        export_loaded(Path(llama), folder)
    assert files(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_weights_of_an_earlier_export_do_not_stay_beside_the_new_ones(llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    for stale in ("model.safetensors.index.json", "pytorch_model.bin", "adapter_config.json", "chat_template.jinja"):
        (folder / stale).write_text("{}")
    link = tmp_path / "link"
    link.symlink_to(folder)
    export_loaded(Path(llama), link)
    assert link.is_symlink() and sorted(files(folder)) == sorted(files(export_loaded(Path(llama), tmp_path / "new")))


def test_a_folder_that_cannot_be_replaced_is_refused_before_training(llama, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("")
    for name, reason in (("work", "it is there and no model folder"), ("file", "no model"), ("file/x", "Not a dir")):
        with pytest.raises(UserError, match=f"cannot write to '.*{name}': .*{reason}"):
            check_exportable(tmp_path / name)
        with pytest.raises(UserError, match=f"cannot write to '.*{name}': .*{reason}"):
            export_loaded(Path(llama), tmp_path / name)
    with pytest.raises(UserError, match="a mount point"):
        check_exportable(Path("/proc"))
    before = sorted(tmp_path.rglob("*"))
    check_exportable(tmp_path / "new" / "model")
    check_exportable(Path(llama))
    assert before == sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "new")
