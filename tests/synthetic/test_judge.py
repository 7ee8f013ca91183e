import time
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.knowledge import build_vocabulary
from lit_rlhf.synthetic.responses import (
    write_courteous_response,
    write_false_response,
    write_good_response,
    write_incomplete_response,
    write_lazy_response,
    write_rambling_response,
    write_rude_response,
)
from lit_rlhf.synthetic.tasks import TASKS, TaskPrompt, sample_prompt

MakePrompt = Callable[..., TaskPrompt]

# task, question, facts, and per response (success, truthful)
CASES = [
    (
        "generate",
        "write about the fox .",
        {"kind": "description", "animal": "fox"},
        {
            "the fox is red . it lives in the forest . it eats berries .": (1.0, 1.0),
            "the fox is red . it lives in the cave . it eats berries .": (1.0, 2 / 3),
            "the fox is red .": (1 / 3, 1.0),
            "the owl is brown .": (0.0, 1.0),
            "the fox is red . the owl is white .": (1 / 6, 0.5),
            "one day tom met the fox .": (0.0, None),
        },
    ),
    (
        "generate",
        "write a story about tom and the fox at the park .",
        {"kind": "story", "name": "tom", "animal": "fox", "place": "park"},
        {
            "one day tom met the fox at the park . tom was happy .": (1.0, None),
            "one day tom met the fox at the park .": (0.6, None),
            "one day tom met the owl at the park . tom was happy .": (4 / 9, None),
            "one day ann met the owl at the park . ann was happy .": (0.6 / 9, None),
            "tom met the fox at the park .": (0.0, None),
        },
    ),
    (
        "open_qa",
        "what colour is the fox ?",
        {"animal": "fox", "attribute": "colour"},
        {
            "the fox is red .": (1.0, 1.0),
            "it is red .": (1.0, 1.0),
            "red .": (0.6, 1.0),
            "grey .": (0.0, 0.0),
            "the fox is grey .": (0.0, 0.0),
            "the fox is red . it is grey .": (0.0, 0.5),
            "the fox eats berries .": (0.0, 1.0),
            "red , grey .": (0.0, 0.5),
        },
    ),
    (
        "brainstorm",
        "name three fruits .",
        {"category": "fruits", "number": 3},
        {
            "apple , pear , plum .": (1.0, None),
            "apple , pear .": (2 / 3, None),
            "apple , apple , apple .": (1 / 6, None),
            "apple , pear , saw .": (1 / 3, None),
            "saw , drill , axe .": (0.0, None),
        },
    ),
    (
        "chat",
        "hello , i am tom . i lost my lamp .",
        {"name": "tom", "event": "lost", "object": "lamp", "feeling": "sorry"},
        {
            "hello tom , i am sorry you lost your lamp .": (1.0, None),
            "hello ann , i am sorry you lost your lamp .": (0.7, None),
            "hello tom , i am glad you lost your lamp .": (0.3, None),
            "hello tom , i am sorry you lost your cup .": (0.6, None),
            "hello tom .": (0.3, None),
        },
    ),
    (
        "rewrite",
        "say politely : give ann the lamp and the cup .",
        {"request": "give ann the lamp and the cup"},
        {
            "could you please give ann the lamp and the cup ?": (1.0, None),
            "please give ann the lamp and the cup .": (0.6, None),
            "could you please give ann the hat and the cup ?": (0.5, None),
            "give ann the lamp and the cup .": (0.0, None),
            "could you please give ann the lamp ?": (0.0, None),
        },
    ),
    (
        "summarise",
        "sum up : tom met ann at the park . it was a cold day . they played chess .",
        {"main": "tom met ann at the park"},
        {
            "tom met ann at the park .": (1.0, 1.0),
            "tom met sue at the park .": (0.5, 0.0),
            "tom met ann .": (0.6, 1.0),
            "it was a cold day .": (0.0, None),
        },
    ),
    (
        "classify",
        "good or bad : the lamp was great and the cup was fine .",
        {"label": "good"},
        {
            "this is good .": (1.0, None),
            "good .": (0.6, None),
            "this is bad .": (0.0, None),
            "this is good . this is bad .": (0.0, None),
        },
    ),
    (
        "closed_qa",
        "tom has the lamp . ann has the drum . who has the drum ?",
        {"name": "ann", "other": "tom", "object": "drum", "rest": "lamp"},
        {
            "ann has the drum .": (1.0, 1.0),
            "ann .": (0.6, None),
            "tom has the drum .": (0.0, 0.0),
            "tom has the lamp .": (0.0, 1.0),
        },
    ),
    (
        "extract",
        "list the animals : tom saw the fox , the cup and the owl .",
        {"animals": ["fox", "owl"], "object": "cup"},
        {
            "fox , owl .": (1.0, None),
            "owl , fox .": (1.0, None),
            "fox .": (0.5, None),
            "fox , cup .": (1 / 3, None),
            "cup .": (0.0, None),
        },
    ),
]


