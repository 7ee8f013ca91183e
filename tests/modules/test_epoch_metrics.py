"""Epoch means: sums and counts that survive a restart."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.modules.epoch_metrics import MAX_ADDED, EpochMeans


def test_epoch_means_do_not_depend_on_how_the_sums_were_added():
    means = EpochMeans()
    for total, count in ((3.0, 2), (torch.tensor(5.0), torch.tensor(1))):
        means.add("a", total, count)
    means.add("empty", 0.0, 0)
    restarted = EpochMeans()
    restarted.load(means.reduced_sums(lambda sums: sums), is_first_rank=True)
    restarted.add("a", 1.0, 1)
    assert restarted.compute(lambda sums: 2 * sums) == {"a": torch.tensor(9.0 / 4)}
    assert restarted.compute(lambda sums: sums) == {}


def test_sums_are_those_of_float64_in_order_whatever_the_types():
    """Float32 and int64 tensors, numbers, and a loss that has a gradient; read together, or one by one."""
    loss = torch.tensor(0.1, requires_grad=True) * 3
    pairs = [(loss, torch.tensor(7)), (torch.tensor(1e-3), 2), (2**53 + 1.0, torch.tensor(2**40 + 1)), (1, 1.5)]
    late, early = EpochMeans(), EpochMeans()
    for total, count in pairs:
        late.add("a", total, count)
        early.add("a", total, count)
        assert set(early.sums) == {"a"}
    total = count = 0.0
    for pair in pairs:
        total, count = total + float(pair[0]), count + float(pair[1])
    assert late.sums == early.sums == {"a": (total, count)}
    assert early.compute(lambda sums: sums)["a"] == torch.tensor(total / count)


def test_a_long_epoch_keeps_few_tensors():
    means, count = EpochMeans(), 2 * MAX_ADDED + 5
    for _ in range(count):
        means.add("a", torch.tensor(0.5))
    assert len(means._added) < MAX_ADDED
    assert means.sums == {"a": (0.5 * count, count)}


def test_adding_calls_no_operators():
    """An accelerator would launch each of them, at every micro-batch."""
    means, calls = EpochMeans(), []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    total, count = torch.tensor(0.5), torch.tensor(3)
    with Calls():
        for _ in range(9):
            means.add("a", total, count)
        assert not calls
        assert means.sums == {"a": (4.5, 27.0)}
    assert 0 < len(calls) <= 4
