"""A reward model trains on real comparisons without a warning."""

import logging
import warnings
from pathlib import Path

import pytest

from lit_rlhf.cli import main

FILES = {
    "hh_harmless": ["--data.path={data}/hh_harmless.jsonl.gz"],
    "oasst_kwise": ["--data.path={data}/oasst_kwise.jsonl.gz", "--data.overlong_prompts=truncate"],
}
SHORT = [
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=1",
    "--trainer.limit_val_batches=2",
    "--trainer.log_every_n_steps=1",
]


@pytest.mark.parametrize("name", FILES)
def test_training_on_comparisons_gives_no_warning(
    name: str, real_data: Path, stories: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.chdir(tmp_path)
    data = [argument.format(data=real_data / "preferences") for argument in FILES[name]]
    start = [f"--model.model={stories}", "--model.loading.pad_token=<|pad|>"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["fit", "-c", "small/reward", *data, *start, *SHORT, *quiet]) == 0
    # a socket that another test left open is reported here when the collector happens to find it
    others = (DeprecationWarning, ResourceWarning)
    messages = [str(each.message) for each in caught if not issubclass(each.category, others)]
    assert messages == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
