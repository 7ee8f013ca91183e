"""Epoch means: sums and counts that survive a restart."""

import torch

from lit_rlhf.modules.epoch_metrics import EpochMeans


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
