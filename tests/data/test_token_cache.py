"""Blocks built as a stream and cached on disk: equal to those built in memory, built once, never incomplete."""

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
CORPUS = [f"document {number} of many" for number in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    return folder / "lit_rlhf_blocks"


@pytest.fixture
def tokenized(monkeypatch):
    """The documents that were tokenized, in order."""
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
    """Build blocks by definition, one document after the other."""
    stream = [token for each in documents for token in [*tokenizer(each)["input_ids"], tokenizer.eos_token_id]]
    num_tokens = len(stream) // seq_len * seq_len
    return torch.tensor(stream[:num_tokens], dtype=torch.int32).view(-1, seq_len)


def same(blocks, expected):
    assert blocks.dtype == torch.int32 and blocks.tolist() == expected.tolist()
    return True


@pytest.mark.parametrize("max_documents", [1, 3, 1000])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("seq_len", [2, 7])
def test_blocks_are_those_built_in_memory(tmp_path, monkeypatch, make_tokenizer, max_documents, bos, ending, seq_len):
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", max_documents)
    tokenizer = make_tokenizer(bos)
    lines = "\ufeff\n" + json_lines(DOCUMENTS).replace("\n", "\r\n\n", 2).rstrip("\n")
    path = save(tmp_path / f"t.jsonl{ending}", lines)
    kept = [each for each in DOCUMENTS if each.strip()]
    assert same(load_text_blocks(path, tokenizer, seq_len).blocks, in_memory(kept, tokenizer, seq_len))

    written = "\n\n \r\none\r\n  two \r\n\t\n\n\nth\rree\r\r\n\nx"
    path = save(tmp_path / f"t.txt{ending}", written)
    kept = ["one\n  two ", "th\rree\r", "x"]
    assert same(load_text_blocks(path, tokenizer, seq_len).blocks, in_memory(kept, tokenizer, seq_len))


def test_the_chunk_size_changes_nothing(tmp_path, monkeypatch, tokenizer, tokenized):
    monkeypatch.setattr(document_stream, "MAX_CHARACTERS_PER_CHUNK", 25)
    blocks = load_text_blocks(save(tmp_path / "t.jsonl", json_lines(CORPUS)), tokenizer, 8).blocks
    assert same(blocks, in_memory(CORPUS, tokenizer, 8))


@pytest.mark.parametrize("shuffle", [False, True])
def test_held_out_and_shuffled_documents_are_those_of_a_split_in_memory(tmp_path, attach, tokenizer, shuffle):
    documents = [*CORPUS, *CORPUS[:10]]
    path = save(tmp_path / "t.jsonl", json_lines(documents))
    settings = {"validation_fraction": 0.3, "seq_len": 8, "shuffle_documents": shuffle, "seed": 5}
    data = attach(PretrainingDataModule(path, micro_batch_size=1, **settings))
    parts = split_by_key(documents, lambda each: each, 0.3, 5, DatasetReport(path))
    for rows, part in zip((data.training_rows, data.validation_rows), parts):
        order = epoch_permutation(len(part), 5, 0) if shuffle else range(len(part))
        assert same(rows.blocks, in_memory([part[index] for index in order], tokenizer, 8))
    assert len(set(parts[1])) == 12 and not set(parts[0]) & set(parts[1])


class Tracked(str):
    """A document that counts the documents in memory."""

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


def build_table(path, tokenizer, **settings):
    """Return the report's lines, and separately the last one, on the cache entry."""
    _, report = load_blocks(TextSource(path, **{"seq_len": 8, **settings}), tokenizer)
    *table, cache_line = report.format_table().split("\n")
    return table, cache_line


def test_a_second_run_tokenizes_nothing_and_reports_the_same(tmp_path, tokenizer, tokenized, cache):
    path = save(tmp_path / "t.jsonl", json_lines([*CORPUS, "", "last"]))
    table, cache_line = build_table(path, tokenizer)
    assert len(tokenized) == 41
    (entry,) = [each for each in cache.iterdir() if each.suffix != ".lock"]
    assert cache_line == f"blocks kept for later runs in {entry}"
    first = load_text_blocks(path, tokenizer, 8).blocks
    again, cache_line = build_table(path, tokenizer)
    assert len(tokenized) == 41 and again == table and cache_line == f"blocks reused from {entry}"
    assert same(first, in_memory([*CORPUS, "last"], tokenizer, 8))
    assert same(load_text_blocks(path, tokenizer, 8).blocks, first)
    assert [line.split() for line in table[1:4]] == [
        ["rows", "read", "42"],
        ["skipped:", "empty", "document", "1", "first:", "t.jsonl:41"],
        ["rows", "kept", "41"],
    ]


def test_a_module_reports_held_out_rows_also_from_the_cache(tmp_path, attach, caplog, tokenized):
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS))
    tables = []
    for _ in range(2):
        caplog.clear()
        data = attach(PretrainingDataModule(path, validation_fraction=0.3, seq_len=8, micro_batch_size=1))
        tables.append(re.sub("blocks (kept for later runs in|reused from)", "", caplog.messages[0]))
    assert tables[0] == tables[1] and len(tokenized) == 40
    last = f"rows held out for validation: {len(data.validation_rows):,}; left: {len(data.training_rows):,}"
    assert tables[0].endswith(last)


