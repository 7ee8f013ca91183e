"""Agreement of labelers, against loops and by hand."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.data.records import Ranking
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.labelers.agreement import (
    build_agreement_report,
    compute_labeler_agreement,
    krippendorff_alpha,
    read_preferences,
)

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
    """(prompt, whether they agree) for every pair of completions that both decided, and the number of ties."""
    decided, ties = [], 0
    for prompt in labeling[one].keys() & labeling[other].keys():
        first, second = labeling[one][prompt], labeling[other][prompt]
        for i, j in combinations(range(3), 2):
            if first[i] == first[j] or second[i] == second[j]:
                ties += 1
            else:
                decided.append((prompt, (first[i] < first[j]) == (second[i] < second[j])))
    return decided, ties


@given(labelings)
def test_agreement_equals_a_loop(labeling):
    preferences = read_preferences(records(labeling))
    for one, other in combinations(sorted(labeling), 2):
        decided, ties = decisions(labeling, one, other)
        found = compute_labeler_agreement(preferences, [(one, other)])
        assert (found.comparisons, found.ties) == (len(decided), ties)
        assert found.prompts == len({prompt for prompt, _ in decided})
        if decided:
            assert found.share == pytest.approx(sum(agree for _, agree in decided) / len(decided))
            assert found.low <= found.share <= found.high
        else:
            assert found.share is None


@given(labelings, st.permutations(range(3)))
def test_the_order_of_completions_does_not_matter(labeling, order):
    permuted = [
        each._replace(completions=[TEXTS[i] for i in order], ranks=[each.ranks[i] for i in order])
        for each in records(labeling)
    ]
    assert read_preferences(permuted) == read_preferences(records(labeling))


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
    reversed_ranks = {"p": (2, 1, 0), "q": (0, 2, 1)}
    report = build_agreement_report(records({"a": same, "b": reversed_ranks}))
    assert report["all"]["share"] == 0 and report["alpha"] < 0
    assert report["labelers"]["a"]["rankings"] == 2 and report["pairs"][0]["labelers"] == ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Ranking("p", ["x", "y"], [0, 1], None, {}, "rows:1")], "rows:1: no labeler"),
        ([Ranking("p", ["x", "y"], [0, 1], "a", {}, "rows:1")], "only one labeler, 'a'"),
        (
            [Ranking(p, ["x", "y"], [0, 1], name, {}, "") for p, name in (("p", "a"), ("q", "b"))],
            "no two of the 2 labelers",
        ),
    ],
)
def test_agreement_refuses_data_without_shared_comparisons(rows, message):
    with pytest.raises(UserError, match=message):
        build_agreement_report(rows)