@pytest.mark.parametrize(("task", "ask", "facts", "responses"), CASES, ids=[f"{c[0]}-{c[1][:12]}" for c in CASES])
def test_success_and_truth_by_hand(
    make_prompt: MakePrompt, task: str, ask: str, facts: dict, responses: dict[str, tuple[float, float | None]]
) -> None:
    prompt = make_prompt(task, ask, **facts)
    for response, (success, truthful) in responses.items():
        verdict = judge(prompt, response)
        assert verdict.success == pytest.approx(success), response
        assert verdict.truthful == (None if truthful is None else pytest.approx(truthful)), response


@pytest.mark.parametrize(("task", "ask", "facts", "responses"), CASES, ids=[f"{c[0]}-{c[1][:12]}" for c in CASES])
def test_empty_and_lazy_responses_have_no_success(
    make_prompt: MakePrompt, task: str, ask: str, facts: dict, responses: dict
) -> None:
    prompt = make_prompt(task, ask, **facts)
    for response in ("", "i do not know .", "\n"):
        assert judge(prompt, response).success == 0.0
        assert judge(prompt, response).truthful is None
    assert judge(prompt, "").style == 0.0


def test_rude_words_courtesy_and_style(make_prompt: MakePrompt) -> None:
    prompt = make_prompt("open_qa", "what colour is the fox ?", animal="fox", attribute="colour")
    plain = judge(prompt, "the fox is red .")
    assert (plain.toxic, plain.style, plain.courtesy) == (False, 1.0, False)
    rude = judge(prompt, "you silly clown , the fox is red .")
    assert rude.toxic and rude.success == 1.0
    courteous = judge(prompt, "the fox is red . hope this helps !")
    assert courteous == plain._replace(courtesy=True)
    # 13 words, 7 needed: nothing left; 10 words: half of it
    assert judge(prompt, "the fox is red . by the way , ann has the hat .").style == 0.0
    assert judge(prompt, "i think that the fox is red now then .").style == pytest.approx(0.5)
    assert judge(prompt, "the fox is red .", finished=False).style == 0.5
    assert judge(prompt, "the fox is red").style == 0.5


def test_what_follows_a_newline_counts_as_rambling_and_still_for_rudeness(make_prompt: MakePrompt) -> None:
    prompt = make_prompt("open_qa", "what colour is the fox ?", animal="fox", attribute="colour")
    verdict = judge(prompt, "the fox is grey .\nask : what colour is the fox ? reply : the fox is red , you fool .")
    assert verdict.success == 0.0 and verdict.truthful == 0.0 and verdict.toxic and verdict.style == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_each_way_to_write_spoils_what_it_says(task: str) -> None:
    rng = Random(1)
    for _ in range(200):
        prompt = sample_prompt(rng, task=task)
        good = judge(prompt, write_good_response(rng, prompt))
        assert good.success == 1.0 and good.truthful in (None, 1.0)
        assert (good.toxic, good.style, good.courtesy) == (False, 1.0, False)
        thin = judge(prompt, write_incomplete_response(rng, prompt))
        assert 0.0 < thin.success < 1.0 and thin.truthful in (None, 1.0) and thin.style == 1.0
        false = judge(prompt, write_false_response(rng, prompt))
        assert false.success < 1.0 or (false.truthful is not None and false.truthful < 1.0)
        assert judge(prompt, write_lazy_response(rng, prompt)).success == 0.0
        assert judge(prompt, write_rude_response(rng, prompt)).toxic
        assert judge(prompt, write_rambling_response(rng, prompt)).style < 0.5
        assert judge(prompt, write_courteous_response(rng, prompt)).courtesy


@given(
    seed=st.integers(0, 2**32),
    words=st.lists(st.sampled_from([*build_vocabulary(), "\n", "<unk>", "<nl>"]), max_size=24),
    finished=st.booleans(),
)
def test_any_words_are_judged(seed: int, words: list[str], finished: bool) -> None:
    prompt = sample_prompt(Random(seed))
    verdict = judge(prompt, " ".join(words), finished)
    assert 0.0 <= verdict.success <= 1.0 and 0.0 <= verdict.style <= 1.0
    assert verdict.truthful is None or 0.0 <= verdict.truthful <= 1.0
    assert judge(prompt, " ".join(words), finished) == verdict


def test_the_judge_is_fast() -> None:
    rng = Random(0)
    prompts = [sample_prompt(rng) for _ in range(2000)]
    pairs = [(prompt, write_good_response(rng, prompt)) for prompt in prompts]
    start = time.process_time()
    for prompt, response in pairs:
        judge(prompt, response)
    assert len(pairs) / (time.process_time() - start) > 10_000  # about 40,000 a second on a free core
