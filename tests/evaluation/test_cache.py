"""Finished rows are not computed again, whatever ended the run."""

import json

import pytest

from lit_rlhf.evaluation.cache import Cache, iter_length_sorted_batches, digest_of_model, read_cached_rows
from lit_rlhf.models.loading_config import ModelLoadingConfig

PLAIN = ModelLoadingConfig()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "new" / "cache", progress=False)


def test_only_rows_that_are_missing_are_computed(cache) -> None:
    asked = []

    def compute(places):
        asked.append(places)
        for place in places:
            if place == 3 and len(asked) == 1:
                raise KeyboardInterrupt
            yield place, [place, 0.1 + 0.2]

    with pytest.raises(KeyboardInterrupt):
        cache.rows("", "work", 5, compute)
    assert cache.rows("", "work", 5, compute) == [[place, 0.1 + 0.2] for place in range(5)]
    assert asked == [[0, 1, 2, 3, 4], [3, 4]]
    assert cache.rows("", "work", 5, lambda _: pytest.fail("computed again")) == [[p, 0.1 + 0.2] for p in range(5)]


def test_a_row_that_failed_is_none_and_tried_again(cache) -> None:
    tries = []

    def compute(places):
        tries.append(places)
        return ((place, None if place == 1 and len(tries) == 1 else place) for place in places)

    assert cache.rows("", "work", 3, compute) == [0, None, 2]
    assert cache.rows("", "work", 3, compute) == [0, 1, 2]
    assert tries == [[0, 1, 2], [1]]


def test_a_line_that_was_cut_off_is_taken_away(cache) -> None:
    cache.rows("", "work", 3, lambda places: ((place, {"text": "ü\u2028"}) for place in places))
    (path,) = cache.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-4])
    assert list(read_cached_rows(path)) == [0, 1]
    assert cache.rows("", "work", 3, lambda places: ((place, "new") for place in places))[2] == "new"
    assert [json.loads(line)[0] for line in path.read_text().split("\n")[:-1]] == [0, 1, 2]


def test_other_keys_are_other_work(cache) -> None:
    for key in ({"a": 1}, {"a": 2}, {"a": [1]}, "a"):
        assert cache.value(key, lambda key=key: [key]) == [key]
    assert cache.value({"a": 1}, lambda: pytest.fail("computed again")) == [{"a": 1}]


def test_a_model_is_its_files(cache, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1234")
    first = digest_of_model(str(folder), PLAIN, cache)
    (folder / "notes.md").write_text("not part of it")
    assert digest_of_model(str(folder), PLAIN, cache) == first
    (folder / "model.safetensors").write_bytes(b"1235")
    assert digest_of_model(str(folder), PLAIN, cache) != first
    for changed in (
        ModelLoadingConfig(dtype="bfloat16"),
        ModelLoadingConfig(pad_token="<p>"),
        ModelLoadingConfig(quantization="nf4"),
    ):
        assert digest_of_model(str(folder), changed, cache) != digest_of_model(str(folder), PLAIN, cache)
    hub = [digest_of_model("org/name", ModelLoadingConfig(revision=revision), cache) for revision in (None, "v2")]
    assert len({*hub, digest_of_model("org/other", PLAIN, cache)}) == 3


def test_a_cache_of_nothing_keeps_nothing(tmp_path) -> None:
    calls = []
    nothing = Cache(None)
    for _ in range(2):
        assert nothing.get_or_compute_rows("", "work", 2, lambda places: calls.append(places) or iter(zip(places, "ab"))) == ["a", "b"]
    assert calls == [[0, 1], [0, 1]]


def test_chunks_are_the_same_whatever_is_wanted_and_the_unwanted_are_left_out() -> None:
    lengths = [5, 1, 4, 2, 3, 2]
    assert list(iter_length_sorted_batches(lengths, 2, range(6))) == [[1, 3], [5, 4], [2, 0]]
    assert list(iter_length_sorted_batches(lengths, 2, [4])) == [[5, 4]]
    assert list(iter_length_sorted_batches(lengths, 2, [0, 1])) == [[1, 3], [2, 0]]
    assert list(iter_length_sorted_batches(lengths, 2, [])) == []
