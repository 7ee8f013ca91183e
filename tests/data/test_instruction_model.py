"""A model as instruction models are published: padding equals the end token, the template adds a system turn."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lit_rlhf.data.demonstrations import tokenize_demonstrations
from lit_rlhf.data.prompt_template import PromptTemplate
from lit_rlhf.data.records import Demonstration
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from tests.helpers.tiny_models import write_tiny_model

PADDED = ModelLoadingConfig(pad_token="<|endoftext|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model("smollm2", tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder, PADDED)


def test_a_padding_token_of_the_vocabulary_does_not_let_it_grow(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"padding equal to its end token '<\|im_end\|>'"):
        load_tokenizer(folder, ModelLoadingConfig())
    tokenizer = load_tokenizer(folder, PADDED)
    model = load_causal_lm(folder, tokenizer, PADDED)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 2, 259)
    assert model.get_input_embeddings().weight.shape[0] == 259
    assert (model.config.pad_token_id, model.generation_config.pad_token_id, model.config.eos_token_id) == (0, 0, 2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), ModelLoadingConfig()).pad_token_id == 0  # the next stage needs no setting


def test_the_templates_own_system_turn_is_in_the_prompt_unless_the_data_has_one(tokenizer) -> None:
    template = PromptTemplate(tokenizer, "chat")
    text = template.render("Why?")
    assert text.startswith("<|im_start|>system\nYou are") and text.endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert template.render(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?")
    assert "SmolLM" not in template.render(own)


def test_a_demonstration_is_the_generation_prompt_the_reply_and_one_end_token(tokenizer) -> None:
    template, report = PromptTemplate(tokenizer, "chat"), DatasetReport("rows")
    record = Demonstration([{"role": "user", "content": "Why?"}], "Because.")
    (row,) = tokenize_demonstrations([record], template, TruncationPolicy(200, 50), report)
    prompt, reply = template.encode([template.render("Why?")])[0], tokenizer.encode("Because.")
    assert row.input_ids == [*prompt, *reply, tokenizer.eos_token_id]
    assert report.flagged == {}
