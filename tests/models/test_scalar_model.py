"""The scalar head: reward models from elsewhere, and scores that no padding, batch or precision moves."""

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

ROWS = [[5, 6, 7, 1], [8, 1], [9, 10, 11, 12, 13, 1], [4, 4, 4]]


def test_a_fresh_head_is_drawn_on_the_cpu_whatever_the_default_device():
    expected = init_head(torch.Size((1, 8)), seed=3)
    with torch.device("meta"):  # Lightning configures models under the device of the run
        drawn = init_head(torch.Size((1, 8)), seed=3)
    assert drawn.device.type == "cpu" and torch.equal(drawn, expected)


@pytest.fixture
def foreign(llama, tokenizer, tmp_path) -> Path:
    """A folder as another library's trainer writes it: one label, a head of its own training."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
    nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path / "foreign")
    tokenizer.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def change(folder: Path, **renamed: torch.Tensor | str) -> None:
    """Add tensors to a folder's weights, or move them to another name."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, value in renamed.items():
        name = name.replace("_", ".")
        if isinstance(value, str):
            weights[value] = weights.pop(name)
        else:
            weights[name] = value
    save_file(weights, file, metadata={"format": "pt"})


def raw(model: ScalarModel) -> torch.Tensor:
    ids, mask = pad_right(ROWS, 0)
    return model.eval().score(ids, mask).detach()


def test_a_reward_model_from_elsewhere_keeps_its_head(foreign, tokenizer):
    model = load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())
    assert not model.head_is_new and not model.is_centered
    ids, mask = pad_right(ROWS, 0)
    plain = AutoModelForSequenceClassification.from_pretrained(foreign).eval()
    torch.testing.assert_close(raw(model), plain(ids, attention_mask=mask).logits.squeeze(1), atol=1e-5, rtol=1e-5)


def test_the_bias_of_a_head_is_kept_through_training_and_export(foreign, tokenizer, tmp_path):
    without = raw(load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig()))
    change(foreign, score_bias=torch.tensor([2.5]))
    model = load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())
    torch.testing.assert_close(raw(model), without + 2.5)
    assert type(model.model).__name__ == "LlamaForSequenceClassification"
    export_model(model, tokenizer, tmp_path / "live")
    export_weights(model.model, model.model.state_dict(), None, tokenizer, tmp_path / "checkpoint")
    for folder in ("live", "checkpoint"):
        torch.testing.assert_close(
            raw(load_scalar_model(str(tmp_path / folder), tokenizer, ModelLoadingConfig())), without + 2.5
        )


def test_a_head_of_another_name_is_refused_and_named(foreign, tokenizer):
    change(foreign, score_weight="classifier.weight")
    with pytest.raises(UserError, match=r"no weight 'score.weight' \(it holds classifier.weight\).*named `score`"):
        load_scalar_model(str(foreign), tokenizer, ModelLoadingConfig())


def test_a_weight_that_is_missing_is_not_drawn_at_random(llama, tokenizer, tmp_path):
    shutil.copytree(llama, tmp_path / "torn")
    change(tmp_path / "torn", model_norm_weight="norm")
    with pytest.raises(UserError, match=r"no weight 'model.norm.weight'"):
        load_scalar_model(str(tmp_path / "torn"), tokenizer, ModelLoadingConfig())


@pytest.mark.parametrize("name", ["LlamaForRewardModel", "LlamaRewardModel", "LlamaForTokenClassification"])
def test_an_architecture_with_a_head_of_its_own_gets_no_fresh_one(name, llama, tokenizer, tmp_path):
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
@given(rows=token_rows, side=st.sampled_from([pad_left, pad_right]), more=st.integers(0, 9), junk=st.integers(0, 31))
def test_a_score_is_its_rows_own(name, scorers, rows, side, more, junk):
    """Whatever lies beside it in the batch or in the padding, on either side, also under bfloat16 autocast."""
    model = scorers[name]
    alone = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row)).long()) for row in rows])
    ids, mask = side([*rows, [4] * (max(map(len, rows)) + more)], junk)  # the junk may well be a token that occurs
    batched = model.score(ids, mask)[:-1]
    torch.testing.assert_close(batched, alone, atol=2e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.score(ids, mask)[:-1]
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, alone, atol=0.15, rtol=0.05)


@pytest.fixture(scope="module")
def scorers(model_folders, tokenizer) -> dict[str, ScalarModel]:
    names = ("llama", "gpt2", "qwen2", "gpt_neox")
    return {
        name: load_scalar_model(model_folders[name], tokenizer, ModelLoadingConfig()).eval().requires_grad_(False)
        for name in names
    }