def test_a_missing_validation_text_is_refused_before_the_training_text_is_tokenized(tmp_path, attach, tokenized):
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS))
    with pytest.raises(UserError, match=r"no data file '.*/v\.jsonl'"):
        attach(PretrainingDataModule(path, validation_path=str(tmp_path / "v.jsonl"), seq_len=8))
    assert not tokenized
    save(tmp_path / "v.jsonl", json_lines(CORPUS[:5]))
    data = attach(PretrainingDataModule(path, validation_path=str(tmp_path / "v.jsonl"), seq_len=8, micro_batch_size=1))
    assert same(data.validation_rows.blocks, in_memory(CORPUS[:5], data.tokenizer, 8))


def test_what_changes_the_blocks_is_tokenized_again(tmp_path, tokenizer, make_tokenizer, tokenized, monkeypatch):
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS))

    def num_tokenized(tokenizer=tokenizer, **settings):
        tokenized.clear()
        build_table(path, tokenizer, **settings)
        return len(tokenized)

    assert num_tokenized() == 40
    assert num_tokenized(seed=1) == 0  # no setting uses the seed
    assert num_tokenized(seq_len=9) == 40
    assert num_tokenized(shuffle_documents=True) == num_tokenized(shuffle_documents=True, seed=1) == 40
    assert num_tokenized(validation_fraction=0.5) == num_tokenized(validation_fraction=0.5, seed=1) == 40

    assert num_tokenized(make_tokenizer(bos=True)) == 40
    other_eos = make_tokenizer()
    other_eos.eos_token = "<bos>"
    assert num_tokenized(other_eos) == 40
    larger = make_tokenizer()
    larger.add_tokens(["document"])
    assert num_tokenized(larger) == 40
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves these settings in the backend
    assert num_tokenized() == 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for head in ("first", "second"):
        (tmp_path / "mine.py").write_text(f"def read(fields):\n    return {{'text': '{head} ' + fields['text']}}\n")
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        assert num_tokenized(format="mine.read") == 40
        assert num_tokenized(format="mine.read") == 0

    state = os.stat(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert num_tokenized() == 40
    save(Path(path), json_lines(CORPUS[:-1]))
    assert num_tokenized() == 39


def test_a_python_tokenizer_is_identified_by_the_files_it_saves():
    class PythonTokenizer:
        """The attributes of a tokenizer without a backend that its fingerprint needs."""

        special_tokens_map = {}
        eos_token_id = 1

        def __init__(self, vocabulary):
            self.vocabulary = vocabulary

        def __call__(self, text, **settings):
            return {"input_ids": [7]}

        def save_pretrained(self, folder):
            Path(folder, "vocab.json").write_text(json.dumps(self.vocabulary))

    assert (
        tokenizer_fingerprint(PythonTokenizer(["a"]))
        == tokenizer_fingerprint(PythonTokenizer(["a"]))
        != tokenizer_fingerprint(PythonTokenizer("b"))
    )


def test_a_hub_dataset_is_identified_by_its_fingerprint(monkeypatch, tokenizer, tokenized):
    import datasets

    tables = iter([CORPUS, CORPUS, CORPUS[:9]])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list([{"text": each} for each in next(tables)])
    )
    assert same(load_text_blocks("org/name", tokenizer, 8).blocks, in_memory(CORPUS, tokenizer, 8))
    load_text_blocks("org/name", tokenizer, 8)
    assert len(tokenized) == 40
    assert same(load_text_blocks("org/name", tokenizer, 8).blocks, in_memory(CORPUS[:9], tokenizer, 8))


