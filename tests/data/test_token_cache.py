"""Blocks cut as a stream and kept on disk: the same as in memory, cut once, never half, and no obstacle to a run."""

import gzip
import json
import multiprocessing
import os
import re
import resource
import signal
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_rlhf.data import PretrainingDataModule, TextRow, document_stream, load_text_blocks
from lit_rlhf.data.document_stream import MAX_CHARACTERS_PER_CHUNK, MAX_DOCUMENTS_PER_CHUNK, TextSource
from lit_rlhf.data.loader import epoch_permutation
from lit_rlhf.data.preprocessing.splits import split_by_key
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.token_cache import load_blocks, tokenizer_fingerprint
from lit_rlhf.errors import UserError

DOCUMENTS = ["one", "two\nlines", "ü\u2028\x0b", "", " ", "a longer document of several words", "x", " lead and trail "]
WORLD = [f"document {number} of many" for number in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "lit_rlhf_blocks"


@pytest.fixture
def tokenized(monkeypatch):
    """The documents that were tokenized."""
    texts = []
    original = PreTrainedTokenizerFast.__call__

    def record(self, given, *args, **settings):
        texts.extend(given if isinstance(given, list) else [])
        return original(self, given, *args, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", record)
    return texts


def save(path, content):
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return str(path)


def json_lines(documents):
    return "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in documents)


def in_memory(documents, tokenizer, seq_len):
    """Blocks by the rule, one document after the other."""
    stream = [token for each in documents for token in [*tokenizer(each)["input_ids"], tokenizer.eos_token_id]]
    whole = len(stream) // seq_len * seq_len
    return torch.tensor(stream[:whole], dtype=torch.int32).view(-1, seq_len)


def same(blocks, expected):
    assert blocks.dtype == torch.int32 and blocks.tolist() == expected.tolist()
    return True


@pytest.mark.parametrize("at_once", [1, 3, 1000])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("seq_len", [2, 7])
def test_blocks_are_those_of_a_cut_in_memory(tmp_path, monkeypatch, make_tokenizer, at_once, bos, ending, seq_len):
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", at_once)
    tokenizer = make_tokenizer(bos)
    lines = "\ufeff\n" + json_lines(DOCUMENTS).replace("\n", "\r\n\n", 2).rstrip("\n")
    path = save(tmp_path / f"t.jsonl{ending}", lines)
    kept = [each for each in DOCUMENTS if each.strip()]
    assert same(load_text_blocks(path, tokenizer, seq_len).blocks, in_memory(kept, tokenizer, seq_len))

    written = "\n\n \r\none\r\n  two \r\n\t\n\n\nth\rree\r\r\n\nx"
    path = save(tmp_path / f"t.txt{ending}", written)
    kept = ["one\n  two ", "th\rree\r", "x"]
    assert same(load_text_blocks(path, tokenizer, seq_len).blocks, in_memory(kept, tokenizer, seq_len))


def test_few_characters_at_once_change_nothing(tmp_path, monkeypatch, tokenizer, tokenized):
    monkeypatch.setattr(document_stream, "MAX_CHARACTERS_PER_CHUNK", 25)
    blocks = load_text_blocks(save(tmp_path / "t.jsonl", json_lines(WORLD)), tokenizer, 8).blocks
    assert same(blocks, in_memory(WORLD, tokenizer, 8))


@pytest.mark.parametrize("shuffle", [False, True])
def test_held_out_and_shuffled_documents_are_those_of_before(tmp_path, attach, tokenizer, shuffle):
    documents = [*WORLD, *WORLD[:10]]
    path = save(tmp_path / "t.jsonl", json_lines(documents))
    settings = {"validation_fraction": 0.3, "seq_len": 8, "shuffle_documents": shuffle, "seed": 5}
    data = attach(PretrainingDataModule(path, micro_batch_size=1, **settings))
    parts = split_by_key(documents, lambda each: each, 0.3, 5, DatasetReport(path))
    for rows, part in zip((data.training_rows, data.validation_rows), parts):
        order = epoch_permutation(len(part), 5, 0) if shuffle else range(len(part))
        assert same(rows.blocks, in_memory([part[place] for place in order], tokenizer, 8))
    assert len(set(parts[1])) == 12 and not set(parts[0]) & set(parts[1])


class Tracked(str):
    """A document that knows how many of them are in memory."""

    alive = most = 0

    def __new__(cls, value):
        made = super().__new__(cls, value)
        Tracked.alive += 1
        Tracked.most = max(Tracked.most, Tracked.alive)
        weakref.finalize(made, Tracked.forget)
        return made

    @classmethod
    def forget(cls):
        cls.alive -= 1


def test_few_documents_are_in_memory_at_once(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(sys, "path", list(sys.path))
    tracking = SimpleNamespace(read=lambda fields: TextRow(Tracked(fields["text"])))
    monkeypatch.setitem(sys.modules, "tracking", tracking)
    path = save(tmp_path / "t.jsonl", json_lines(str(number) for number in range(9 * MAX_DOCUMENTS_PER_CHUNK)))
    Tracked.most = 0
    load_blocks(TextSource(path, 8, "tracking.read", validation_fraction=0.1), tokenizer)
    assert (
        MAX_DOCUMENTS_PER_CHUNK < Tracked.most <= 2 * MAX_DOCUMENTS_PER_CHUNK + 2
    )  # one list is tokenized as the next is read

    long = "x" * (MAX_CHARACTERS_PER_CHUNK // 10)
    path = save(tmp_path / "long.jsonl", json_lines([long] * 40))
    Tracked.most = 0
    load_blocks(TextSource(path, 8, "tracking.read"), tokenizer)
    assert Tracked.most <= 22


def table_of(path, tokenizer, **settings):
    """The report, and the line on where the blocks are by itself."""
    _, report = load_blocks(TextSource(path, **{"seq_len": 8, **settings}), tokenizer)
    *table, place = report.format_table().split("\n")
    return table, place


def test_a_second_run_tokenises_nothing_and_reports_the_same(tmp_path, tokenizer, tokenized, cache):
    path = save(tmp_path / "t.jsonl", json_lines([*WORLD, "", "last"]))
    table, place = table_of(path, tokenizer)
    assert len(tokenized) == 41
    (entry,) = [each for each in cache.iterdir() if each.suffix != ".lock"]
    assert place == f"blocks kept for later runs in {entry}"
    first = load_text_blocks(path, tokenizer, 8).blocks
    again, place = table_of(path, tokenizer)
    assert len(tokenized) == 41 and again == table and place == f"blocks reused from {entry}"
    assert same(first, in_memory([*WORLD, "last"], tokenizer, 8))
    assert same(load_text_blocks(path, tokenizer, 8).blocks, first)
    assert [line.split() for line in table[1:4]] == [
        ["rows", "read", "42"],
        ["skipped:", "empty", "document", "1", "first:", "t.jsonl:41"],
        ["rows", "kept", "41"],
    ]


def test_a_module_says_what_it_holds_out_also_from_the_cache(tmp_path, attach, caplog, tokenized):
    path = save(tmp_path / "t.jsonl", json_lines(WORLD))
    tables = []
    for _ in range(2):
        caplog.clear()
        data = attach(PretrainingDataModule(path, validation_fraction=0.3, seq_len=8, micro_batch_size=1))
        tables.append(re.sub("blocks (kept for later runs in|reused from)", "", caplog.messages[0]))
    assert tables[0] == tables[1] and len(tokenized) == 40
    last = f"rows held out for validation: {len(data.validation_rows):,}; left: {len(data.training_rows):,}"
    assert tables[0].endswith(last)


def test_a_missing_validation_text_is_said_before_the_other_is_cut(tmp_path, attach, tokenized):
    path = save(tmp_path / "t.jsonl", json_lines(WORLD))
    with pytest.raises(UserError, match=r"no data file '.*/v\.jsonl'"):
        attach(PretrainingDataModule(path, validation_path=str(tmp_path / "v.jsonl"), seq_len=8))
    assert not tokenized
    save(tmp_path / "v.jsonl", json_lines(WORLD[:5]))
    data = attach(PretrainingDataModule(path, validation_path=str(tmp_path / "v.jsonl"), seq_len=8, micro_batch_size=1))
    assert same(data.validation_rows.blocks, in_memory(WORLD[:5], data.tokenizer, 8))


def test_what_changes_the_blocks_is_new_work(tmp_path, tokenizer, make_tokenizer, tokenized, monkeypatch):
    path = save(tmp_path / "t.jsonl", json_lines(WORLD))

    def work(tokenizer=tokenizer, **settings):
        tokenized.clear()
        table_of(path, tokenizer, **settings)
        return len(tokenized)

    assert work() == 40
    assert work(seed=1) == 0  # nothing is drawn
    assert work(seq_len=9) == 40
    assert work(shuffle_documents=True) == work(shuffle_documents=True, seed=1) == 40
    assert work(validation_fraction=0.5) == work(validation_fraction=0.5, seed=1) == 40

    assert work(make_tokenizer(bos=True)) == 40
    other_end = make_tokenizer()
    other_end.eos_token = "<bos>"
    assert work(other_end) == 40
    more = make_tokenizer()
    more.add_tokens(["document"])
    assert work(more) == 40
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves these settings in the backend
    assert work() == 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for head in ("first", "second"):
        (tmp_path / "mine.py").write_text(f"def read(fields):\n    return {{'text': '{head} ' + fields['text']}}\n")
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        assert work(format="mine.read") == 40
        assert work(format="mine.read") == 0

    state = os.stat(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert work() == 40
    save(Path(path), json_lines(WORLD[:-1]))
    assert work() == 39


def test_a_tokenizer_in_python_is_known_by_what_it_saves():
    class Written:
        """As much of a tokenizer without a backend as its identity needs."""

        special_tokens_map = {}
        eos_token_id = 1

        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def __call__(self, text, **settings):
            return {"input_ids": [7]}

        def save_pretrained(self, folder):
            Path(folder, "vocab.json").write_text(json.dumps(self.vocabulary))

    assert (
        tokenizer_fingerprint(Written(["a"]))
        == tokenizer_fingerprint(Written(["a"]))
        != tokenizer_fingerprint(Written("b"))
    )


def test_a_hub_dataset_is_known_by_its_fingerprint(monkeypatch, tokenizer, tokenized):
    import datasets

    tables = iter([WORLD, WORLD, WORLD[:9]])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"text": each} for each in next(tables)])
    )
    assert same(load_text_blocks("org/name", tokenizer, 8).blocks, in_memory(WORLD, tokenizer, 8))
    load_text_blocks("org/name", tokenizer, 8)
    assert len(tokenized) == 40
    assert same(load_text_blocks("org/name", tokenizer, 8).blocks, in_memory(WORLD[:9], tokenizer, 8))


def cut_at_once(path, tokenizer, start, results):
    done = []
    original = PreTrainedTokenizerFast.__call__

    def record(self, given, *args, **settings):
        done.extend(given if isinstance(given, list) else [])
        return original(self, given, *args, **settings)

    PreTrainedTokenizerFast.__call__ = record
    start.wait()
    blocks = load_text_blocks(path, tokenizer, 8).blocks
    results.put((len(done), blocks.tolist()))


def test_processes_that_begin_at_once_cut_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", 1)
    documents = WORLD * 20
    path = save(tmp_path / "t.jsonl", json_lines(documents))
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(3), fork.Queue()
    ranks = [fork.Process(target=cut_at_once, args=(path, tokenizer, start, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(count for count, _ in found) == [0, 0, len(documents)]
    expected = in_memory(documents, tokenizer, 8).tolist()
    assert all(blocks == expected for _, blocks in found)


def test_a_killed_run_leaves_nothing_that_is_used(tmp_path, tokenizer, monkeypatch, cache):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", 1)
    path = save(tmp_path / "t.jsonl", json_lines(WORLD))

    def die():
        calls = []
        original = PreTrainedTokenizerFast.__call__

        def half(self, *args, **settings):
            calls.append(args)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **settings)

        PreTrainedTokenizerFast.__call__ = half
        load_text_blocks(path, tokenizer, 8)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (half,) = cache.glob("*.part")
    assert not list(cache.glob("*/report.json"))
    assert same(load_text_blocks(path, tokenizer, 8).blocks, in_memory(WORLD, tokenizer, 8))
    assert not half.exists() and len([each for each in cache.iterdir() if each.is_dir()]) == 1


def test_bad_text_leaves_nothing(tmp_path, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", 1)
    path = save(tmp_path / "t.jsonl", json_lines(WORLD) + "{\n")
    with pytest.raises(UserError, match=r"t\.jsonl:41: this line does not parse"):
        load_text_blocks(path, tokenizer, 8)
    with pytest.raises(UserError, match="fewer than one block"):
        load_text_blocks(save(tmp_path / "u.jsonl", json_lines("a")), tokenizer, 8)
    assert not [each for each in cache.iterdir() if each.is_dir()]


@pytest.mark.parametrize("damage", ["ids", "report", "no report"])
def test_damaged_blocks_are_cut_again(tmp_path, tokenizer, cache, damage):
    path = save(tmp_path / "t.jsonl", json_lines(WORLD))
    load_text_blocks(path, tokenizer, 8)
    (report,) = cache.glob("*/report.json")
    if damage == "ids":
        os.truncate(report.parent / "0.ids", 40)
    elif damage == "report":
        os.truncate(report, 5)
    else:
        report.unlink()
    assert same(load_text_blocks(path, tokenizer, 8).blocks, in_memory(WORLD, tokenizer, 8))
    assert table_of(path, tokenizer)[1].startswith("blocks reused from")


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_run_works_where_the_cache_cannot_be_written(tmp_path, tokenizer, monkeypatch, fraction):
    path = save(tmp_path / "t.jsonl", json_lines(WORLD))
    expected, first = load_blocks(TextSource(path, 8, validation_fraction=fraction), tokenizer)
    monkeypatch.setenv("HF_DATASETS_CACHE", f"{path}/folder")
    parts, report = load_blocks(TextSource(path, 8, validation_fraction=fraction), tokenizer)
    assert len(parts) == len(expected) and all(map(same, parts, expected))
    *table, line = report.format_table().split("\n")
    assert table == first.format_table().split("\n")[:-1]
    assert re.fullmatch(
        f"blocks kept in memory, and cut again by the next run: {path}/folder/lit_rlhf_blocks cannot be used .*; "
        "set the environment variable HF_DATASETS_CACHE to a folder that can be written",
        line,
    )


def test_a_full_disk_is_left_as_it_was(tmp_path, tokenizer, cache):
    documents = WORLD * 100
    path = save(tmp_path / "t.jsonl", json_lines(documents))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a disk that has room for so many bytes
    try:
        blocks, report = load_blocks(TextSource(path, 8), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(blocks[0], in_memory(documents, tokenizer, 8))
    assert "blocks kept in memory" in report.extra_lines[-1]
    assert not [each for each in cache.iterdir() if each.is_dir()]
