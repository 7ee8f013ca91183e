"""The language-modeling loss of a model, against a loop in float64."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.models.lm_loss import causal_lm_loss

B, T = 3, 7


@pytest.fixture
def model(llama):
    return AutoModelForCausalLM.from_pretrained(llama)


def batch():
    """Return ids, targets and attention mask: right-padded rows of 7, 4 and 2 tokens; some tokens are no targets."""
    attention = (torch.arange(T) < torch.tensor([[7], [4], [2]])).long()
    targets = (torch.rand(B, T) < 0.6) & attention.bool()
    targets[:, 0], targets[:, 1], targets[0, -1] = False, True, True
    return torch.randint(2, 30, (B, T)) * attention, targets, attention


def test_equals_a_loop_in_float64(model):
    ids, targets, attention = batch()
    total, count = causal_lm_loss(model, ids, targets, attention)
    expected = []
    for row, row_targets, length in zip(ids, targets, attention.sum(1)):
        logits = model(row[None, :length]).logits[0].double()
        for index in row_targets.nonzero().flatten().tolist():
            predictor = logits[index - 1].tolist()
            expected.append(math.log(math.fsum(map(math.exp, predictor))) - predictor[row[index]])
    assert_close(total.item(), math.fsum(expected), rtol=1e-6, atol=0)
    assert count.item() == len(expected) and total.dtype == torch.float32 and total.shape == count.shape == ()


def test_gradient_equals_that_of_cross_entropy(model):
    ids, targets, attention = batch()
    causal_lm_loss(model, ids, targets, attention)[0].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(ids, attention_mask=attention).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(~targets[:, 1:], -100)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for gradient, parameter in zip(gradients, model.parameters()):
        assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)


def test_only_logits_of_targets_are_computed(model):
    ids, targets, attention = batch()
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: shapes.append(logits.shape))
    causal_lm_loss(model, ids, targets, attention)
    assert shapes == [(1, int(targets.sum()), model.config.vocab_size)]
    model(ids)
    assert shapes[1] == (B, T, model.config.vocab_size), "the hook was not removed"


def test_micro_batches_add_up(model):
    ids, targets, attention = batch()
    total, count = causal_lm_loss(model, ids, targets, attention)
    parts = [causal_lm_loss(model, ids[b : b + 1], targets[b : b + 1], attention[b : b + 1]) for b in range(B)]
    assert_close(torch.stack([part for part, _ in parts]).sum(), total, rtol=1e-6, atol=0)
    assert sum(n for _, n in parts) == count


def test_without_targets_loss_and_gradient_are_0(model):
    ids, targets, attention = batch()
    total, count = causal_lm_loss(model, ids, torch.zeros_like(targets), attention)
    total.backward()
    assert total.item() == 0 and count.item() == 0
    # every weight has one, because ranks reduce all of them
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_the_first_token_cannot_be_a_target(model):
    ids, targets, attention = batch()
    targets[1, 0] = True
    with pytest.raises(AssertionError, match="first token"):
        causal_lm_loss(model, ids, targets, attention)
