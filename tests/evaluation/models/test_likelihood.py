"""Log-likelihoods against a direct float64 sum, one row at a time; both ways to tokenize."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models.evaluated_model import EvaluatedModel, ModelSpec
from lit_rlhf.evaluation.models.generation import Completion
from lit_rlhf.evaluation.models.likelihood import encode_pairs, iter_loglikelihoods, move_trailing_space
from lit_rlhf.generation.sampling import SamplingParams
from tests.helpers.float64 import ids_apart, logprob

SENTENCES = [
    ("Once upon a time", " there was a little girl."),
    ("", "Lily"),
    ("Tom and Sam were friends.\nThey liked to", " play in the park with a big red ball, and they did so every day."),
    ("The end", "."),
    ("x" * 40, " zebra? Ümläut!"),
]


def test_equals_a_direct_sum_in_float64(evaluated_model, stories) -> None:
    for pair, found in zip(SENTENCES, evaluated_model.compute_loglikelihoods(SENTENCES)):
        expected, tokens = logprob(stories, *pair)
        assert found.logprob == pytest.approx(expected, abs=1e-4, rel=1e-6)
        assert (found.num_tokens, found.num_truncated) == (tokens, 0)
        assert found.per_token == found.logprob / tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox", "opt", "gemma"])
def test_a_shared_context_is_exact_for_every_architecture(model_folders, name) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folders[name], dtype=torch.float64).eval()
    contexts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [11], [4, 4, 4], [5, 6, 7, 8, 9]]
    rests = [[7, 8], [9], [12, 13, 14, 15], [20, 21], [10, 11, 12]]
    found = dict(iter_loglikelihoods(model, list(zip(contexts, rests)), 0))
    for index, (context, rest) in enumerate(zip(contexts, rests)):
        with torch.no_grad():
            table = model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
        expected = sum(float(table[len(context) - 1 + i, token]) for i, token in enumerate(rest))
        assert found[index].logprob == pytest.approx(expected, abs=1e-5)


def test_a_long_context_is_left_truncated_and_counted(evaluated_model, stories) -> None:
    pair = ("Lily saw a cat. " * 120, " The cat was happy.")
    (found,) = evaluated_model.compute_loglikelihoods([pair])
    before, own = ids_apart(stories, *pair)
    assert found.num_truncated == len(before) + len(own) - 512 > 0
    assert found.logprob == pytest.approx(logprob(stories, *pair)[0], abs=1e-4)


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=7), st.integers(1, 60))
def test_neither_order_nor_batch_matters(tiny, sizes, budget) -> None:
    pairs = [(" ".join(f"w{i}" for i in range(a)), " ".join(f"w{i + 3}" for i in range(b))) for a, b in sizes]
    encoded = encode_pairs(tiny.tokenizer, pairs, "apart")
    pad = tiny.tokenizer.pad_token_id
    alone = [dict(iter_loglikelihoods(tiny.model, [each], pad))[0] for each in encoded]
    together = dict(iter_loglikelihoods(tiny.model, encoded, pad, budget))
    for index, found in together.items():
        assert found.logprob == pytest.approx(alone[index].logprob, abs=1e-4)
        assert found[1:] == alone[index][1:]


def test_greedy_continuations_have_the_likeliest_tokens(tiny) -> None:
    context = tiny.tokenizer.encode("w1 w2 w3")
    with torch.no_grad():
        table = tiny.model(torch.tensor([context])).logits[0, -1]
    likeliest, other = int(table.argmax()), int(table.argmin())
    found = dict(iter_loglikelihoods(tiny.model, [(context, [likeliest]), (context, [other])], 0))
    assert (found[0].is_greedy, found[1].is_greedy) == (True, False)


def test_joint_moves_space_and_tokenizes_the_concatenated_text(evaluated_model) -> None:
    assert move_trailing_space("Answer: ", "yes") == ("Answer:", " yes")
    tokenizer = evaluated_model.tokenizer
    pair = ("She was ", "very happy")
    ((context, rest),) = encode_pairs(tokenizer, [pair], "joint")
    assert context == tokenizer("She was")["input_ids"]
    assert context + rest == tokenizer("She was very happy")["input_ids"]
    assert (context, rest) != encode_pairs(tokenizer, [pair], "apart")[0]


def test_a_tokenizer_without_padding_adds_no_token(stories) -> None:
    evaluated_model = EvaluatedModel("stories", ModelSpec(stories), Cache(None))
    assert evaluated_model.tokenizer.pad_token_id == evaluated_model.tokenizer.eos_token_id
    assert evaluated_model.model.get_input_embeddings().num_embeddings == len(evaluated_model.tokenizer) == 512


def test_half_precision_weights_are_summed_in_float32(llama) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    row = [5, 6, 7, 8, 9, 10]
    found = dict(iter_loglikelihoods(model, [(row[:2], row[2:])], 0))[0].logprob
    with torch.no_grad():
        table = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
    assert found == pytest.approx(sum(float(table[i, row[i + 1]]) for i in range(1, 5)), abs=1e-4)


CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


def test_the_bos_token_of_a_chat_template_is_not_doubled(stories, monkeypatch) -> None:
    prompts: list[list[int]] = []

    def record(model, tokenizer, rows, *_):
        prompts.extend(rows)
        return [Completion("", True, 1)] * len(rows)

    monkeypatch.setattr("lit_rlhf.evaluation.models.evaluated_model.generate_completions", record)
    evaluated_model = EvaluatedModel("stories", ModelSpec(stories, template=CHAT), Cache(None))
    evaluated_model.generate([evaluated_model.template.render("Once"), "Once"], SamplingParams(4, 0.0))
    bos = evaluated_model.tokenizer.bos_token_id
    assert [row.count(bos) for row in prompts] == [1, 1] and all(row[0] == bos for row in prompts)


def test_empty_and_too_long_continuations_are_refused(tiny) -> None:
    with pytest.raises(UserError, match="the continuation '' has no tokens"):
        tiny.compute_loglikelihoods([("w1", "")])
    with pytest.raises(UserError, match="does not fit a model of 128 positions"):
        tiny.compute_loglikelihoods([("w1", "w2 " * 130)])


def test_the_cache_knows_model_and_text(llama, model_folders, tmp_path, monkeypatch) -> None:
    pairs = [("w1", "w2"), ("w3", "w4 w5")]
    cache = Cache(tmp_path, progress=False)
    first = EvaluatedModel("one", ModelSpec(llama), cache).compute_loglikelihoods(pairs)
    monkeypatch.setattr(
        "lit_rlhf.evaluation.models.evaluated_model.load_causal_lm", lambda *_: pytest.fail("the model was loaded")
    )
    assert EvaluatedModel("other name", ModelSpec(llama), cache).compute_loglikelihoods(pairs) == first
    for folder, requested in ((model_folders["gpt2"], pairs), (llama, pairs[:1])):
        with pytest.raises(BaseException, match="the model was loaded"):
            EvaluatedModel("one", ModelSpec(folder), cache).compute_loglikelihoods(requested)


def test_tokens_after_a_stop_string_are_not_counted(tiny) -> None:
    sampling = SamplingParams(12, 0.0)
    (whole,) = tiny.generate(["w4 w5"], sampling, stop_strings=())
    words = whole.text.split()
    stop = words[2]
    (stopped,) = tiny.generate(["w4 w5"], sampling, stop_strings=("", stop))
    assert stopped.text.split() == words[: words.index(stop)] and stopped.finished
    assert stopped.num_tokens == words.index(stop) + 1 < whole.num_tokens
