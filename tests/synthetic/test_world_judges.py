"""The world's labelers as judges: the same votes as theirs, and the quickstart's win rate by the common code."""

import json
from random import Random

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.cache import Cache
from lit_rlhf.evaluation.judges.judging_types import AnswerPair, RatedItem
from lit_rlhf.evaluation.judges.pairwise import compare_answers
from lit_rlhf.evaluation.models.generation import Answer
from lit_rlhf.evaluation.win_rate import win_rate
from lit_rlhf.synthetic.judges import SimulatedLabelers
from lit_rlhf.synthetic.labelers import heldout_labelers
from lit_rlhf.synthetic.responses import false_response, good_response, rude_response
from lit_rlhf.synthetic.tasks import sample_prompt

NOTHING = Cache(None)


@pytest.fixture(scope="module")
def pairs() -> list[AnswerPair]:
    rng = Random(5)
    found = []
    for number in range(40):
        prompt = sample_prompt(rng)
        first, second = good_response(rng, prompt), (false_response, rude_response)[number % 2](rng, prompt)
        if number % 4 == 0:
            second = first
        row = {"task": prompt.task, "target": prompt.target}
        found.append(AnswerPair(prompt.text, row, Answer(first, True, 5), Answer(second, number % 3 > 0, 5)))
    return found


def test_the_win_rate_is_the_labelers_own_count(pairs) -> None:
    from lit_rlhf.synthetic.tasks import TaskPrompt

    votes, clusters = [], []
    for number, pair in enumerate(pairs):
        prompt = TaskPrompt(pair.prompt, pair.row["task"], pair.row["target"])
        for labeler in heldout_labelers(3):
            one = labeler.likert(prompt, pair.first.text, pair.first.ended)
            other = labeler.likert(prompt, pair.second.text, pair.second.ended)
            votes.append(0.5 if one == other else float(one > other))
            clusters.append(number)
    assert compare_answers(SimulatedLabelers(3), pairs, NOTHING).rate() == win_rate(votes, clusters)
    same = [pair._replace(second=pair.first) for pair in pairs]
    assert compare_answers(SimulatedLabelers(3), same, NOTHING).rate()[:3] == (0.5, 0.5, 0.5)


def test_ratings_carry_what_the_world_knows(pairs) -> None:
    items = [RatedItem(pair.prompt, pair.row, pair.second) for pair in pairs]
    rated = SimulatedLabelers(3, group="training").rate(items, NOTHING)
    assert {len(ratings) for ratings in rated} == {8}
    assert all(1 <= rating.overall <= 7 for ratings in rated for rating in ratings)
    rude = [ratings[0].flags["inappropriate_for_assistant"] for ratings in rated]
    assert any(rude) and not all(rude)


def test_a_prompt_of_another_world_is_refused() -> None:
    answer = Answer("red .", True, 2)
    for row in ({}, {"task": "open_qa"}, {"task": "poetry", "target": json.dumps({})}):
        with pytest.raises(UserError, match="prompts of the synthetic world only"):
            SimulatedLabelers().compare([AnswerPair("ask : x reply :", row, answer, answer)], NOTHING)
