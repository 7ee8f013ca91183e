"""Does a reward model generalise to labelers it has not seen? k folds over groups of labelers (InstructGPT, §4.1)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any, NamedTuple

from lit_rlhf.data.preprocessing.splits import hold_out
from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError


class Fold(NamedTuple):
    """One group of labelers held out."""

    group: str
    training: list[Ranking]  # of the other groups
    seen: list[Ranking]  # of the other groups, on prompts that are not trained on
    heldout: list[Ranking]  # of the group held out, on prompts that are not trained on


def group_labelers(records: Sequence[Ranking], num_groups: int, column: str | None = None) -> dict[str, str]:
    """Return the group of each labeler: by a column of the data, or `count` groups of similar data size.

    Args:
        records: the rankings.
        count: groups to make, where no column says them.
        column: names each row's group.

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
        return _groups_by_column(records, column)
    if not 2 <= num_groups <= len(sizes):
        raise UserError(f"--groups: {num_groups} groups cannot be made of {len(sizes)} labelers; set 2 to {len(sizes)}")
    filled = dict.fromkeys((f"group-{number}" for number in range(1, num_groups + 1)), 0)
    groups = {}
    for labeler, size in sorted(sizes.items(), key=lambda each: (-each[1], each[0])):  # the busiest first
        smallest = min(filled, key=lambda name: filled[name])
        groups[labeler] = smallest
        filled[smallest] += size
    return groups


def _groups_by_column(records: Sequence[Ranking], column: str) -> dict[str, str]:
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
    """Return one fold a group.

    A share of the prompts is kept out of all training; both accuracies are taken on prompts that were not trained on.

    Args:
        records: the rankings.
        groups: labeler -> group.
        unseen: share of the distinct prompts kept out.
        seed: keys which.

    Raises:
        UserError: a fold without comparisons to train on or to test on.
    """
    keys = [repr(record.prompt) for record in records]
    kept_out = hold_out(keys, unseen_fraction, seed)
    folds = []
    for group in sorted(set(groups.values())):
        inside = [groups[str(record.labeler)] != group for record in records]
        trained = {key for key, mine in zip(keys, inside) if mine and key not in kept_out}
        parts: dict[str, list[Ranking]] = {"training": [], "seen": [], "heldout": []}
        for record, key, mine in zip(records, keys, inside):
            if mine:
                parts["seen" if key in kept_out else "training"].append(record)
            elif key not in trained:
                parts["heldout"].append(record)
        empty = [name for name, part in parts.items() if not part]
        if empty:
            why = {
                "training": "the other groups' labelers ranked nothing outside the prompts kept out",
                "seen": "the other groups' labelers ranked none of the prompts kept out; raise --unseen",
                "heldout": "its labelers ranked no prompt that the other groups' labelers left alone; raise --unseen",
            }
            raise UserError(f"the fold of {group!r} has no comparisons: {why[empty[0]]}")
        folds.append(Fold(group, **parts))
    return folds


def summarize_folds(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard error over folds and seeds.

    Args:
        runs: each with "training_labelers" and "heldout_labelers", two accuracies.
    """
    columns = {name: [float(run[name]) for run in runs] for name in ("training_labelers", "heldout_labelers")}
    columns["difference"] = [one - other for one, other in zip(*columns.values())]
    return {
        name: {"mean": fmean(values), "standard_error": stdev(values) / sqrt(len(values)) if len(values) > 1 else None}
        for name, values in columns.items()
    }
