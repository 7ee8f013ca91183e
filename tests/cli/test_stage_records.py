"""Records of stages: read as they were written, and never half of one."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.commands.support.stage_records import StageRecords, compute_fingerprint

values = st.none() | st.integers() | st.text()
settings = values | st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=3)


def test_a_record_is_read_as_it_was_written_until_it_is_removed(tmp_path: Path) -> None:
    records = StageRecords(tmp_path)
    assert records.read("one") == {}
    records.folder.mkdir()
    records.write("one", {"fingerprint": "a", "seconds": 1.5, "result": [{"b": None}]})
    records.write("two", {"fingerprint": "b"})
    assert records.read("one") == {"fingerprint": "a", "seconds": 1.5, "result": [{"b": None}]}
    records.remove("one")
    records.remove("one")
    assert records.read("one") == {} and records.read("two") == {"fingerprint": "b"}


def test_a_call_that_is_killed_while_it_writes_leaves_the_old_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = StageRecords(tmp_path)
    records.folder.mkdir()
    records.write("one", {"seconds": 1})

    def stop(*names: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        records.write("one", {"seconds": 2})
    assert records.read("one") == {"seconds": 1}


@given(settings, settings)
def test_a_fingerprint_is_equal_for_equal_settings_alone(one: object, other: object) -> None:
    assert (compute_fingerprint(one) == compute_fingerprint(other)) == (one == other)
    assert compute_fingerprint({"a": one, "b": other}) == compute_fingerprint({"b": other, "a": one})
