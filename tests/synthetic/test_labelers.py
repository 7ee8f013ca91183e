import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.synthetic.labelers import (
    Labeler,
    LabelerWeights,
    build_heldout_labelers,
    build_training_labelers,
    compute_agreement,
    compute_preference,
    rank_responses,
)
from lit_rlhf.synthetic.responses import (
    write_courteous_response,
    write_false_response,
    write_good_response,
    write_incomplete_response,
    write_lazy_response,
    write_rambling_response,
    write_rude_response,
)
from lit_rlhf.synthetic.tasks import TaskPrompt, sample_prompt

WRITERS = (
    write_good_response,
    write_incomplete_response,
    write_false_response,
    write_lazy_response,
    write_rude_response,
    write_rambling_response,
    write_courteous_response,
)


@pytest.fixture
def fox(make_prompt: Callable[..., TaskPrompt]) -> TaskPrompt:
    return make_prompt("open_qa", "what colour is the fox ?", animal="fox", attribute="colour")


def make_items(count: int, seed: int = 0) -> list[tuple[TaskPrompt, list[tuple[str, bool]]]]:
    rng = Random(seed)
    prompts = [sample_prompt(rng) for _ in range(count)]
    return [(prompt, [(write(rng, prompt), True) for write in WRITERS]) for prompt in prompts]


def test_a_rating_without_noise_is_the_weighted_sum(fox: TaskPrompt) -> None:
    labeler = Labeler("one", LabelerWeights(2.0, 1.0, 3.0, 0.5, 0.25), noise=0.0, seed=0)
    assert labeler.rate(fox, "the fox is red .") == pytest.approx(1 + 2 + 1 + 0.5)
    assert labeler.rate(fox, "the fox is grey .") == pytest.approx(1 + 0.5)
    assert labeler.rate(fox, "you silly clown , the fox is red .") == pytest.approx(1 + 2 + 1 - 3 + 0.5 * 4 / 6)
    assert labeler.rate(fox, "the fox is red . hope this helps !") == pytest.approx(1 + 2 + 1 + 0.5 + 0.25)
    assert labeler.rate(fox, "the fox is red .", finished=False) == pytest.approx(1 + 2 + 1 + 0.25)
    assert labeler.rate_likert(fox, "the fox is grey .") == 2  # 1.5 rounds to even
    assert labeler.rate_likert(fox, "you silly clown .") == 1


def test_the_noise_is_a_fixed_standard_normal(fox: TaskPrompt) -> None:
    silent = Labeler("one", LabelerWeights(2.0, 1.0, 3.0, 0.5, 0.25), noise=0.0, seed=0)
    noisy = Labeler("one", silent.weights, noise=0.5, seed=0)
    texts = [f"text {number}" for number in range(4000)]
    noise = [(noisy.rate(fox, text) - silent.rate(fox, text)) / 0.5 for text in texts]
    assert noise == [(noisy.rate(fox, text) - silent.rate(fox, text)) / 0.5 for text in texts]
    assert statistics.fmean(noise) == pytest.approx(0.0, abs=4 / math.sqrt(4000))
    assert statistics.stdev(noise) == pytest.approx(1.0, abs=4 / math.sqrt(8000))
    for other in (Labeler("two", silent.weights, 0.5, 0), Labeler("one", silent.weights, 0.5, 1)):
        theirs = [(other.rate(fox, text) - silent.rate(fox, text)) / 0.5 for text in texts]
        assert abs(statistics.correlation(noise, theirs)) < 4 / math.sqrt(4000)


def test_ratings_are_the_same_in_every_process(fox: TaskPrompt) -> None:
    labelers = build_training_labelers(3) + build_heldout_labelers(3)
    expected = [labeler.rate(fox, "the fox is red .") for labeler in labelers]
    code = (
        "from lit_rlhf.synthetic.labelers import *; from lit_rlhf.synthetic.tasks import TaskPrompt\n"
        f"prompt = TaskPrompt({fox.text!r}, {fox.task!r}, {fox.target!r})\n"
        "labelers = build_training_labelers(3) + build_heldout_labelers(3)\n"
        "print([labeler.rate(prompt, 'the fox is red .') for labeler in labelers])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == str(expected)


def test_ranking_is_dense_ordered_by_likert_and_ties_stay() -> None:
    labeler = build_training_labelers(0)[0]
    for prompt, responses in make_items(50):
        ranks = rank_responses(labeler, prompt, responses + responses[:2])
        ratings = [labeler.rate_likert(prompt, *response) for response in responses + responses[:2]]
        assert sorted(set(ranks)) == list(range(len(set(ranks))))
        for one, mine in zip(ranks, ratings):
            for other, theirs in zip(ranks, ratings):
                assert (one < other) == (mine > theirs) and (one == other) == (mine == theirs)
        assert ranks[:2] == ranks[-2:]  # the same text, the same rank


@given(seed=st.integers(0, 10_000))
def test_preference_is_antisymmetric_and_half_against_itself(seed: int) -> None:
    rng = Random(seed)
    prompt = sample_prompt(rng)
    one, other = ((rng.choice(WRITERS)(rng, prompt), True) for _ in range(2))
    judges = build_heldout_labelers(0)
    assert compute_preference(judges, prompt, one, other) + compute_preference(
        judges, prompt, other, one
    ) == pytest.approx(1.0)
    assert compute_preference(judges, prompt, one, one) == 0.5


def test_agreement_of_the_like_minded_the_opposed_and_the_indifferent(fox: TaskPrompt) -> None:
    likes = Labeler("likes", LabelerWeights(3.0, 0.0, 0.0, 0.0, 0.0), 0.0, 0)
    dislikes = Labeler("dislikes", LabelerWeights(-3.0, 0.0, 0.0, 6.0, 0.0), 0.0, 0)
    indifferent = Labeler("indifferent", LabelerWeights(0.0, 0.0, 0.0, 0.0, 0.0), 0.0, 0)
    items = [(fox, [("the fox is red .", True), ("the fox is grey .", True)])]
    assert compute_agreement([likes, likes], items) == 1.0
    assert compute_agreement([likes, dislikes], items) == 0.0
    assert compute_agreement([likes, likes, dislikes], items) == pytest.approx(1 / 3)
    assert math.isnan(compute_agreement([likes, indifferent], items))


@pytest.mark.parametrize("seed", range(3))
def test_groups_agree_about_as_the_papers_do_and_differ_in_taste(seed: int) -> None:
    training, heldout = build_training_labelers(seed), build_heldout_labelers(seed)
    assert (len(training), len(heldout)) == (8, 5)
    assert not {labeler.name for labeler in training} & {labeler.name for labeler in heldout}
    items = make_items(60, seed)
    assert 0.70 < compute_agreement(training, items) < 0.88
    assert 0.68 < compute_agreement(heldout, items) < 0.88

    def mean(labelers: list[Labeler], part: str) -> float:
        return statistics.fmean(getattr(labeler.weights, part) for labeler in labelers)

    assert mean(training, "helpfulness") > mean(training, "truth")
    assert mean(training, "courtesy") > 0 > mean(heldout, "courtesy")
    assert mean(heldout, "truth") / mean(heldout, "helpfulness") > mean(training, "truth") / mean(
        training, "helpfulness"
    )
