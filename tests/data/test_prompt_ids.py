"""The same prompt has the same token ids in every command and in every stage, over a zoo of tokenizers."""

import io
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import jinja2
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lit_rlhf.cli import main
from lit_rlhf.commands import generate, rank
from lit_rlhf.data.comparisons import tokenize_rankings
from lit_rlhf.data.demonstrations import tokenize_demonstrations
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.prompt_template import PromptTemplate, find_bos_ids
from lit_rlhf.data.prompts import read_prompts, tokenize_prompts
from lit_rlhf.data.records import Demonstration, PromptRow, Ranking
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.models import evaluated_model
from lit_rlhf.evaluation.models.likelihood import encode_pairs
from lit_rlhf.generation.sampling import SamplingParams
from tests.helpers.small_runs import write_rows

TURN = [{"role": "user", "content": "cat"}]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('needs a\nsystem role') }}{% endif %}" + CHATML
NO_LONE_REPLY = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML
)
BROKEN = "{{ messages | length + 'x' }}"  # TypeError, which is no error of jinja
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
LETTERS = "acgt"
WORDS = ["c", "g", "t", "cat", "tag", "gc", "at", "user", "assistant", "system", "tact"]


class Entry(NamedTuple):
    """One tokenizer, and what a text must begin with."""

    tokenizer: PreTrainedTokenizerFast
    bos: tuple[str, ...] = ()
    refuses: str = ""  # the conversation, with this message


