"""Each of IFEval's constraints: a text that satisfies it, and one that just does not."""

import json

import pytest

from lit_rlhf.data.sources import read_rows
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.tasks.constraints import (
    CONSTRAINTS,
    check_constraint,
    count_sentences,
    relaxed_variants,
    satisfies_constraint,
)

FRENCH = "Il fait très beau aujourd'hui et nous allons nous promener dans le parc avec les enfants."
ENGLISH = "the weather is very nice today and we are going for a walk in the park with the children."
FEWER = {"capital_relation": "less than", "capital_frequency": 2}
DAYS = {"section_spliter": "Day", "num_sections": 2}
TWO = {"num_sentences": 2, "relation": "at least"}
CASES = [
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 2},
        "ONE two",
        "ONE TWO",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "at least", "capital_frequency": 2},
        "ONE TWO",
        "ONE two",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hello."}, "say hello. Hello!", "Hello! Say hello."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one ****** one"),
    ("combination:two_responses", {}, "one ****** two", "one"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] of [town]", "[name] only"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. one more", "Bye."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S one more", "Bye.\nP.S. one"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "My answer is perhaps."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1\na\nDay 2\nb",
        "Day 1\na",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n- two", "* one\n* two\n* three"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and **"),
    ("detectable_format:title", {}, "<<A song>>\nla", "<< >>\nla"),
    ("keywords:existence", {"keywords": ["red", "fox"]}, "A Red fox", "A red dog"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocket", "A Rock."),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, "relation": "at least"}, "fox, FOX", "fox"),
    ("keywords:frequency", {"keyword": "fox", "frequency": 2, "relation": "less than"}, "fox", "fox fox"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zz", "z"),
    ("language:response_language", {"language": "fr"}, FRENCH, ENGLISH),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        "First.\n\n'then' more",
        "Then.\n\nfirst",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n\n***\nb"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "at least"},
        "One. Two!",
        "Mr. One is here.",
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One, two", "One. Two."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    ("punctuation:no_comma", {}, "one; two", "one, two"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So it was. "The end."', "The end. Or not."),
    ("startend:quotation", {}, '"Hello"', '"Hello'),
]


@pytest.mark.parametrize("name, settings, satisfying, violating", CASES)
def test_a_constraint(name, settings, satisfying, violating) -> None:
    assert satisfies_constraint(name, settings, satisfying)
    assert not satisfies_constraint(name, settings, violating)
    assert not satisfies_constraint(name, settings, " \n")


def test_every_constraint_of_the_data_set_is_known_with_its_settings(evaluation_data) -> None:
    rows = read_rows(str(evaluation_data / "ifeval.jsonl"))
    names = {name for row in rows for name in row.fields["instruction_id_list"]}
    assert names <= set(CONSTRAINTS)
    assert {name for name, *_ in CASES} == set(CONSTRAINTS)
    for row in rows:
        for name, settings in zip(row.fields["instruction_id_list"], row.fields["kwargs"]):
            satisfies_constraint(name, settings, "Some text. Of two sentences.\n\nAnd a third.")
    assert json.dumps(sorted(set(CONSTRAINTS) - names)) == "[]"


def test_sentence_count_and_relaxed_variants() -> None:
    assert [count_sentences(text) for text in ("", "One", 'He said "go!" Then left.', "e.g. this", "a\n\nb")] == [
        0,
        1,
        2,
        1,
        2,
    ]
    assert "b" in relaxed_variants("a\nb\nc") and "bold" in relaxed_variants("*bold*")
    with pytest.raises(UserError, match="unknown constraint 'a:b'"):
        satisfies_constraint("a:b", {}, "text")


def test_whole_numbers_of_a_table_with_missing_cells_are_read() -> None:
    settings = {"num_paragraphs": 2.0, "nth_paragraph": 2.0, "first_word": "so"}
    check_constraint("length_constraints:nth_paragraph_first_word", settings, "row 1")
    assert satisfies_constraint("length_constraints:nth_paragraph_first_word", settings, "One.\n\nSo it is.")
