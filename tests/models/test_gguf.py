"""GGUF files in llama.cpp's layout, written here from a known model, come back as that model."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.models.gguf import convert_gguf
from tests.helpers.gguf_files import TEMPLATE, VOCABULARY, random_model, write_gguf


def dequantized(model: LlamaForCausalLM, kind: Type) -> LlamaForCausalLM:
    """Replace each matrix by what is left of it after quantization, which goes by blocks of a row."""
    for weight in model.parameters():
        if weight.ndim == 2:
            data = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
            weight.data = torch.from_numpy(data.astype(np.float32))
    return model


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.Q8_0, Type.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_folder_has_the_weights_of_the_file(kind: Type, tied: bool, tmp_path: Path) -> None:
    model = random_model(tied)
    write_gguf(tmp_path / "tiny.gguf", model, kind)
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(loaded.config, "quantization_config")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    ids = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))
    expected = dequantized(model, kind) if kind != Type.F32 else model
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_the_folder_has_the_tokenizer_and_its_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model(True))
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("ABCAB<|end|>").input_ids == [63, 4, 63, 0]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|end|>", "<|pad|>", TEMPLATE)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    changed = {
        "empty": b"",
        "text": b"not a model",
        "cut in its header": content[:200],
        "cut in a tensor": content[:-2_000],
        "another version": content[:4] + b"\x63\0\0\0" + content[8:],
        "another architecture": content.replace(b"llama", b"lemma"),
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize(
    "how", ["empty", "text", "cut in its header", "cut in a tensor", "another version", "another architecture"]
)
def test_a_damaged_file_is_named(how: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_model(True))
    damage(path, how)
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        convert_gguf(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model(True), leave_out="blk.1.ffn_up.weight")
    with pytest.raises(UserError, match=r"missing weight model\.layers\.1\.mlp\.up_proj\.weight"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")


def test_one_of_several_parts_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", random_model(True), parts=3)
    with pytest.raises(UserError, match="one of 3 parts"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