def build(
    model: Any,
    pre: Any = None,
    around: str = "$A",
    template: Any = None,
    add: Any = (),
    names: Any = (),
    configure: Callable[[Tokenizer], None] = lambda backend: None,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer; `around` is what the post-processor writes around a text, "$A"."""
    backend = Tokenizer(model)
    if pre is not None:
        backend.pre_tokenizer = pre
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    if around != "$A":
        tokens = [(name, backend.token_to_id(name)) for name in {*around.split()} - {"$A"}]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=tokens)
    configure(backend)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **dict(names)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.add_tokens(list(add))
    tokenizer.chat_template = template
    return tokenizer


def byte_bpe(**settings: Any) -> PreTrainedTokenizerFast:
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = {**alphabet, "ca": 300, "cat": 301, "Ġt": 302}
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "t")]
    return build(models.BPE(vocab, merges), pre_tokenizers.ByteLevel(add_prefix_space=False), **settings)


def four_letters(**settings: Any) -> PreTrainedTokenizerFast:
    """Only these letters, none of which is the first one tried; all others are lost."""
    vocab = {letter: n for n, letter in enumerate("CGTU")}
    tokenizer = build(models.BPE(vocab, []), **settings)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("c", "C")
    return tokenizer


def word_level(unk: str = "<unk>", **settings: Any) -> PreTrainedTokenizerFast:
    vocab = {word: n for n, word in enumerate([*SPECIAL, *WORDS])}
    return build(models.WordLevel(vocab, unk_token=unk), pre_tokenizers.WhitespaceSplit(), **settings)


def word_piece(**settings: Any) -> PreTrainedTokenizerFast:
    pieces = [*SPECIAL, "[CLS]", "[SEP]", *WORDS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {word: n for n, word in enumerate(pieces)}
    return build(models.WordPiece(vocab, unk_token="<unk>"), pre_tokenizers.Whitespace(), **settings)


def unigram(**settings: Any) -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS), *((letter, -3.0) for letter in [*LETTERS, "▁"])]
    return build(models.Unigram(pieces, 0), pre_tokenizers.Metaspace(prepend_scheme="always"), **settings)


def byte_fallback(**settings: Any) -> PreTrainedTokenizerFast:
    vocab = {f"<0x{n:02X}>": n for n in range(256)} | {"c": 256, "a": 257, "t": 258, "ca": 259}
    return build(models.BPE(vocab, [("c", "a")], byte_fallback=True), **settings)


def truncate_and_pad(backend: Tokenizer) -> None:
    backend.enable_truncation(4)
    backend.enable_padding(length=9)


NAMED = {"rag": CHATML, "tool_use": CHATML}
ZOO: dict[str, Callable[[], Entry]] = {
    "byte BPE": lambda: Entry(byte_bpe()),
    "begins with BOS": lambda: Entry(byte_bpe(around="<s> $A"), ("<s>",)),
    "BOS that the template does not write": lambda: Entry(byte_bpe(around="<s> $A", template=CHATML), ("<s>",)),
    "BOS that the template writes": lambda: Entry(byte_bpe(around="<s> $A", template=WITH_BOS), ("<s>",)),
    "BOS of the template alone": lambda: Entry(byte_bpe(template=WITH_BOS)),
    "EOS appended": lambda: Entry(byte_bpe(around="$A </s>")),
    "BOS and EOS, with a template": lambda: Entry(byte_bpe(around="<s> $A </s>", template=CHATML), ("<s>",)),
    "two tokens before a text": lambda: Entry(byte_bpe(around="<unk> <s> $A"), ("<unk>", "<s>")),
    "wordpiece": lambda: Entry(word_piece(around="[CLS] $A [SEP]"), ("[CLS]",)),
    "wordpiece, with a template": lambda: Entry(word_piece(around="[CLS] $A [SEP]", template=CHATML), ("[CLS]",)),
    "word-level": lambda: Entry(word_level()),
    "unknown is BOS is EOS": lambda: Entry(
        word_level("</s>", around="</s> $A", names={"bos_token": "</s>"}), ("</s>",)
    ),
    "unknown is the EOS that is appended": lambda: Entry(word_level("</s>", around="$A </s>")),
    "unigram": lambda: Entry(unigram(around="<s> $A"), ("<s>",)),
    "unigram, with a template": lambda: Entry(unigram(template=CHATML)),
    "byte fallback": lambda: Entry(byte_fallback(around="<s> $A", template=CHATML), ("<s>",)),
    "four letters, no unknown token": lambda: Entry(four_letters(around="<s> $A"), ("<s>",)),
    "four letters, EOS appended": lambda: Entry(four_letters(around="$A </s>", template=CHATML)),
    "padding that is an ordinary token": lambda: Entry(word_level(names={"pad_token": "cat"}, template=CHATML)),
    "several templates, none named default": lambda: Entry(byte_bpe(template=NAMED), refuses="no default"),
    "several templates, one named default": lambda: Entry(byte_bpe(template={**NAMED, "default": WITH_BOS})),
    "no system role": lambda: Entry(byte_bpe(template=NO_SYSTEM)),
    "needs a system role": lambda: Entry(byte_bpe(template=NEEDS_SYSTEM), refuses="needs a system role"),
    "no lone reply": lambda: Entry(byte_bpe(around="<s> $A", template=NO_LONE_REPLY), ("<s>",)),
    "a template with a bug": lambda: Entry(byte_bpe(template=BROKEN), refuses="unsupported operand"),
    "added tokens that take spaces": lambda: Entry(
        byte_bpe(add=[AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)], around="<s> $A"), ("<s>",)
    ),
    "limits in the file": lambda: Entry(byte_bpe(around="<s> $A", configure=truncate_and_pad), ("<s>",)),
}  # fmt: skip
TEXTS = ["cat tact", "  c gc tag\n", "cat <left> tag <right> c", "<s>cat c", "ccc </s> gc"]
LENGTHS = TruncationPolicy(200, 200)


class Recorder:
    """A model that keeps the ids that it is asked to continue, and says nothing."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.config, self.device, self.head_is_new = type("Config", (), {})(), torch.device("cpu"), False
        self.model = self

    def to(self, device: Any) -> "Recorder":
        return self

    def generate(self, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        assert settings["attention_mask"].all()
        self.prompts += input_ids.tolist()
        return input_ids


@pytest.fixture
def recorder(monkeypatch):
    """Stands for every model of every command, and never loads one."""
    recorder = Recorder()
    monkeypatch.setattr("lit_rlhf.models.loading.max_positions", lambda config: None)
    monkeypatch.setattr("lit_rlhf.models.scalar_model.load_scalar_model", lambda *args: recorder)

    def score_rows(model, rows, *args):
        recorder.prompts += rows
        return torch.zeros(len(rows))

    monkeypatch.setattr("lit_rlhf.models.scoring.score_rows", score_rows)
    monkeypatch.setattr(evaluated_model, "loaded_model_fingerprint", lambda *args: "weights")
    monkeypatch.setattr(evaluated_model, "read_training_reward_models", lambda path: [])

    def generate_completions(model, tokenizer, prompts, *args):
        recorder.prompts += prompts
        return [evaluated_model.Completion("", True, 0) for _ in prompts]

    monkeypatch.setattr(evaluated_model, "generate_completions", generate_completions)
    return recorder


def expected_ids(entry: Entry, prompt: Any) -> list[int]:
    """Return the ids of a prompt from the tokenizer's parts alone: BOS, unless spelled, and the text."""
    text, backend = prompt, entry.tokenizer.backend_tokenizer
    if isinstance(prompt, list):
        template = entry.tokenizer.chat_template
        template = template["default"] if isinstance(template, dict) else template
        environment = jinja2.Environment(keep_trailing_newline=True)
        environment.globals["raise_exception"] = None
        variables = {"messages": prompt, "add_generation_prompt": True, "bos_token": "<s>"}
        text = environment.from_string(template).render(variables)
    backend.no_truncation()
    backend.no_padding()
    ids = backend.encode(text, add_special_tokens=False).ids
    bos = [backend.token_to_id(token) for token in entry.bos]
    return ids if ids[: len(bos)] == bos else bos + ids


def collect_ids(entry: Entry, prompt: Any, recorder: Recorder, path: str, patch: Any) -> dict[str, list[int]]:
    """Return the ids of one prompt by each way that leads to a model."""
    tokenizer, template = entry.tokenizer, PromptTemplate(entry.tokenizer)
    report = DatasetReport(path)

    def records(kind: Any, record_type: Any) -> list[Any]:
        return read_records(read_rows(path), kind, record_type, "auto", report)

    def take() -> list[int]:
        prompts, recorder.prompts = recorder.prompts, []
        return prompts[0]

    (example,) = tokenize_demonstrations(records("demonstration", Demonstration), template, LENGTHS, report)
    (ranking,) = tokenize_rankings(records("ranking", Ranking), template, LENGTHS, report)
    (rollout,) = tokenize_prompts(records("prompt", PromptRow), template, LENGTHS, report)
    (sampled,) = read_prompts(path, "auto", template, LENGTHS)
    found = {
        "training": example.input_ids[: example.loss_mask.index(True)],
        "reward model": ranking.prompt,
        "rollout": rollout.input_ids,
        "best-of-n": sampled.input_ids,
    }
    patch.setattr("lit_rlhf.models.loading.load_tokenizer", lambda *args: tokenizer)
    settings = Namespace(model=["m"], template=None, batch_size=2, aggregation="mean", num_std=1.0)
    rank.rank_groups(rank.read_groups(path), settings)
    scored = take()
    assert scored == [*ranking.prompt, *ranking.completions[0]]
    found["rank"] = scored[: -len(ranking.completions[0])]
    patch.setattr(evaluated_model, "load_evaluation_tokenizer", lambda *args: tokenizer)
    model = evaluated_model.EvaluatedModel("m", evaluated_model.ModelSpec("m"), Cache(None, progress=False))
    model._model = recorder  # type: ignore[assignment]
    rendered = model.template.render(prompt)
    model.generate([rendered], SamplingParams(1, 0.0))
    found["evaluate"] = take()
    found["likelihood"] = encode_pairs(tokenizer, [(rendered, "c")], "apart")[0][0]
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if isinstance(prompt, list) == bool(tokenizer.chat_template):
        patch.setattr(generate, "load_model", lambda name: (recorder, tokenizer))
        assert main(["generate", "--model", "m", "--prompt", text]) == 0
        found["generate"] = take()
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"\ufeff{text}\n".encode())))
        assert main(["generate", "--model", "m"]) == 0
        found["chat"] = take() if "\n" not in text else found["generate"]
        recorder.prompts = []
    return found


