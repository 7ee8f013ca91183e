"""The length limits: what is dropped or truncated, and its counts."""

import pytest

from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError


def test_long_prompts_are_dropped_or_truncated_and_counted():
    report = DatasetReport("rows")
    assert TruncationPolicy(3).fit_prompt([5, 6, 7], [], "rows:1", report) == [5, 6, 7]
    assert TruncationPolicy(2).fit_prompt([5, 6, 7], [], "rows:2", report) is None
    assert TruncationPolicy(2, overlong_prompts="truncate").fit_prompt([5, 6, 7], [], "rows:3", report) == [6, 7]
    assert TruncationPolicy(2, overlong_prompts="truncate").fit_prompt([2, 5, 6, 7], [2], "rows:4", report) == [2, 7]
    assert TruncationPolicy(1, overlong_prompts="truncate").fit_prompt([2, 5, 6, 7], [2], "rows:4", report) == [2]
    assert TruncationPolicy(2).fit_prompt([], [], "rows:5", report) is None
    assert report.skipped == {"prompt longer than 2 tokens": 1, "prompt without a token": 1}
    assert report.flagged == {"prompt truncated to its last 2 tokens": 2, "prompt truncated to its last 1 tokens": 1}


def test_completions_end_with_eos_unless_truncated():
    report = DatasetReport("rows")
    policy = TruncationPolicy(9, max_completion_length=3)
    assert policy.fit_completion([5, 6], 1, "rows:1", report) == [5, 6, 1]
    assert policy.fit_completion([5, 6, 1], 1, "rows:2", report) == [5, 6, 1]  # not doubled
    assert report.flagged == {}
    assert policy.fit_completion([5, 6, 7], 1, "rows:3", report) == [5, 6, 7]
    assert policy.fit_completion([5, 1, 7], 1, "rows:4", report) == [5, 1, 7]
    assert report.flagged == {"completion cut to 3 tokens": 2, "completion spells the EOS token before its end": 1}


def test_bad_limits():
    with pytest.raises(UserError, match="max_completion_length: 0 must be at least 1"):
        TruncationPolicy(4, 0).validated()