def load_at_barrier(path, tokenizer, start, results):
    tokenized_texts = []
    original = PreTrainedTokenizerFast.__call__

    def record(self, given, *args, **settings):
        tokenized_texts.extend(given if isinstance(given, list) else [])
        return original(self, given, *args, **settings)

    PreTrainedTokenizerFast.__call__ = record
    start.wait()
    blocks = load_text_blocks(path, tokenizer, 8).blocks
    results.put((len(tokenized_texts), blocks.tolist()))


def test_simultaneous_processes_tokenize_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", 1)
    documents = CORPUS * 20
    path = save(tmp_path / "t.jsonl", json_lines(documents))
    fork = multiprocessing.get_context("fork")
    start, results = fork.Barrier(3), fork.Queue()
    ranks = [fork.Process(target=load_at_barrier, args=(path, tokenizer, start, results)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert sorted(count for count, _ in found) == [0, 0, len(documents)]
    expected = in_memory(documents, tokenizer, 8).tolist()
    assert all(blocks == expected for _, blocks in found)


def test_a_killed_run_leaves_nothing_that_is_read(tmp_path, tokenizer, monkeypatch, cache):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", 1)
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS))

    def die():
        calls = []
        original = PreTrainedTokenizerFast.__call__

        def die_midway(self, *args, **settings):
            calls.append(args)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **settings)

        PreTrainedTokenizerFast.__call__ = die_midway
        load_text_blocks(path, tokenizer, 8)

    child = multiprocessing.get_context("fork").Process(target=die)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (partial,) = cache.glob("*.part")
    assert not list(cache.glob("*/report.json"))
    assert same(load_text_blocks(path, tokenizer, 8).blocks, in_memory(CORPUS, tokenizer, 8))
    assert not partial.exists() and len([each for each in cache.iterdir() if each.is_dir()]) == 1


def test_bad_text_leaves_no_entry(tmp_path, tokenizer, cache, monkeypatch):
    monkeypatch.setattr(document_stream, "MAX_DOCUMENTS_PER_CHUNK", 1)
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS) + "{\n")
    with pytest.raises(UserError, match=r"t\.jsonl:41: this line does not parse"):
        load_text_blocks(path, tokenizer, 8)
    with pytest.raises(UserError, match="fewer than one block"):
        load_text_blocks(save(tmp_path / "u.jsonl", json_lines("a")), tokenizer, 8)
    assert not [each for each in cache.iterdir() if each.is_dir()]


@pytest.mark.parametrize("damage", ["ids", "report", "no report"])
def test_damaged_blocks_are_built_again(tmp_path, tokenizer, cache, damage):
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS))
    load_text_blocks(path, tokenizer, 8)
    (report,) = cache.glob("*/report.json")
    if damage == "ids":
        os.truncate(report.parent / "0.ids", 40)
    elif damage == "report":
        os.truncate(report, 5)
    else:
        report.unlink()
    assert same(load_text_blocks(path, tokenizer, 8).blocks, in_memory(CORPUS, tokenizer, 8))
    assert build_table(path, tokenizer)[1].startswith("blocks reused from")


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_run_works_where_the_cache_cannot_be_written(tmp_path, tokenizer, monkeypatch, fraction):
    path = save(tmp_path / "t.jsonl", json_lines(CORPUS))
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


def test_a_full_disk_gets_no_partial_entry(tmp_path, tokenizer, cache):
    documents = CORPUS * 100
    path = save(tmp_path / "t.jsonl", json_lines(documents))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # like a full disk
    try:
        blocks, report = load_blocks(TextSource(path, 8), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(blocks[0], in_memory(documents, tokenizer, 8))
    assert "blocks kept in memory" in report.extra_lines[-1]
    assert not [each for each in cache.iterdir() if each.is_dir()]
