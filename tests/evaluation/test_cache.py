"""Cached rows are not computed again, however the run ended; batches do not depend on the cache."""

import json

import pytest

from lit_rlhf.evaluation.cache import Cache, iter_length_sorted_batches, read_cached_rows
from lit_rlhf.models.fingerprint import loaded_model_fingerprint
from lit_rlhf.models.loading_config import ModelLoadingConfig

PLAIN = ModelLoadingConfig()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "new" / "cache", progress=False)


def test_only_rows_that_are_missing_are_computed(cache) -> None:
    calls = []

    def compute(indices):
        calls.append(indices)
        for index in indices:
            if index == 3 and len(calls) == 1:
                raise KeyboardInterrupt
            yield index, [index, 0.1 + 0.2]

    with pytest.raises(KeyboardInterrupt):
        cache.get_or_compute_rows("", "work", 5, compute)
    assert cache.get_or_compute_rows("", "work", 5, compute) == [[index, 0.1 + 0.2] for index in range(5)]
    assert calls == [[0, 1, 2, 3, 4], [3, 4]]
    assert cache.get_or_compute_rows("", "work", 5, lambda _: pytest.fail("computed again")) == [
        [p, 0.1 + 0.2] for p in range(5)
    ]


def test_a_failed_row_is_none_and_computed_again(cache) -> None:
    tries = []

    def compute(indices):
        tries.append(indices)
        return ((index, None if index == 1 and len(tries) == 1 else index) for index in indices)

    assert cache.get_or_compute_rows("", "work", 3, compute) == [0, None, 2]
    assert cache.get_or_compute_rows("", "work", 3, compute) == [0, 1, 2]
    assert tries == [[0, 1, 2], [1]]


def test_an_incomplete_line_is_removed(cache) -> None:
    cache.get_or_compute_rows("", "work", 3, lambda indices: ((index, {"text": "ü\u2028"}) for index in indices))
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert list(read_cached_rows(path)) == [0, 1]
    assert cache.get_or_compute_rows("", "work", 3, lambda indices: ((index, "new") for index in indices))[2] == "new"
    assert [json.loads(line)[0] for line in path.read_text().split("\n")[:-1]] == [0, 1, 2]


def test_different_keys_are_different_computations(cache) -> None:
    for key in ({"a": 1}, {"a": 2}, {"a": [1]}, "a"):
        assert cache.get_or_compute(key, lambda key=key: [key]) == [key]
    assert cache.get_or_compute({"a": 1}, lambda: pytest.fail("computed again")) == [{"a": 1}]


def test_a_model_is_identified_by_its_files(cache, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    first = loaded_model_fingerprint(str(folder), PLAIN, cache.hash_file)
    (folder / "notes.md").write_text("not part of it")
    assert loaded_model_fingerprint(str(folder), PLAIN, cache.hash_file) == first
    (folder / "model.safetensors").write_bytes(b"1235")
    assert loaded_model_fingerprint(str(folder), PLAIN, cache.hash_file) != first
    for changed in (
        ModelLoadingConfig(dtype="bfloat16"),
        ModelLoadingConfig(pad_token="<p>"),
        ModelLoadingConfig(quantization="nf4"),
    ):
        assert loaded_model_fingerprint(str(folder), changed, cache.hash_file) != loaded_model_fingerprint(
            str(folder), PLAIN, cache.hash_file
        )
    hub = [
        loaded_model_fingerprint("org/name", ModelLoadingConfig(revision=revision), cache.hash_file)
        for revision in (None, "v2")
    ]
    assert len({*hub, loaded_model_fingerprint("org/other", PLAIN, cache.hash_file)}) == 3


def test_a_disabled_cache_stores_nothing(tmp_path) -> None:
    calls = []
    disabled = Cache(None)
    for _ in range(2):
        assert disabled.get_or_compute_rows(
            "", "work", 2, lambda indices: calls.append(indices) or iter(zip(indices, "ab"))
        ) == ["a", "b"]
    assert calls == [[0, 1], [0, 1]]


def test_batches_do_not_depend_on_what_is_needed_and_unneeded_ones_are_skipped() -> None:
    lengths = [5, 1, 4, 2, 3, 2]
    assert list(iter_length_sorted_batches(lengths, 2, range(6))) == [[1, 3], [5, 4], [2, 0]]
    assert list(iter_length_sorted_batches(lengths, 2, [4])) == [[5, 4]]
    assert list(iter_length_sorted_batches(lengths, 2, [0, 1])) == [[1, 3], [2, 0]]
    assert list(iter_length_sorted_batches(lengths, 2, [])) == []


def test_half_of_a_surrogate_pair_is_stored_as_a_question_mark(cache) -> None:
    rows = [(0, ["cut \ud83d", "😀"])]
    for _ in range(2):
        assert cache.get_or_compute_rows("", "work", 1, lambda _: iter(rows)) == [["cut ?", "😀"]]
