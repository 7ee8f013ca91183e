"""Classifiers of many architectures: each row has the logits that plain transformers gives it alone, in any batch."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.sequence_classifier import (
    BatchClassifier,
    check_sequence_classifier,
    find_label,
    load_sequence_classifier,
    max_tokens,
)
from tests.helpers.reward_models import CLASSIFIERS, TEXTS


def build(name: str, **settings: Any) -> tuple[Any, Any]:
    """Return a classifier with random weights, and its tokenizer."""
    config, tokenizer = CLASSIFIERS[name]()
    torch.manual_seed(0)
    for key, value in settings.items():
        setattr(config, key, value)
    return AutoModelForSequenceClassification.from_config(config).eval(), tokenizer


def alone(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """Return the logits of plain transformers for one text."""
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_row_has_the_logits_that_it_has_alone(name, batch_size):
    model, tokenizer = build(name)
    expected = torch.stack([alone(model, tokenizer, text) for text in TEXTS])
    assert expected[:, 0].std() > 1e-3
    classifier = BatchClassifier(model, tokenizer, batch_size)
    before = model.config.pad_token_id
    for order in (list(range(len(TEXTS))), random.Random(1).sample(range(len(TEXTS)), len(TEXTS))):
        logits = classifier.logits([dict(tokenizer(TEXTS[index])) for index in order])
        torch.testing.assert_close(logits, expected[order], atol=1e-5, rtol=1e-5)
    assert model.config.pad_token_id == before
    assert classifier.one_length_per_batch == (name == "xlnet"), "whose outputs depend on padding in transformers"


@pytest.mark.parametrize("padding", [None, "</s>", "<pad>", "w3"])
def test_a_decoder_reads_the_same_token_whatever_its_padding(padding):
    """No padding, padding equal to the end token, and a word as padding."""
    model, tokenizer = build("llama")
    model.config.pad_token_id = None if padding is None else tokenizer.convert_tokens_to_ids(padding)
    texts = [f"{text} </s>" for text in TEXTS]
    expected = torch.stack([alone(model, tokenizer, text) for text in texts])
    logits = BatchClassifier(model, tokenizer, 64).logits([dict(tokenizer(text)) for text in texts])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_rows_of_different_length_are_computed_apart_if_padding_changes_an_output():
    """As of a model that reads its last column."""
    model, tokenizer = build("llama")
    forward = model.forward

    def last_column(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = model.score(model.model(**inputs).last_hidden_state[:, -1])
        return output

    model.forward = last_column
    expected = torch.stack([alone(model, tokenizer, text) for text in TEXTS])
    classifier = BatchClassifier(model, tokenizer, 64)
    assert classifier.one_length_per_batch
    logits = classifier.logits([dict(tokenizer(text)) for text in TEXTS])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_label_is_chosen_by_name_or_index():
    labels = {0: "HARMLESS", 1: "harmful"}
    assert [find_label(labels, label, "m") for label in ("harmful", "Harmless", 1, "1", 0)] == [1, 0, 1, 1, 0]
    assert find_label({0: "LABEL_0"}, None, "m") == 0
    with pytest.raises(UserError, match=r"label: 'm' has 2 labels \(HARMLESS, harmful\); choose one"):
        find_label(labels, None, "m")
    for label in ("toxic", 2, -1):
        with pytest.raises(UserError, match=rf"'m' has no label '?{label}'?; it has HARMLESS, harmful"):
            find_label(labels, label, "m")


def test_the_longest_row_is_that_of_positions_and_tokenizer():
    model, tokenizer = build("bert")
    assert max_tokens(model, tokenizer) == 64
    tokenizer.model_max_length = 32
    assert max_tokens(model, tokenizer) == 32
    model, tokenizer = build("roberta")
    assert max_tokens(model, tokenizer) == 64 - 2, "RoBERTa counts from behind its padding token, 1"
    row = {"input_ids": [5] * 62}
    assert torch.isfinite(BatchClassifier(model, tokenizer, 1).logits([row])).all()


def test_a_model_without_a_trained_head_is_refused(llama, tmp_path):
    with pytest.raises(UserError, match="is a LlamaForCausalLM, not a sequence classifier"):
        load_sequence_classifier(llama, ModelLoadingConfig())
    with pytest.raises(UserError, match="is a model without a head, not a sequence classifier"):
        check_sequence_classifier(BertConfig(), "m", ModelLoadingConfig())
    model, _ = build("deberta")
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if "classifier" not in k})
    with pytest.raises(UserError, match=r"has no weight 'classifier\.\w+'"):
        load_sequence_classifier(str(tmp_path), ModelLoadingConfig())
