"""generate, export and quickstart: what the command adds to the functions behind it."""

import io
import os
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

import lit_rlhf.models.export
from lit_rlhf.commands.generate import CHAT_HELP
from lit_rlhf.commands.support import quickstart_pipeline
from lit_rlhf.errors import UserError
from tests.helpers import terminal

WORDS = ["<pad>", "<eos>", "<unk>", "user", "assistant", "red", "green", "blue"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 of random weights over eight words, context 24."""
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=24, n_embd=16, n_layer=1, n_head=2, eos_token_id=1, bos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_seed_fixes_the_response(folder: Path, command) -> None:
    args = ("generate", "--model", str(folder), "--prompt", "red green", "--max-new-tokens", "8", "--temperature", "5")
    first = command(*args, "--seed", "3")
    assert first[0] == 0
    assert first == command(*args, "--seed", "3")
    assert first[1].count("\n") == 1
    assert any(command(*args, "--seed", str(seed))[1] != first[1] for seed in range(4, 8))


def test_greedy_continues_as_the_model_does(folder: Path, command) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer("red green", return_tensors="pt")["input_ids"]
    for _ in range(5):  # one argmax at a time
        following = model(ids).logits[:, -1].argmax(-1, keepdim=True)
        ids = ids.new_tensor([[*ids[0].tolist(), int(following)]])
        if int(following) == 1:
            break
    expected = tokenizer.decode(ids[0, 2:], skip_special_tokens=True).strip()
    args = ("generate", "--model", str(folder), "--prompt", "red green", "--max-new-tokens", "5", "--temperature", "0")
    assert command(*args)[:2] == (0, expected + "\n")


def test_a_chat_answers_every_line_of_a_pipe(folder: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("red\n\nblue\n"))
    args = ("generate", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "0")
    code, stdout, _ = command(*args)
    assert code == 0
    assert len(stdout.splitlines()) == 2
    assert stdout == "".join(command(*args, "--prompt", word)[1] for word in ("red", "blue"))  # no template: no turns


def test_a_chat_template_sees_the_turns_before(folder: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    widths: list[int] = []
    generate = GPT2LMHeadModel.generate

    def record(self, **inputs):
        widths.append(inputs["input_ids"].shape[1])
        return generate(self, **inputs)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", record)
    monkeypatch.setattr(sys, "stdin", io.StringIO("red\nblue\n"))
    code, stdout, _ = command("generate", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "0")
    assert code == 0
    first_answer = len(stdout.splitlines()[0].split())
    assert widths == [3, 3 + first_answer + 3]  # "user red assistant", its answer, "user blue assistant"


def test_a_system_prompt_needs_a_chat_template(folder: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("generate", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "0", "--system", "green")
    code, _, stderr = command(*args, "--prompt", "red")
    assert code == 2 and "has no chat template that would place it" in stderr
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    prompts: list[list[int]] = []
    generate = GPT2LMHeadModel.generate

    def record(self, **inputs):
        prompts.append(inputs["input_ids"][0].tolist())
        return generate(self, **inputs)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", record)
    assert command(*args, "--prompt", "red")[0] == 0
    assert prompts == [[2, WORDS.index("green"), 3, 5, 4]]  # "system" is no word of this tokenizer


def test_a_chat_at_a_terminal(folder: Path, tmp_path: Path, command) -> None:
    """It streams the response that a pipe gets whole, remembers, forgets, and goes on after a line that is refused."""
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    args = ("generate", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "0")
    lines = ("red", "red", "/reset", "red", "/system green", "/what", "red " * 30, "red")
    seen = terminal.record(*args, columns=200, folder=tmp_path, answers="\n".join([*lines, "\x04"]))
    assert seen.code == 0, seen.text
    hint, *answers = [line.lstrip("> ") for line in seen.lines if line.strip("> ")]
    alone, _, forgotten, again, refused, under_system = answers
    assert hint == again == CHAT_HELP
    assert alone == forgotten == command(*args, "--prompt", "red")[1].strip()
    assert under_system == command(*args, "--prompt", "red", "--system", "green")[1].strip()
    assert refused.startswith("error: the prompt has 34 tokens and the model's context holds 24: shorten it (/reset")


def test_what_cannot_answer_is_refused(folder: Path, tmp_path: Path, command) -> None:
    GPT2ForSequenceClassification(GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "rm"
    )
    name = str(tmp_path / "rm")
    assert command("generate", "--model", name, "--prompt", "x")[::2] == (
        2,
        f"error: model: {name!r} is a GPT2ForSequenceClassification: it scores text and generates none; "
        "give a language model\n",
    )
    code, _, stderr = command("generate", "--model", str(tmp_path / "modle"), "--prompt", "x")
    assert (code, len(stderr.splitlines())) == (2, 1)
    code, _, stderr = command("generate", "--model", str(folder), "--prompt", "red " * 24)
    assert (code, stderr) == (2, "error: the prompt has 24 tokens and the model's context holds 24: shorten it\n")
    for wrong in (
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--max-new-tokens", "0"),
    ):
        assert command("generate", "--model", str(folder), "--prompt", "red", *wrong)[0] == 2


def test_text_that_is_no_text_is_one_line(folder: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("generate", "--model", str(folder), "--max-new-tokens", "2", "--temperature", "0")
    code, stdout, stderr = command(*args, "--prompt", "red \udce9")  # a byte that is not UTF-8
    assert (code, stdout) == (2, "") and stderr.startswith("error: --prompt: a text holds \\udce9, half of a surrogate")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"red\nblue \xe9\n")))
    code, stdout, stderr = command(*args)
    assert (code, stdout.count("\n")) == (2, 1)
    assert stderr.startswith("error: stdin:2: not UTF-8 text") and stderr.count("\n") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfred\r\n")))
    assert command(*args) == command(*args, "--prompt", "red")


def test_export_hands_over_its_arguments(tmp_path: Path, command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def export(checkpoint: Path, directory: Path, which: str | None, finish: object, form: str) -> None:
        calls.append((checkpoint, directory, which, form))
        raise UserError("handed over")

    monkeypatch.setattr(lit_rlhf.models.export, "export_checkpoint", export)
    checkpoint = tmp_path / "a.ckpt"
    torch.save({"loops": {}}, checkpoint)
    assert command("export", str(checkpoint), "out") == (2, "", "error: handed over\n")
    assert command("export", str(checkpoint), "out", "--weights=current", "--format=peft")[0] == 2
    assert calls == [(checkpoint, Path("out"), None, "merged"), (checkpoint, Path("out"), "current", "peft")]


def test_quickstart_hands_over_folder_and_seed(command, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Path, int, str]] = []

    def run(out: Path, seed: int, overlays: list[str], scale: quickstart_pipeline.Scale) -> int:
        calls.append((out, seed, scale.name))
        return 0

    monkeypatch.setattr(quickstart_pipeline, "run", run)
    assert command("quickstart")[0] == command("quickstart", "--out", "x", "--seed", "2")[0] == 0
    assert command("quickstart", "--tiny")[0] == command("quickstart", "--tiny", "--out", "y")[0] == 0
    assert calls == [
        (Path("runs/quickstart"), 0, "full"),
        (Path("x"), 2, "full"),
        (Path("runs/tiny"), 0, "tiny"),
        (Path("y"), 0, "tiny"),
    ]
    code, _, stderr = command("quickstart", "--tiny", "--sweep")
    assert (code, stderr) == (2, "error: lit-rlhf quickstart: --tiny and --sweep exclude each other\n")


def test_quickstart_writes_nothing_beside_its_folder(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(quickstart_pipeline, "run", lambda out, seed, overlays, scale: 0)
    monkeypatch.chdir(tmp_path)
    for given, expected in ((None, str(tmp_path / "x" / "cache")), ("mine", "mine")):
        monkeypatch.delenv("HF_DATASETS_CACHE") if given is None else monkeypatch.setenv("HF_DATASETS_CACHE", given)
        assert command("quickstart", "--out", "x")[0] == 0
        assert os.environ["HF_DATASETS_CACHE"] == expected
