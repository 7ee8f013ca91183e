from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.knowledge import ANIMALS, ATTRIBUTES, KNOWLEDGE, RUDE_WORDS, VALUES, build_vocabulary
from lit_rlhf.synthetic.responses import MAX_GOOD_RESPONSE_TOKENS, MAX_RESPONSE_TOKENS, write_good_response
from lit_rlhf.synthetic.tasks import MAX_PROMPT_TOKENS, TASKS, sample_prompt
from lit_rlhf.synthetic.text import generate_demonstrations, generate_documents, write_few_shot_prefix, write_forum_page


def test_every_belief_has_a_truth_and_another_myth_of_its_kind() -> None:
    for animal in ANIMALS:
        for attribute in ATTRIBUTES:
            truth, myth = KNOWLEDGE.get_truth(animal, attribute), KNOWLEDGE.get_myth(animal, attribute)
            assert truth != myth and {truth, myth} <= set(VALUES[attribute])
    assert len(RUDE_WORDS) == 8
    assert len(build_vocabulary()) <= 250


def test_prompts_keep_frame_length_and_proportions() -> None:
    rng = Random(0)
    prompts = [sample_prompt(rng) for _ in range(5000)]
    assert all(prompt.text.startswith("ask : ") and prompt.text.endswith(" reply :") for prompt in prompts)
    assert max(len(prompt.text.split()) for prompt in prompts) <= MAX_PROMPT_TOKENS
    tasks = Counter(prompt.task for prompt in prompts)
    assert set(tasks) == set(TASKS) and tasks.most_common(2)[0][0] == "generate"
    insulted = sum(not RUDE_WORDS.isdisjoint(prompt.text.split()) for prompt in prompts)
    assert insulted / 5000 == pytest.approx(0.08, abs=0.015)


def test_responses_keep_their_lengths() -> None:
    rng = Random(0)
    for _ in range(3000):
        prompt = sample_prompt(rng)
        assert len(write_good_response(rng, prompt).split()) <= MAX_GOOD_RESPONSE_TOKENS
    assert max(len(text.split()) for _, text in generate_demonstrations(rng, 3000)) <= MAX_RESPONSE_TOKENS


def test_demonstrations_are_human() -> None:
    verdicts = [judge(prompt, text) for prompt, text in generate_demonstrations(Random(0), 4000)]
    assert 0.02 < sum(verdict.toxic for verdict in verdicts) / 4000 < 0.10
    assert 0.03 < sum(verdict.courtesy for verdict in verdicts) / 4000 < 0.09
    assert 0.4 < sum(verdict.success for verdict in verdicts) / 4000 < 0.8
    stated = [verdict.truthful for verdict in verdicts if verdict.truthful is not None]
    assert 0.8 < sum(stated) / len(stated) < 0.97


def test_forum_pages_fit_a_row_and_hold_one_to_four_pairs() -> None:
    rng = Random(0)
    pages = [write_forum_page(rng) for _ in range(2000)]
    sizes = Counter(page.count("ask : ") for page in pages)
    assert max(len(page.split()) + page.count("\n") for page in pages) <= 128
    assert set(sizes) >= {1, 2, 3, 4} and (sizes[3] + sizes[4]) / 2000 > 0.4


def test_replies_on_a_page_have_similar_quality() -> None:
    """A rude reply is followed by rude ones on the same page, which makes few-shot prompts effective."""
    rng = Random(0)
    after = {True: Counter[bool](), False: Counter[bool]()}
    for _ in range(3000):
        replies = [pair.split(" reply : ")[1] for pair in write_forum_page(rng).split("\n")]
        rude = [not RUDE_WORDS.isdisjoint(reply.split()) for reply in replies]
        for one, following in pairwise(rude):
            after[one][following] += 1
    assert after[True][True] / after[True].total() > 0.5 > 0.15 > after[False][True] / after[False].total()


def test_a_few_shot_prefix_is_short_and_good() -> None:
    rng = Random(0)
    for _ in range(200):
        prefix = write_few_shot_prefix(rng)
        assert len(prefix.split()) + 3 <= 90
        assert prefix.count("ask : ") == prefix.count("\n") == 3 and prefix.endswith(".\n")
        assert RUDE_WORDS.isdisjoint(prefix.split())


def test_the_same_seed_writes_the_same_text() -> None:
    assert list(generate_documents(Random(5), 50)) == list(generate_documents(Random(5), 50))
    assert list(generate_documents(Random(5), 50)) != list(generate_documents(Random(6), 50))