@pytest.mark.parametrize("name", ZOO)
def test_a_prompt_has_the_same_ids_everywhere(name, recorder, monkeypatch, tmp_path):
    entry = ZOO[name]()
    assert find_bos_ids(entry.tokenizer) == entry.tokenizer.convert_tokens_to_ids(list(entry.bos))
    for text in TEXTS:
        prompts: list[Any] = [text]
        if entry.tokenizer.chat_template and not entry.refuses:
            prompts.append([{"role": "user", "content": text}])
        for prompt in prompts:
            row = {"prompt": prompt, "completion": "c", "completions": ["c", "cc"], "ranks": [0, 1]}
            path = write_rows(tmp_path / "rows.jsonl", [row])
            found = collect_ids(entry, prompt, recorder, path, monkeypatch)
            assert found == dict.fromkeys(found, expected_ids(entry, prompt))
            assert len(found) >= 7


def test_the_zoo_tells_ways_apart():
    """A wrong way, transformers' own call, differs for many of them."""
    entries = [make() for make in ZOO.values()]
    wrong = [entry.tokenizer(TEXTS[0])["input_ids"] != expected_ids(entry, TEXTS[0]) for entry in entries]
    assert len(entries) >= 20 and sum(wrong) >= 6


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name]().refuses])
def test_a_template_that_refuses_is_one_line_with_the_row(name, recorder, monkeypatch, tmp_path, capsys):
    entry = ZOO[name]()
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": TURN, "completions": ["c", "cc"]}])
    refusal = "the tokenizer's chat template refuses this conversation: "
    with pytest.raises(UserError, match=rf"^rows\.jsonl:1: {refusal}.*{entry.refuses}") as caught:
        read_prompts(path, "auto", PromptTemplate(entry.tokenizer), LENGTHS)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("lit_rlhf.models.loading.load_tokenizer", lambda *args: entry.tokenizer)
    monkeypatch.setattr(generate, "load_model", lambda name: (recorder, entry.tokenizer))
    for args, origin in ((("rank", path), "rows.jsonl:1"), (("generate", "--prompt", "c"), "--prompt")):
        assert main([args[0], "--model", "m", *args[1:]]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith(f"error: {origin}: {refusal}") and entry.refuses in captured.err
    assert recorder.prompts == []


def test_templates_refuse_roles_of_a_row(tmp_path):
    system, user, reply = ({"role": role, "content": "cat"} for role in ("system", "user", "assistant"))
    for template, turns in ((NO_SYSTEM, [system, user]), (NO_LONE_REPLY, [reply, user])):
        tokenizer = byte_bpe(template=template)
        with pytest.raises(UserError, match=r"^rows\.jsonl:7: the tokenizer's chat template refuses this conversation"):
            PromptTemplate(tokenizer).render(turns, {}, "rows.jsonl:7")
    # the end of a turn is also found for a template that needs a system turn
    tokenizer = byte_bpe(template=NEEDS_SYSTEM)
    assert PromptTemplate(tokenizer).end_of_turn == "<|im_end|>"
    # a system turn that a template would leave out is not lost
    template = PromptTemplate(byte_bpe(template=CHATML.replace("in messages", "in messages if m.role != 'system'")))
    with pytest.raises(UserError, match="row 1: the chat template leaves out the first turn, which begins 'cat'"):
        template.render([system, {**user, "content": "tag"}], {}, "row 1")


def test_a_prompt_without_a_token_is_none(recorder, monkeypatch, capsys):
    for around in ("$A", "<s> $A"):
        tokenizer = four_letters(around=around)
        report = DatasetReport("rows.jsonl")
        assert tokenize_prompts([PromptRow("xyz")], PromptTemplate(tokenizer), LENGTHS, report) == []
        assert report.skipped == {"prompt without a token": 1}
        monkeypatch.setattr(generate, "load_model", lambda name, tokenizer=tokenizer: (recorder, tokenizer))
        assert main(["generate", "--model", "m", "--prompt", "xyz"]) == 2
        assert capsys.readouterr().err == "error: --prompt: the prompt has no token of this tokenizer\n"
