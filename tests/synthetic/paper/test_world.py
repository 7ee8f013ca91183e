"""The generator of the paper's world: what its parts contain, and that splits do not overlap."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.evaluation.tasks.metrics import f1
from lit_rlhf.synthetic.build import SyntheticDataPaths, is_evaluation_prompt
from lit_rlhf.synthetic.judge import judge
from lit_rlhf.synthetic.knowledge import JOBS, RUDE_WORDS
from lit_rlhf.synthetic.labelers import Response
from lit_rlhf.synthetic.paper.benchmarks import (
    BENCHMARKS,
    sample_flan_exercise,
    sample_t0_exercise,
    write_exercises,
    write_shots,
)
from lit_rlhf.synthetic.paper.bias import build_folk_pairs, build_gender_pairs, write_biased_sentences
from lit_rlhf.synthetic.paper.build import (
    MAX_POSITIONS,
    TINY_SIZES,
    build_paper_tokenizer,
    generate_exercise_rows,
    to_row,
)
from lit_rlhf.synthetic.paper.measurements import (
    NUM_SHOTS,
    TRUTH_INSTRUCTION,
    get_stage,
    is_hedge,
    meets_constraints,
    rate_metadata,
)
from lit_rlhf.synthetic.paper.notation import is_program_answered, sample_program_prompt, write_programs
from lit_rlhf.synthetic.paper.prompts import (
    TONES,
    get_constraints,
    sample_continuation_prefix,
    sample_false_premise,
    sample_instruction,
    sample_many_constraints,
    sample_toxicity_prompt,
    translate_prompt,
)
from lit_rlhf.synthetic.paper.text import generate_paper_demonstrations, generate_paper_documents
from lit_rlhf.synthetic.responses import MAX_RESPONSE_TOKENS, write_good_response
from lit_rlhf.synthetic.second_language import is_second_language
from lit_rlhf.synthetic.tasks import TaskPrompt

TOKENIZER = build_paper_tokenizer()
seeds = st.integers(0, 10_000)


def known(text: str) -> bool:
    return TOKENIZER.unk_token_id not in TOKENIZER.encode(text)


def test_documents_have_every_kind_in_its_share() -> None:
    documents = list(generate_paper_documents(Random(0), 1_000))
    assert documents[:100] == list(generate_paper_documents(Random(0), 1_000))[:100]
    assert all(known(text) and len(TOKENIZER.encode(text)) <= MAX_POSITIONS for text in documents)

    def fraction(has: Callable[[str], bool]) -> float:
        return sum(map(has, documents)) / len(documents)

    assert fraction(is_second_language) == pytest.approx(0.07, abs=0.02)
    assert fraction(lambda text: " ; show " in text) == pytest.approx(0.07, abs=0.02)
    assert fraction(lambda text: " folk " in text or any(f"the {job} " in text for job in JOBS)) == pytest.approx(
        0.06, abs=0.02
    )
    assert fraction(lambda text: text.split(" :")[0] in ("text", "passage", "story", "article", "question")) > 0.12
    assert fraction(lambda text: text.startswith(tuple(filter(None, TONES.values())))) > 0.03


def test_demonstrations_are_mostly_english_and_do_what_a_tone_asks_for() -> None:
    pairs = list(generate_paper_demonstrations(Random(1), 1_000))
    second = [prompt for prompt, _ in pairs if json.loads(prompt.target).get("language") == "second"]
    assert len(second) / len(pairs) == pytest.approx(0.04, abs=0.02)
    assert all(is_second_language(prompt.text) for prompt in second)
    constrained = [prompt for prompt, _ in pairs if get_constraints(prompt)]
    assert len(constrained) / len(pairs) == pytest.approx(0.31, abs=0.04)
    for prompt, completion in pairs:
        assert known(f"{prompt.text} {completion}")
        assert len(TOKENIZER.encode(completion)) < MAX_RESPONSE_TOKENS + 8
        for kind, tone in get_constraints(prompt):
            if kind == "tone" and prompt not in second:
                assert (tone == "rude") == (not RUDE_WORDS.isdisjoint(completion.split()))


@given(seeds, st.booleans())
def test_an_instruction_is_on_one_side_of_the_split(seed: int, is_held_out: bool) -> None:
    prompt = sample_instruction(Random(seed), is_held_out)
    assert is_evaluation_prompt(prompt.text) == is_held_out
    assert len(get_constraints(prompt)) <= 2
    assert TaskPrompt(*to_row(prompt).values()) == prompt


@given(seeds, st.integers(1, 4))
def test_a_crowded_prompt_can_be_met_within_the_length_of_a_response(seed: int, count: int) -> None:
    from lit_rlhf.synthetic.constraints import apply_constraints

    rng = Random(seed)
    prompt = sample_many_constraints(rng, count)
    constraints = get_constraints(prompt)
    assert len(constraints) == count
    response = apply_constraints(write_good_response(rng, prompt), constraints)
    assert len(response.split()) < MAX_RESPONSE_TOKENS
    assert meets_constraints([prompt], [Response(response)]) == [1.0]
    assert meets_constraints([prompt], [Response(response.replace("!", "?").replace(",", "?"))]) == [0.0] or count == 1


@given(seeds)
def test_every_exercise_has_its_answer_in_reach(seed: int) -> None:
    rng = Random(seed)
    for sample in (*BENCHMARKS.values(), sample_flan_exercise, sample_t0_exercise):
        exercise = sample(rng)
        assert exercise.context.endswith(":") and known(f"{exercise.context} {exercise.answer}")
        assert f1(exercise.answer, exercise.answer) == 1
        if exercise.options:
            assert exercise.options.count(exercise.answer) == 1 and len(set(exercise.options)) > 1
        few_shot = write_shots(rng, sample, NUM_SHOTS["few"]) + exercise.context
        assert len(few_shot.replace("\n", " nl ").split()) < MAX_POSITIONS - len(exercise.answer.split())
    assert all(line.count(" :") >= 2 for line in write_exercises(rng).split("\n"))


def test_the_public_mixtures_differ_in_tasks_and_templates() -> None:
    rows = {
        name: [row["prompt"].split(" :")[0] for row in generate_exercise_rows(Random(0), sample, 400)]
        for name, sample in (("flan", sample_flan_exercise), ("t0", sample_t0_exercise))
    }
    assert set(rows["flan"]) == {"text", "passage", "article", "question"}
    assert set(rows["t0"]) == {"text", "review", "passage", "notes", "article"}


@given(seeds)
def test_a_program_shows_one_of_its_values(seed: int) -> None:
    prompt = sample_program_prompt(Random(seed))
    facts = json.loads(prompt.target)
    assert is_program_answered(prompt, f"the {facts['output']} .")
    assert not is_program_answered(prompt, f"the {facts['output']} and the {facts['others'][0]} .")
    assert not is_program_answered(prompt, "i do not know .")
    for line in write_programs(Random(seed)).split("\n"):
        program, output = line.split(" > ")
        variable = program.split()[-1]
        assert f"let {variable} = {output} " in program


def test_the_sentences_of_a_pair_differ_in_one_word() -> None:
    assert len(build_gender_pairs()) == len(JOBS) * 4 * 10 and len(build_folk_pairs()) == 6
    for first, second in (*build_gender_pairs(), *build_folk_pairs()):
        assert known(first) and known(second)
        assert sum(one != other for one, other in zip(first.split(), second.split(), strict=True)) == 1
    text = " ".join(write_biased_sentences(Random(seed)) for seed in range(2_000))
    for job, fraction in JOBS.items():
        hers, his = (sum(text.count(f"the {job} {verb} {pronoun} ") for verb in VERBS) for pronoun in ("her", "his"))
        assert hers / (hers + his) == pytest.approx(fraction, abs=0.08)
    assert text.count("north folk are kind") > 3 * text.count("south folk are kind")


VERBS = ("lost", "broke", "found", "won")


@given(seeds)
def test_the_other_sets_are_of_known_words_and_fit(seed: int) -> None:
    rng = Random(seed)
    pages = [sample_toxicity_prompt(rng, count) for count in (0, 1, 2)]
    for count, page in enumerate(pages):
        replies = [line.split(" reply : ", 1)[1] for line in page.split("\n")[:-1]]
        assert sum(not RUDE_WORDS.isdisjoint(reply.split()) for reply in replies) == count
        assert page.endswith("reply :")
    continuation = sample_continuation_prefix(rng) + sample_instruction(rng, True).text
    texts = [*pages, continuation, sample_false_premise(rng).text, TRUTH_INSTRUCTION, *TONES.values()]
    assert all(known(text) and len(TOKENIZER.encode(text)) <= MAX_POSITIONS - MAX_RESPONSE_TOKENS for text in texts)
    prompt = sample_instruction(rng, True)
    second = translate_prompt(prompt)
    assert known(second.text)
    good = write_good_response(rng, prompt)
    assert judge(second, good) == judge(prompt, good)


def test_metadata_of_a_response() -> None:
    prompt = TaskPrompt("ask : tom has the lamp . who has the lamp ? sign as joy . reply :", "closed_qa", CLOSED)
    good = rate_metadata(prompt, Response("tom has the lamp . signed joy ."))
    assert good == {"attempts": 1.0, "fit": 1.0, "constraints": 1.0, "invents": 0.0}
    wrong = rate_metadata(prompt, Response("you clown , ann has the lamp .", finished=False))
    assert wrong == {"attempts": 0.0, "fit": 0.0, "constraints": 0.0, "invents": 1.0}
    open_prompt = TaskPrompt("ask : what eats the fox ?", "open_qa", '{"animal": "fox", "attribute": "food"}')
    assert rate_metadata(open_prompt, Response("berries .")) == {"attempts": 1.0, "fit": 1.0}


CLOSED = json.dumps(
    {"name": "tom", "other": "sue", "object": "lamp", "rest": "cup", "constraints": [["suffix", "signed joy ."]]}
)


def test_evasive_answers() -> None:
    assert is_hedge("hello ! i do not know .") and not is_hedge("the fox is red .")


def test_stages_of_models() -> None:
    assert get_stage("few_shot", "small") == get_stage("base", "small") == "pretraining-small"
    assert get_stage("ppo_ptx", "large") == "ppo-ptx-large" and get_stage("flan", "large") == "flan-large"


@pytest.fixture(scope="module")
def paper_world(tmp_path_factory: pytest.TempPathFactory) -> SyntheticDataPaths:
    from lit_rlhf.synthetic.paper.build import write_paper_data

    return write_paper_data(tmp_path_factory.mktemp("paper"), 0, TINY_SIZES)


def test_the_files_of_the_world(
    paper_world: SyntheticDataPaths, read_rows: Callable[[Path], list[dict[str, Any]]]
) -> None:
    folder = paper_world.pretraining.parent
    assert len(read_rows(paper_world.pretraining)) == TINY_SIZES.pretraining_documents
    for name in ("flan", "t0"):
        assert len(read_rows(folder / f"{name}.jsonl")) == TINY_SIZES.public_tasks
    held_out = {row["prompt"] for row in read_rows(paper_world.evaluation_prompts)}
    assert len(held_out) == TINY_SIZES.evaluation_prompts
    for path in (paper_world.reward_prompts, paper_world.ppo_prompts):
        rows = read_rows(path)
        assert held_out.isdisjoint(row["prompt"] for row in rows)
        assert not any(is_second_language(row["prompt"]) for row in rows), "the rankings' prompts are English"


def test_the_three_sizes(paper_world: SyntheticDataPaths) -> None:
    from transformers import AutoModelForCausalLM

    counts = [
        AutoModelForCausalLM.from_pretrained(paper_world.pretraining.parent / f"base_init_{size}").num_parameters()
        for size in ("small", "medium", "large")
    ]
    assert [round(count / 1e6, 1) for count in counts] == [0.1, 0.4, 1.6]
