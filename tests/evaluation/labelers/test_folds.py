"""Folds over groups of labelers, by hand."""

import math

import pytest

from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.labelers.folds import build_folds, group_labelers, summarize_folds


def data(counts: dict[str, int], **columns: str) -> list[Ranking]:
    """Rankings of distinct prompts, the given number per labeler."""
    return [
        Ranking(f"{labeler} {number}", ["x", "y"], [0, 1], labeler, {"team": columns.get(labeler)}, "rows:1")
        for labeler, count in counts.items()
        for number in range(count)
    ]


def test_groups_are_of_similar_size():
    counts = {"a": 50, "b": 30, "c": 25, "d": 10, "e": 5}
    groups = group_labelers(data(counts), 2)
    sizes = [sum(counts[name] for name, own in groups.items() if own == group) for group in ("group-1", "group-2")]
    assert sorted(sizes) == [60, 60]
    assert group_labelers(data(counts)[::-1], 2) == groups


def test_folds_share_no_prompt_between_training_and_test():
    rows = data({"a": 40, "b": 40, "c": 40})
    rows += [Ranking(f"a {n}", ["x", "y"], [1, 0], "c", {}, "rows:2") for n in range(40)]  # c ranks a's prompts too
    groups = {"a": "one", "b": "two", "c": "three"}
    folds = build_folds(rows, groups, 0.2, 0)
    assert [fold.group for fold in folds] == ["one", "three", "two"]
    for fold in folds:
        inside = {record.labeler for record in [*fold.training, *fold.training_labelers]}
        assert {record.labeler for record in fold.heldout_labelers} == {
            name for name in "abc" if groups[name] == fold.group
        }
        assert inside == {name for name in "abc" if groups[name] != fold.group}
        trained = {record.prompt for record in fold.training}
        assert not trained & {record.prompt for record in [*fold.training_labelers, *fold.heldout_labelers]}
        assert (
            0.1
            < len({r.prompt for r in fold.training_labelers})
            / len({r.prompt for r in [*fold.training, *fold.training_labelers]})
            < 0.3
        )
    three = next(fold for fold in folds if fold.group == "three")
    assert len([r for r in three.heldout_labelers if r.prompt.startswith("c")]) == 40


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([Ranking("p", ["x", "y"], [0, 1], None, {}, "rows:7")], {}, "rows:7: no labeler"),
        (data({"a": 3}), {}, "only one labeler, 'a'"),
        (data({"a": 3, "b": 3}), {"num_groups": 5}, "5 groups cannot be made of 2 labelers"),
        (data({"a": 3, "b": 3}, a="x"), {"column": "team"}, "rows:1: no group"),
        (data({"a": 3, "b": 3}, a="x", b="x"), {"column": "team"}, "all labelers are in one group, 'x'"),
        (data({"a": 1, "b": 1}, a="x", b="y") + data({"a": 1}, a="z"), {"column": "team"}, "'a' is in the groups"),
    ],
)
def test_invalid_groups_are_refused(rows, settings, message):
    with pytest.raises(UserError, match=message):
        group_labelers(rows, **{"num_groups": 2, **settings})


def test_a_fold_without_comparisons_is_refused():
    rows = data({"a": 20}) + [each._replace(labeler="b") for each in data({"a": 20})]  # both rank the same prompts
    assert all(fold.heldout_labelers for fold in build_folds(rows, {"a": "one", "b": "two"}, 0.3, 0))
    few = data({"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"no comparisons: .*raise --unseen"):
        build_folds(few, {"a": "one", "b": "two"}, 0.01, 0)


def test_the_summary_is_mean_and_standard_error():
    runs = [{"training_labelers": t, "heldout_labelers": h} for t, h in ((0.7, 0.6), (0.8, 0.65), (0.75, 0.7))]
    summary = summarize_folds(runs)
    assert summary["training_labelers"] == {
        "mean": pytest.approx(0.75),
        "standard_error": pytest.approx(0.05 / math.sqrt(3)),
    }
    assert summary["difference"]["mean"] == pytest.approx(0.1)
    assert summarize_folds(runs[:1])["heldout_labelers"] == {"mean": 0.6, "standard_error": None}
