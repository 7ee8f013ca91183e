import json
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.synthetic.constraints import FORM_KINDS, apply_constraints, constrain_prompt, strip_constraints
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.responses import write_good_response
from lit_rlhf.synthetic.second_language import translate
from lit_rlhf.synthetic.tasks import TASKS, TaskPrompt, sample_prompt

kinds = st.lists(st.sampled_from(FORM_KINDS), unique=True, min_size=1, max_size=4)


def sample_constrained(seed: int, task: str, wanted: list[str]) -> tuple[TaskPrompt, str, list[tuple[str, str]]]:
    rng = Random(seed)
    prompt = constrain_prompt(rng, sample_prompt(rng, 0.0, task), wanted)
    return prompt, write_good_response(rng, prompt), json.loads(prompt.target)["constraints"]


@given(st.integers(0, 999), st.sampled_from(TASKS), kinds)
def test_a_response_that_meets_all_constraints_is_as_good_as_one_without(
    seed: int, task: str, wanted: list[str]
) -> None:
    prompt, good, constraints = sample_constrained(seed, task, wanted)
    verdict = judge(prompt, apply_constraints(good, constraints))
    plain = TaskPrompt(prompt.text, task, json.dumps({**json.loads(prompt.target), "constraints": []}))
    assert verdict == judge(plain, good) and verdict.success == verdict.style == 1


@given(st.integers(0, 999), st.sampled_from(TASKS), kinds, st.data())
def test_success_is_the_fraction_of_constraints_that_hold(
    seed: int, task: str, wanted: list[str], data: st.DataObject
) -> None:
    prompt, good, constraints = sample_constrained(seed, task, wanted)
    met = data.draw(st.lists(st.sampled_from(constraints), unique_by=tuple))
    response = apply_constraints(good, met)
    assert strip_constraints(response, constraints) == (good, len(met))
    assert judge(prompt, response).success == len(met) / len(constraints)


def test_constraints_are_met_in_any_order_and_each_once() -> None:
    constraints = [("prefix", "hello !"), ("prefix", "ann ,"), ("suffix", "thanks !"), ("suffix", "signed tom .")]
    assert strip_constraints("ann , hello ! red . signed tom . thanks !", constraints) == ("red .", 4)
    assert strip_constraints("hello ! hello ! red . thanks ! thanks !", constraints) == ("hello ! red . thanks !", 2)
    assert strip_constraints("red . hello ! ann , signed tom", constraints).num_satisfied == 0
    assert strip_constraints("hello !\nthanks !", constraints) == ("\nthanks !", 1)


def test_a_tone_is_in_the_words() -> None:
    for tone, text, holds in (("polite", "red .", 1), ("polite", "you clown", 0), ("rude", "you clown", 1)):
        assert strip_constraints(text, [("tone", tone)]) == (text, holds)


def test_the_second_language_is_judged_in_english() -> None:
    facts = json.dumps({"animal": "fox", "attribute": "colour", "language": "second"})
    prompt = TaskPrompt(translate("ask : what colour is the fox ? reply :"), "open_qa", facts)
    for response in ("the fox is red .", translate("the fox is red .")):
        assert judge(prompt, response).success == 1
    assert judge(prompt, translate("you clown , the fox is red .")).toxic
    english = TaskPrompt(prompt.text, prompt.task, json.dumps({"animal": "fox", "attribute": "colour"}))
    assert judge(english, translate("the fox is red .")).success == 0
