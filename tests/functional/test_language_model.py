import math

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.functional import language_model_loss

B, T, V = 3, 5, 7


def batch():
    mask = torch.rand(B, T) < 0.5
    mask[:, 0], mask[0, -1], mask[1, 1] = False, True, True
    return torch.randn(B, T, V), torch.randint(V, (B, T)), mask


def test_equals_a_loop_in_float64():
    logits, ids, mask = batch()
    total, count = language_model_loss(logits, ids, mask)
    expected = []
    for b in range(B):
        for t in range(1, T):
            if mask[b, t]:
                predictor = logits[b, t - 1].double().tolist()
                expected.append(math.log(math.fsum(map(math.exp, predictor))) - predictor[ids[b, t]])
    assert_close(total.item(), math.fsum(expected), rtol=1e-6, atol=0)
    assert count.item() == len(expected) and total.dtype == torch.float32 and total.shape == count.shape == ()


def test_gradient_equals_cross_entropy_and_is_zero_elsewhere():
    logits, ids, mask = batch()
    leaf, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    language_model_loss(leaf, ids, mask)[0].backward()
    targets = ids[:, 1:].masked_fill(~mask[:, 1:], -100)
    torch.nn.functional.cross_entropy(reference[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert_close(leaf.grad.double(), reference.grad, rtol=1e-5, atol=1e-6)
    assert (leaf.grad[:, :-1][~mask[:, 1:]] == 0).all() and (leaf.grad[:, -1] == 0).all()


def test_padding_reaches_neither_value_nor_gradient(poison):
    logits, ids, mask = batch()
    clean, _ = language_model_loss(logits, ids, mask)
    predicts = mask.roll(-1, 1)
    logits = logits.masked_fill(~predicts.unsqueeze(-1), poison).requires_grad_()
    total, _ = language_model_loss(logits, ids, mask)
    total.backward()
    assert torch.equal(total.detach(), clean)
    assert logits.grad.isfinite().all() and (logits.grad[~predicts] == 0).all()


def test_the_cut_into_micro_batches_does_not_matter():
    logits, ids, mask = batch()
    total, count = language_model_loss(logits, ids, mask)
    parts = [language_model_loss(logits[b : b + 1], ids[b : b + 1], mask[b : b + 1]) for b in range(B)]
    assert_close(torch.stack([part for part, _ in parts]).sum(), total, rtol=1e-6, atol=0)
    assert sum(n for _, n in parts) == count


def test_half_precision_is_summed_in_float32():
    _, ids, mask = batch()
    total, count = language_model_loss(torch.zeros(B, T, V, dtype=torch.bfloat16), ids, mask)
    assert_close(total.item(), count.item() * math.log(V), rtol=1e-6, atol=0)


def test_nothing_to_predict_is_zero_with_a_gradient():
    logits, ids, mask = batch()
    total, count = language_model_loss(logits.requires_grad_(), ids, torch.zeros_like(mask))
    total.backward()
    assert total.item() == 0 and count.item() == 0 and not logits.grad.any()


def test_the_first_token_cannot_be_a_target():
    logits, ids, mask = batch()
    mask[1, 0] = True
    with pytest.raises(AssertionError, match="first token"):
        language_model_loss(logits, ids, mask)
