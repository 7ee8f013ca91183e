"""The scalar model: imported reward models, new heads, and scores independent of padding, batch and precision."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pad_left, pad_right
from lit_rlhf.models.export import export_model, export_weights
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.scalar_model import ScalarModel, init_head, load_scalar_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"]
ROWS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]]


def test_the_standard_deviation_of_a_new_head_is_one_over_root_d_plus_one(model_folders, tokenizer):
    heads = torch.cat(
        [
            load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig(), seed).model.score.weight
            for seed in range(40)
        ]
    )
    expected = 1 / math.sqrt(33)
    assert abs(heads.std() - expected) < 4 * expected / math.sqrt(2 * heads.numel())
    again = load_scalar_model(model_folders["llama"], tokenizer, ModelLoadingConfig(), 3).model.score.weight
    assert torch.equal(again, heads[3:4])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_depend_on_neither_padding_nor_batch(name, model_folders, tokenizer):
    model = load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()).eval()
    separate = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in ROWS])
    for pad in (pad_left, pad_right):
        ids, mask = pad(ROWS, tokenizer.pad_token_id)
        torch.testing.assert_close(model.score(ids, mask), separate, atol=1e-5, rtol=1e-5)
        junk = torch.where(mask.bool(), ids, 9)  # other ids on padding
        torch.testing.assert_close(model.score(junk, mask), separate, atol=1e-5, rtol=1e-5)


def test_a_new_head_is_drawn_on_the_cpu_whatever_the_default_device():
    expected = init_head(torch.Size((1, 8)), seed=3)
    with torch.device("meta"):  # Lightning configures models under the device of the run
        head = init_head(torch.Size((1, 8)), seed=3)
    assert head.device.type == "cpu" and torch.equal(head, expected)


@pytest.fixture
def foreign(llama, tokenizer, tmp_path) -> Path:
    """Write a folder like another library's trainer: one label and a trained head."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "foreign")
    tokenizer.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def change_weights(folder: Path, **changes: torch.Tensor | str) -> None:
    """Add tensors to a folder's weights, or rename them."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in changes.items():
        name = name.replace("_", ".")
        if isinstance(value, str):
            weights[value] = weights.pop(name)
        else:
            weights[name] = value
    save_file(weights, file, metadata={"format": "pt"})


def score_rows(model: ScalarModel) -> torch.Tensor:
    ids, mask = pad_right(ROWS, 0)
    return model.eval().score(ids, mask).detach()


def test_an_imported_reward_model_keeps_its_head(foreign, tokenizer):
    model = load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())
    assert not model.head_is_new and not model.is_centered
    ids, mask = pad_right(ROWS, 0)
    plain = AutoModelForSequenceClassification.from_pretrained(foreign).eval()
    torch.testing.assert_close(
        score_rows(model), plain(ids, attention_mask=mask).logits.squeeze(1), atol=1e-5, rtol=1e-5
    )


def test_the_bias_of_a_head_is_kept_through_training_and_export(foreign, tokenizer, tmp_path):
    without = score_rows(load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig()))
    change_weights(foreign, score_bias=torch.tensor([2.5]))
    model = load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())
    torch.testing.assert_close(score_rows(model), without + 2.5)
    assert type(model.model).__name__ == "LlamaForSequenceClassification"
    export_model(model, tokenizer, tmp_path / "live")
    export_weights(model.model, model.model.state_dict(), None, tokenizer, tmp_path / "checkpoint")
    for folder in ("live", "checkpoint"):
        torch.testing.assert_close(
            score_rows(load_scalar_model(str(tmp_path / folder), tokenizer, ModelLoadingConfig())), without + 2.5
        )


def test_a_head_of_another_name_is_refused(foreign, tokenizer):
    change_weights(foreign, score_weight="classifier.weight")
    with pytest.raises(UserError, match=r"no weight 'score.weight' \(it holds classifier.weight\).*named `score`"):
        load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())


def test_a_missing_weight_is_refused(llama, tokenizer, tmp_path):
    shutil.copytree(llama, tmp_path / "incomplete")
    change_weights(tmp_path / "incomplete", model_norm_weight="norm")
    with pytest.raises(UserError, match=r"no weight 'model.norm.weight'"):
        load_scalar_model(str(tmp_path / "incomplete"), tokenizer, ModelLoadingConfig())


@pytest.mark.parametrize("name", ["LlamaForRewardModel", "LlamaRewardModel", "LlamaForTokenClassification"])
def test_an_architecture_with_an_unknown_head_is_refused(name, llama, tokenizer, tmp_path):
    shutil.copytree(llama, tmp_path / "own")
    config = AutoConfig.from_pretrained(llama)
    config.architectures = [name]
    config.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match=f"is a {name}"):
        load_scalar_model(str(tmp_path / "own"), tokenizer, ModelLoadingConfig())


def test_more_labels_than_one_are_refused(foreign, tokenizer):
    config = AutoConfig.from_pretrained(foreign, num_labels=3)
    config.save_pretrained(foreign)
    with pytest.raises(UserError, match="3 labels"):
        load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())


token_rows = st.lists(st.lists(st.integers(1, 31), min_size=1, max_size=12), min_size=1, max_size=5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox"])
@given(
    rows=token_rows,
    pad=st.sampled_from([pad_left, pad_right]),
    num_padding=st.integers(0, 9),
    pad_id=st.integers(0, 31),
)
def test_a_score_depends_on_its_row_alone(name, scorers, rows, pad, num_padding, pad_id):
    """Whatever the other rows, the padding and its side, also under bfloat16 autocast."""
    model = scorers[name]
    separate = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row)).long()) for row in rows])
    ids, mask = pad([*rows, [4] * (max(map(len, rows)) + num_padding)], pad_id)  # pad_id may also be a real token
    batched = model.score(ids, mask)[:-1]
    torch.testing.assert_close(batched, separate, atol=2e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.score(ids, mask)[:-1]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, separate, atol=0.15, rtol=0.05)


@pytest.fixture(scope="module")
def scorers(model_folders, tokenizer) -> dict[str, ScalarModel]:
    names = ("llama", "gpt2", "qwen2", "gpt_neox")
    return {
        name: load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()).eval().requires_grad_(False)
        for name in names
    }
