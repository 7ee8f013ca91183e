"""Loading of causal language models: refusals, padding token, dropout, compiled blocks."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig


def test_only_residual_dropout_is_set(model_folders, tokenizer):
    config = load_causal_lm(model_folders["gpt2"], tokenizer, ModelLoadingConfig(), dropout=0.2).config
    assert (config.resid_pdrop, config.attn_pdrop, config.embd_pdrop) == (0.2, 0.0, 0.0)
    with pytest.raises(UserError, match="llama has no residual dropout"):
        load_causal_lm(model_folders["llama"], tokenizer, ModelLoadingConfig(), dropout=0.2)


def test_padding_must_differ_from_the_end_token(model_folders, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folders["gpt2"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pad_is_eos = AutoTokenizer.from_pretrained(tmp_path)
    pad_is_eos.pad_token = pad_is_eos.eos_token
    pad_is_eos.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"set model\.loading\.pad_token"):
        load_tokenizer(str(tmp_path), ModelLoadingConfig())
    loading = ModelLoadingConfig(pad_token="<|pad|>")
    tokenizer_with_pad = load_tokenizer(str(tmp_path), loading)
    assert tokenizer_with_pad.pad_token_id == len(tokenizer) != tokenizer_with_pad.eos_token_id
    grown = load_causal_lm(str(tmp_path), tokenizer_with_pad, loading)
    assert grown.get_input_embeddings().num_embeddings == len(tokenizer) + 1 == grown.config.vocab_size
    ids = torch.tensor([[5, 6, 7, 1]])
    torch.testing.assert_close(grown.eval()(ids).logits[..., :-1], model.eval()(ids).logits)


def test_a_vocabulary_that_is_too_small_is_refused(model_folders, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
    model.save_pretrained(tmp_path)
    bigger = AutoTokenizer.from_pretrained(model_folders["llama"])
    bigger.add_tokens(["new", "newer"])
    bigger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="34 tokens, but a vocabulary of 32"):
        load_causal_lm(str(tmp_path), load_tokenizer(str(tmp_path), ModelLoadingConfig()), ModelLoadingConfig())


def test_the_error_about_a_missing_folder_suggests_a_similar_name(model_folders):
    with pytest.raises(UserError, match=r"no folder.*did you mean"):
        load_tokenizer(model_folders["llama"] + "x", ModelLoadingConfig())


@pytest.fixture
def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Graphs that were compiled, with a backend that runs them eagerly: a real compiler takes a minute."""
    calls: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        calls.append(graph.graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **options, backend=backend))
    return calls


def mean_loss(model: torch.nn.Module, rows: int, width: int) -> torch.Tensor:
    ids = 3 + torch.arange(rows * width).reshape(rows, width) % 25
    mask = torch.ones_like(ids)
    total, count = causal_lm_loss(model, ids, mask.bool() & (torch.arange(width) > 0), mask)
    return total / count


def test_only_the_forward_pass_with_gradients_is_compiled_and_it_computes_the_same(model_folders, compiled_calls):
    models = []
    for loading in (ModelLoadingConfig(), ModelLoadingConfig(compile=True)):
        models.append(load_causal_lm(model_folders["llama"], load_tokenizer(model_folders["llama"], loading), loading))
    eager, compiled = models
    assert eager.state_dict().keys() == compiled.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(mean_loss(compiled, 2, 6), mean_loss(eager, 2, 6))
    assert not compiled_calls, "rollouts and validation run eagerly"
    for model in models:
        mean_loss(model, 3, 7).backward()
    assert compiled_calls
    num_graphs = len(compiled_calls)
    for name, weight in eager.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name).grad, weight.grad, msg=name)
    mean_loss(compiled, 4, 9).backward()
    assert len(compiled_calls) == num_graphs, "another shape is not compiled again"
