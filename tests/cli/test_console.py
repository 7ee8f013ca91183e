"""Widths, fields and times of what is printed; what `-v` brings back."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lit_rlhf.commands.support import log_filters
from lit_rlhf.commands.support.console import (
    Verbosity,
    fit_fields,
    format_seconds,
    get_verbosity,
    set_verbosity,
    take_verbose,
    wrap_words,
)
from lit_rlhf.commands.support.log_filters import install_log_filters, restored_log_filters
from lit_rlhf.data.report import DatasetReport


@pytest.mark.parametrize(
    "seconds, text", [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (127.4, "2:07"), (3725, "1:02:05")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_lines_are_broken_between_words_alone() -> None:
    path = "a-very/long/" + "path-" * 20
    text = f"rows of {path} and more words that follow it\nsecond line"
    wrapped = wrap_words(text, 30)
    assert wrap_words(text, None) == text
    assert wrapped.split() == text.split()
    assert all(len(line) <= 30 or line.strip() == path for line in wrapped.splitlines())


def test_fields_are_left_out_in_their_order_until_a_line_fits() -> None:
    fields = ["step 1", "loss 0.5", "accuracy 0.7", "", "9.8 s"]
    assert fit_fields(fields, [1, 2], None) == "step 1  loss 0.5  accuracy 0.7  9.8 s"
    assert fit_fields(fields, [1, 2], 30) == "step 1  accuracy 0.7  9.8 s"
    assert fit_fields(fields, [1, 2], 15) == "step 1  9.8 s"
    assert fit_fields(fields, [1, 2], 3) == "step 1  9.8 s"


def test_verbose_is_taken_from_the_arguments() -> None:
    assert take_verbose(["-c", "a", "-v", "--b=-v"]) == (["-c", "a", "--b=-v"], Verbosity.VERBOSE)
    assert take_verbose(["-c"]) == (["-c"], Verbosity.NORMAL)
    with set_verbosity(Verbosity.STAGE):
        assert take_verbose([])[1] is get_verbosity() is Verbosity.STAGE


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[Verbosity], list[str]]]:
    """Log what a run logs at some verbosity; return what is printed."""

    def log(verbosity: Verbosity) -> list[str]:
        caplog.clear()
        logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
        report = DatasetReport("rows.jsonl")
        report.num_read = 9
        report.skip("too long", "rows.jsonl:3")
        with set_verbosity(verbosity), caplog.at_level("INFO"):
            install_log_filters()
            logger.info("GPU available: False, used: False")
            logger.info("💡 Tip: buy")
            for _ in range(2):
                report.print_table()
            logger.info("as planned", extra={"brief": ""})
            logger.warning("GPU available: a warning")
        return caplog.messages

    with restored_log_filters():
        yield log


def test_a_person_reads_one_line_per_file(logged: Callable[[Verbosity], list[str]]) -> None:
    assert logged(Verbosity.NORMAL) == [
        "rows.jsonl: 8 of 9 rows; skipped 1: too long (first: rows.jsonl:3)",
        "GPU available: a warning",
    ]


def test_verbose_brings_it_back(logged: Callable[[Verbosity], list[str]]) -> None:
    first, table, again, planned, warning = logged(Verbosity.VERBOSE)
    assert first.startswith("GPU available: False") and "rows kept" in table == again
    assert (planned, warning) == ("as planned", "GPU available: a warning")


def test_a_stage_of_another_command_prints_its_warnings_alone(logged: Callable[[Verbosity], list[str]]) -> None:
    assert logged(Verbosity.STAGE) == ["GPU available: a warning"]


def test_a_command_within_a_command_leaves_its_filters(command: Callable[..., Any]) -> None:
    logger = logging.getLogger(log_filters.LOGGERS[0])
    before = list(logger.filters)
    with restored_log_filters():
        install_log_filters()
        outer = list(logger.filters)
        command("fit", "-c", "nothing")
        assert logger.filters == outer != before
    assert logger.filters == before
