"""Cross-validation over groups of labelers: how a reward model generalizes to held-out ones (InstructGPT, §4.1)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from lit_rlhf.data.preprocessing.splits import hold_out
from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError


class Fold(NamedTuple):
    """Data of a fold, which holds out one group of labelers."""

    group: str
    training: list[Ranking]  # of the other groups
    training_labelers: list[Ranking]  # test set of the other groups, on prompts outside the training set
    heldout_labelers: list[Ranking]  # test set of the held-out group, on prompts outside the training set


def group_labelers(records: Sequence[Ranking], num_groups: int, column: str | None = None) -> dict[str, str]:
    """Return the group of each labeler: from a column of the data, or `num_groups` groups of similar data size.

    Args:
        records: the rankings.
        num_groups: number of groups; unused with a column.
        column: the column with each row's group.

    Raises:
        UserError: no labeler column, one labeler, fewer labelers than groups, or a labeler in two groups.
    """
    sizes: Counter[str] = Counter()
    for record in records:
        if record.labeler is None:
            raise UserError(f"{record.origin}: no labeler; folds over labelers need a column 'labeler'")
        sizes[record.labeler] += 1
    if len(sizes) < 2:
        raise UserError(f"only one labeler, {next(iter(sizes))!r}: folds over labelers take two or more")
    if column is not None:
        return _read_group_column(records, column)
    if not 2 <= num_groups <= len(sizes):
        raise UserError(f"--groups: {num_groups} groups cannot be made of {len(sizes)} labelers; set 2 to {len(sizes)}")
    group_sizes = dict.fromkeys((f"group-{number}" for number in range(1, num_groups + 1)), 0)
    groups = {}
    for labeler, size in sorted(sizes.items(), key=lambda each: (-each[1], each[0])):  # the largest first
        smallest = min(group_sizes, key=lambda name: group_sizes[name])
        groups[labeler] = smallest
        group_sizes[smallest] += size
    return groups


def _read_group_column(records: Sequence[Ranking], column: str) -> dict[str, str]:
    groups: dict[str, str] = {}
    for record in records:
        if record.fields.get(column) is None:
            raise UserError(f"{record.origin}: no group; --group-column names the column {column!r}")
        group, labeler = str(record.fields[column]), str(record.labeler)
        if groups.setdefault(labeler, group) != group:
            raise UserError(f"{record.origin}: labeler {labeler!r} is in the groups {groups[labeler]!r} and {group!r}")
    if len(set(groups.values())) < 2:
        raise UserError(f"--group-column: all labelers are in one group, {next(iter(groups.values()))!r}")
    return groups


def build_folds(records: Sequence[Ranking], groups: Mapping[str, str], unseen_fraction: float, seed: int) -> list[Fold]:
    """Return one fold per group.

    A fraction of the prompts is excluded from all training; both test sets have only prompts outside the training set.

    Args:
        records: the rankings.
        groups: labeler -> group.
        unseen_fraction: fraction of the distinct prompts excluded from training.
        seed: of the choice of these prompts.

    Raises:
        UserError: a fold without training or test data.
    """
    keys = [repr(record.prompt) for record in records]
    unseen = hold_out(keys, unseen_fraction, seed)
    folds = []
    for group in sorted(set(groups.values())):
        is_training = [groups[str(record.labeler)] != group for record in records]
        trained = {key for key, training in zip(keys, is_training) if training and key not in unseen}
        parts: dict[str, list[Ranking]] = {"training": [], "training_labelers": [], "heldout_labelers": []}
        for record, key, training in zip(records, keys, is_training):
            if training:
                parts["training_labelers" if key in unseen else "training"].append(record)
            elif key not in trained:
                parts["heldout_labelers"].append(record)
        empty = [name for name, part in parts.items() if not part]
        if empty:
            reasons = {
                "training": "the other groups' labelers ranked only unseen prompts",
                "training_labelers": "the other groups' labelers ranked none of the unseen prompts; raise --unseen",
                "heldout_labelers": "its labelers ranked no prompt outside the training set; raise --unseen",
            }
            raise UserError(f"the fold of {group!r} has no comparisons: {reasons[empty[0]]}")
        folds.append(Fold(group, **parts))
    return folds


def summarize_folds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard error of the accuracies over folds and seeds.

    Args:
        runs: each with the accuracies "training_labelers" and "heldout_labelers".
    """
    columns = {name: [float(run[name]) for run in runs] for name in ("training_labelers", "heldout_labelers")}
    columns["difference"] = [one - other for one, other in zip(*columns.values())]
    return {
        name: {"mean": fmean(values), "standard_error": stdev(values) / sqrt(len(values)) if len(values) > 1 else None}
        for name, values in columns.items()
    }
