from hypothesis import given
from hypothesis import strategies as st

from lit_rlhf.synthetic.knowledge import NAMES, build_paper_vocabulary
from lit_rlhf.synthetic.second_language import (
    build_second_vocabulary,
    is_second_language,
    translate,
    translate_back,
    translate_word,
)

ENGLISH = build_paper_vocabulary()
texts = st.lists(st.sampled_from([*ENGLISH, "\n"]), max_size=24).map(
    lambda words: " ".join(words).replace(" \n", "\n").replace("\n ", "\n")
)


def test_the_languages_share_no_word_but_names_frame_words_and_signs() -> None:
    second = build_second_vocabulary(ENGLISH)
    assert not set(second) & set(ENGLISH)
    assert len(second) == len(set(second)) == sum(translate_word(word) != word for word in ENGLISH)
    shared = {word for word in ENGLISH if translate_word(word) == word}
    assert {word for word in shared if word.isalpha()} == {*NAMES, "ask", "reply"}


@given(texts)
def test_translating_there_and_back_is_the_identity(text: str) -> None:
    assert translate_back(translate(text)) == text == translate_back(text)


def test_a_fact_in_the_second_language() -> None:
    assert translate("the fox is red .\nask : tom") == "hetay oxfay siay edray .\nask : tom"
    assert is_second_language("hetay oxfay is edray .") and not is_second_language("the fox siay red .")
    assert not is_second_language("tom .")
