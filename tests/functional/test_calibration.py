import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from lit_rlhf.functional import expected_calibration_error, reliability_curve


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30), st.integers(1, 12))
def test_equals_a_loop(rows, bins):
    members = [[] for _ in range(bins)]
    for probability, outcome in rows:
        members[min(int(probability * bins), bins - 1)].append((probability, outcome))
    probabilities = torch.tensor([p for p, _ in rows], dtype=torch.float64)
    outcomes = torch.tensor([o for _, o in rows])
    confidence, accuracy, count = reliability_curve(probabilities, outcomes, bins)
    error = 0.0
    for i, entries in enumerate(members):
        assert count[i].item() == len(entries)
        if not entries:
            assert confidence[i].isnan() and accuracy[i].isnan()
            continue
        mean_p, mean_o = (math.fsum(column) / len(entries) for column in zip(*entries))
        assert_close((confidence[i].item(), accuracy[i].item()), (mean_p, mean_o), rtol=1e-12, atol=1e-300)
        error += len(entries) / len(rows) * abs(mean_o - mean_p)
    assert_close(expected_calibration_error(probabilities, outcomes, bins).item(), error, rtol=1e-12, atol=1e-12)


def test_closed_forms():
    always = torch.ones(8)
    assert expected_calibration_error(always, always).item() == 0
    assert expected_calibration_error(always, torch.zeros(8)).item() == 1
    half = torch.full((8,), 0.5)
    assert expected_calibration_error(half, torch.arange(8) % 2).item() == 0
    # one bin hides what two bins show
    probabilities, outcomes = torch.tensor([0.25, 0.75]), torch.tensor([True, False])
    assert expected_calibration_error(probabilities, outcomes, bins=1).item() == 0
    assert expected_calibration_error(probabilities, outcomes, bins=2).item() == 0.75


def test_edges_belong_to_the_bin_above_and_1_to_the_last():
    _, _, count = reliability_curve(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), torch.zeros(5), bins=4)
    assert count.tolist() == [1, 1, 1, 2]


def test_ten_bins_by_default():
    assert len(reliability_curve(torch.tensor([0.3]), torch.tensor([1]))[0]) == 10
    # the first two share one bin of ten, the third has its own: 2/3 * |0.5 - 0.15| + 1/3 * |0 - 0.95|
    probabilities, outcomes = torch.tensor([0.11, 0.19, 0.95]), torch.tensor([0, 1, 0])
    assert_close(expected_calibration_error(probabilities, outcomes).item(), 0.55, rtol=1e-6, atol=0)


@pytest.mark.parametrize("outside", [-0.01, 1.01, math.nan])
def test_values_outside_0_and_1_are_refused(outside):
    with pytest.raises(AssertionError, match="outside"):
        reliability_curve(torch.tensor([0.5, outside]), torch.tensor([1, 0]))
