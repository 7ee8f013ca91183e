"""Loading of causal language models: refusals, padding token, dropout, compiled blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.models.lm_loss import causal_lm_loss
from lit_rlhf.models.loading import check_same_token_ids, load_causal_lm, load_tokenizer
from lit_rlhf.models.loading_config import ModelLoadingConfig
from lit_rlhf.models.lora import fill_added_rows


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


def word_tokenizer(words: list[str], pad: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the positions in `words`; `pad` is added at the end if it is not among them."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=pad, eos_token=words[1])


@given(
    count=st.integers(2, 8),
    extra=st.integers(0, 3),
    pad=st.sampled_from(["<|pad|>", "w3"]),
    other_pad=st.sampled_from(["<|pad|>", "<fill>", "extra0"]),
)
def test_more_tokens_and_another_padding_of_the_other_tokenizer_do_no_harm(count, extra, pad, other_pad):
    """As of GPT-J's tokenizer, which is GPT-2's with 143 more tokens, beside GPT-2's with a padding token."""
    words = [f"w{i}" for i in range(count)]
    policy = word_tokenizer(words, pad)
    other = word_tokenizer([*words, *(f"extra{i}" for i in range(extra))], other_pad)
    check_same_token_ids(policy, other, "reward")


@given(data=st.data(), count=st.integers(3, 8))
def test_a_token_with_another_id_or_none_is_refused_by_name(data, count):
    words = [f"w{i}" for i in range(count)]
    policy = word_tokenizer([*words, "<|pad|>"], "<|pad|>")
    one, two = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2, unique=True))
    swapped = list(words)
    swapped[one], swapped[two] = swapped[two], swapped[one]
    with pytest.raises(UserError, match=f"^reward has .*the token 'w[{one}{two}]' has the id [{one}{two}] in the pol"):
        check_same_token_ids(policy, word_tokenizer([*swapped, "<|pad|>"], "<|pad|>"), "reward")
    with pytest.raises(UserError, match=f"the token 'w{count - 1}' has the id {count - 1} .* and none in its own"):
        check_same_token_ids(policy, word_tokenizer([*words[:-1], "<|pad|>"], "<|pad|>"), "reward")


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


@pytest.mark.parametrize(
    ("name", "last_norm"), [("gpt2", "transformer.ln_f"), ("gpt_neox", "gpt_neox.final_layer_norm")]
)
def test_an_added_padding_token_has_at_most_the_probability_of_one_in_all(name, last_norm, model_folders, tmp_path):
    """Also of a model whose logits are far below 0, at which those of a small random row are."""
    model = AutoModelForCausalLM.from_pretrained(model_folders[name])
    norm, head = model.get_submodule(last_norm), model.get_output_embeddings()
    with torch.no_grad():  # every logit has a summand of -40
        norm.weight[0], norm.bias[0], head.weight[:, 0] = 0.0, 10.0, -4.0
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model_folders[name])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loading = ModelLoadingConfig(pad_token="<|pad|>")
    padded = load_tokenizer(str(tmp_path), loading)
    grown = load_causal_lm(str(tmp_path), padded, loading).eval()
    embedding = grown.get_input_embeddings().weight
    torch.testing.assert_close(embedding[-1], embedding[:-1].mean(0))
    logits = grown(torch.tensor([[5, 6, 7, 1]])).logits[0, -1].detach()
    assert float(logits[:-1].max()) < -10
    assert float(logits.softmax(-1)[padded.pad_token_id]) <= 1 / len(padded) + 1e-6


def test_a_bias_of_the_output_layer_grows_by_its_mean():
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(PhiConfig(**sizes, num_attention_heads=2))
    torch.nn.init.normal_(model.lm_head.bias)
    model.resize_token_embeddings(10, mean_resizing=False)
    fill_added_rows(model, 9)
    torch.testing.assert_close(model.lm_head.bias[9], model.lm_head.bias[:9].mean())
