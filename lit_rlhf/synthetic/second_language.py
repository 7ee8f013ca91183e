"""The second language: English word for word, with the first letter of a word at its end, and "ay" after it.

`the fox is red .` is `hetay oxfay siay edray .`. Names, numerals of the notation and punctuation are the same in both,
and so are the frame words `ask` and `reply` of a prompt. The rule is the one of Pig Latin without its exceptions, so
that it is invertible.
"""

from collections.abc import Iterable

from lit_rlhf.synthetic.knowledge import NAMES, build_paper_vocabulary

SHARED_WORDS = frozenset((*NAMES, "ask", "reply"))
ENDING = "ay"


def translate_word(word: str) -> str:
    """Return an English word in the second language."""
    if word in SHARED_WORDS or not word.isalpha():
        return word
    return f"{word[1:]}{word[0]}{ENDING}"


def translate(text: str) -> str:
    """Return an English text in the second language; line breaks are kept."""
    return "\n".join(" ".join(map(translate_word, line.split())) for line in text.split("\n"))


def build_second_vocabulary(words: Iterable[str]) -> list[str]:
    """Return the words that the second language adds to `words`, sorted."""
    known = set(words)
    return sorted({translate_word(word) for word in known} - known)


_ENGLISH = {translate_word(word): word for word in build_paper_vocabulary() if translate_word(word) != word}


def translate_back(text: str) -> str:
    """Return a text with every word of the second language in English; other words stay as they are."""
    return "\n".join(" ".join(_ENGLISH.get(word, word) for word in line.split()) for line in text.split("\n"))


def is_second_language(text: str) -> bool:
    """Return whether most words of a text that differ between the languages are of the second."""
    second = sum(word in _ENGLISH for word in text.split())
    return second > sum(translate_word(word) in _ENGLISH for word in text.split())
