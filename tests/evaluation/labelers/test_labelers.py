"""Agreement of labelers and folds over groups of them, against loops and by hand."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.labelers.agreement import labeler_agreement, build_agreement_report, krippendorff_alpha, read_preferences
from lit_rlhf.evaluation.labelers.folds import build_folds, group_labelers, summarize_folds

TEXTS = ("one", "two", "three")
# labeler -> prompt -> ranks of three completions
labelings = st.dictionaries(
    st.sampled_from("abc"),
    st.dictionaries(st.sampled_from(["p", "q", "r"]), st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=3),
    min_size=2,
    max_size=3,
)


def records(labeling) -> list[Ranking]:
    return [
        Ranking(prompt, list(TEXTS), list(ranks), labeler, {}, f"rows:{labeler}")
        for labeler, own in labeling.items()
        for prompt, ranks in own.items()
    ]


def decisions(labeling, one: str, other: str) -> tuple[list[tuple[str, bool]], int]:
    """(prompt, whether they agree) of every pair of completions that both decided, and how many either tied."""
    found, ties = [], 0
    for prompt in labeling[one].keys() & labeling[other].keys():
        mine, theirs = labeling[one][prompt], labeling[other][prompt]
        for i, j in combinations(range(3), 2):
            if mine[i] == mine[j] or theirs[i] == theirs[j]:
                ties += 1
            else:
                found.append((prompt, (mine[i] < mine[j]) == (theirs[i] < theirs[j])))
    return found, ties


@given(labelings)
def test_agreement_equals_a_loop(labeling):
    opinions = read_preferences(records(labeling))
    for one, other in combinations(sorted(labeling), 2):
        decided, ties = decisions(labeling, one, other)
        found = labeler_agreement(opinions, [(one, other)])
        assert (found.comparisons, found.ties) == (len(decided), ties)
        assert found.prompts == len({prompt for prompt, _ in decided})
        if decided:
            assert found.share == pytest.approx(sum(agree for _, agree in decided) / len(decided))
            assert found.low <= found.share <= found.high
        else:
            assert found.share is None


@given(labelings, st.permutations(range(3)))
def test_the_order_of_completions_does_not_matter(labeling, order):
    turned = [
        each._replace(completions=[TEXTS[i] for i in order], ranks=[each.ranks[i] for i in order])
        for each in records(labeling)
    ]
    assert read_preferences(turned) == read_preferences(records(labeling))


def alpha_by_pairs(labeling) -> float | None:
    """Krippendorff's alpha from its definition: 1 - observed / expected disagreement, ordinal distances."""
    units = []
    for prompt in "pqr":
        ranks = [own[prompt] for own in labeling.values() if prompt in own]
        for item in read_preferences(records(labeling))[next(iter(labeling))] if ranks else []:
            if item.prompt == repr(prompt):
                i, j = TEXTS.index(item.first), TEXTS.index(item.second)
                units.append([(row[i] < row[j]) - (row[i] > row[j]) for row in ranks])
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    counts = {value: values.count(value) for value in sorted(set(values))}
    if len(counts) < 2:
        return None

    def distance(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        between = sum(count for value, count in counts.items() if low <= value <= high)
        return (between - (counts[a] + counts[b]) / 2) ** 2 if a != b else 0.0

    observed = sum(2 * sum(distance(a, b) for a, b in combinations(unit, 2)) / (len(unit) - 1) for unit in units) / len(
        values
    )
    expected = sum(2 * distance(a, b) for a, b in combinations(values, 2)) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


@given(
    st.fixed_dictionaries(
        {name: st.fixed_dictionaries({p: st.tuples(*[st.integers(0, 2)] * 3) for p in "pqr"}) for name in "abc"}
    )
)
def test_alpha_is_the_definition(labeling):
    pytest.importorskip("krippendorff")
    expected, found = alpha_by_pairs(labeling), krippendorff_alpha(read_preferences(records(labeling)))
    assert (found is None) == (expected is None)
    if expected is not None:
        assert found == pytest.approx(expected, abs=1e-9)


def test_alpha_of_labelers_who_always_agree_is_one():
    pytest.importorskip("krippendorff")
    same = {"p": (0, 1, 2), "q": (2, 0, 1)}
    report = build_agreement_report(records({"a": same, "b": same}))
    assert report["alpha"] == pytest.approx(1) and report["all"]["share"] == 1
    turned = {"p": (2, 1, 0), "q": (0, 2, 1)}
    report = build_agreement_report(records({"a": same, "b": turned}))
    assert report["all"]["share"] == 0 and report["alpha"] < 0
    assert report["labelers"]["a"]["rankings"] == 2 and report["pairs"][0]["labelers"] == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([Ranking("p", ["x", "y"], [0, 1], None, {}, "rows:1")], "rows:1: no labeler"),
        ([Ranking("p", ["x", "y"], [0, 1], "a", {}, "rows:1")], "only one labeler, 'a'"),
        (
            [Ranking(p, ["x", "y"], [0, 1], name, {}, "") for p, name in (("p", "a"), ("q", "b"))],
            "no two of the 2 labelers",
        ),
    ],
)
def test_what_agreement_refuses(rows, words):
    with pytest.raises(UserError, match=words):
        build_agreement_report(rows)


def data(counts: dict[str, int], **columns: str) -> list[Ranking]:
    """So many prompts of their own for each labeler."""
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


def test_folds_leak_no_prompt():
    rows = data({"a": 40, "b": 40, "c": 40})
    rows += [Ranking(f"a {n}", ["x", "y"], [1, 0], "c", {}, "rows:2") for n in range(40)]  # c ranks a's prompts too
    groups = {"a": "one", "b": "two", "c": "three"}
    folds = build_folds(rows, groups, 0.2, 0)
    assert [fold.group for fold in folds] == ["one", "three", "two"]
    for fold in folds:
        inside = {record.labeler for record in [*fold.training, *fold.seen]}
        assert {record.labeler for record in fold.heldout} == {name for name in "abc" if groups[name] == fold.group}
        assert inside == {name for name in "abc" if groups[name] != fold.group}
        trained = {record.prompt for record in fold.training}
        assert not trained & {record.prompt for record in [*fold.seen, *fold.heldout]}
        assert 0.1 < len({r.prompt for r in fold.seen}) / len({r.prompt for r in [*fold.training, *fold.seen]}) < 0.3
    three = next(fold for fold in folds if fold.group == "three")
    assert len([r for r in three.heldout if r.prompt.startswith("c")]) == 40


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([Ranking("p", ["x", "y"], [0, 1], None, {}, "rows:7")], {}, "rows:7: no labeler"),
        (data({"a": 3}), {}, "only one labeler, 'a'"),
        (data({"a": 3, "b": 3}), {"count": 5}, "5 groups cannot be made of 2 labelers"),
        (data({"a": 3, "b": 3}, a="x"), {"column": "team"}, "rows:1: no group"),
        (data({"a": 3, "b": 3}, a="x", b="x"), {"column": "team"}, "all labelers are in one group, 'x'"),
        (data({"a": 1, "b": 1}, a="x", b="y") + data({"a": 1}, a="z"), {"column": "team"}, "'a' is in the groups"),
    ],
)
def test_what_groups_are_refused(rows, settings, words):
    with pytest.raises(UserError, match=words):
        group_labelers(rows, **{"count": 2, **settings})


def test_a_fold_without_comparisons_is_refused():
    rows = data({"a": 20}) + [each._replace(labeler="b") for each in data({"a": 20})]  # both rank the same prompts
    assert all(fold.heldout for fold in build_folds(rows, {"a": "one", "b": "two"}, 0.3, 0))
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
