"""Compiled blocks: the same loss and gradients, in training alone, with names and rollouts as they were."""

import pytest
import torch

from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that graphs were made for; run by PyTorch itself, for a compiler takes a minute."""
    calls: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append(graph.graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: compile_(function, **how, backend=backend))
    return calls


def loss_of(model: torch.nn.Module, rows: int, width: int) -> torch.Tensor:
    ids = 3 + torch.arange(rows * width).reshape(rows, width) % 25
    mask = torch.ones_like(ids)
    total, count = causal_lm_loss(model, ids, mask.bool() & (torch.arange(width) > 0), mask)
    return total / count


def test_the_training_pass_is_compiled_and_gives_the_same(model_folders, compiled_calls):
    models = []
    for loading in (ModelLoadingConfig(), ModelLoadingConfig(compile=True)):
        models.append(load_causal_lm(model_folders["llama"], load_tokenizer(model_folders["llama"], loading), loading))
    plain, compiled = models
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(loss_of(compiled, 2, 6), loss_of(plain, 2, 6))
    assert not compiled_calls, "rollouts and validation run as they are"
    for model in models:
        loss_of(model, 3, 7).backward()
    assert compiled_calls
    made = len(compiled_calls)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, weight.grad, msg=name)
    loss_of(compiled, 4, 9).backward()
    assert len(compiled_calls) == made, "another shape needs no other code"
