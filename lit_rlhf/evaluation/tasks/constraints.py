"""The 25 constraints of IFEval (Zhou et al., 2023), each a check of a text that needs no model.

Sentences and capitalised words are counted by rules of our own (the data set's authors use a trained splitter), and a
language is told by `langdetect`.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from lit_rlhf.errors import UserError

Settings = dict[str, Any]


def satisfies_constraint(name: str, settings: Settings, text: str) -> bool:
    """Whether a text keeps a constraint; an empty text keeps none.

    Raises:
        UserError: no such constraint.
    """
    if name not in CONSTRAINTS:
        raise UserError(f"ifeval: unknown constraint {name!r}; known are {', '.join(sorted(CONSTRAINTS))}")
    return bool(text.strip()) and CONSTRAINTS[name](text, settings)


def relaxed_variants(text: str) -> list[str]:
    """Return the forms of a text that are tried loosely: first or last line cut off, emphasis taken out."""
    lines = text.split("\n")
    forms = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    forms = [form.strip() for form in forms]
    return [text, *forms, *(form.replace("*", "") for form in forms)]


def compare_count(count: int, relation: str, number: int) -> bool:
    """Whether a count is "less than" or "at least" a number."""
    return count < number if relation == "less than" else count >= number


def split_words(text: str) -> list[str]:
    """The words of a text."""
    return re.findall(r"\w+", text)


def count_sentences(text: str) -> int:
    """How many sentences: ends of . ! ? … that white space or the text's end follows, abbreviations apart."""
    bare = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z])\.", r"\1", text.strip())
    parts = re.split(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n{2,}", bare)
    return sum(bool(re.search(r"\w", part)) for part in parts)


def detect_language(text: str) -> str:
    """The language's code."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        return str(detect(text))
    except LangDetectException:  # nothing to tell a language by
        return ""


def is_english_with_case(text: str, right: bool) -> bool:
    """Whether the case is right and the text may be English."""
    return right and detect_language(text) in ("en", "")


def two_responses(text: str, settings: Settings) -> bool:
    """Exactly two different answers, six asterisks between them."""
    parts = [part.strip() for part in text.split("******")]
    inner = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def postscript(text: str, settings: Settings) -> bool:
    """A postscript that begins with the marker."""
    marker = settings["postscript_marker"]
    letters = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(rf"\s*{letters}.*$", text.lower(), re.MULTILINE) is not None


def json_format(text: str, settings: Settings) -> bool:
    """The whole text is JSON, perhaps within a fence."""
    bare = re.sub(r"^```(json|JSON|Json)?|```$", "", text.strip()).strip()
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def highlighted(text: str, settings: Settings) -> bool:
    """At least so many parts in asterisks."""
    found = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in found) >= settings["num_highlights"]


def sections(text: str, settings: Settings) -> bool:
    """At least so many headed, numbered sections."""
    head = settings.get("section_spliter") or settings.get("section_splitter", "")
    return len(re.split(rf"\s?{re.escape(head)}\s?\d+\s?", text)) - 1 >= settings["num_sections"]


def paragraphs(text: str, settings: Settings) -> bool:
    """Exactly so many parts between lines of three asterisks."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    filled = [bool(part.strip()) for part in parts]
    return all(filled[1:-1]) and sum(filled) == settings["num_paragraphs"]


def nth_first_word(text: str, settings: Settings) -> bool:
    """So many paragraphs between blank lines, and one of them begins with a word."""
    parts = [part.strip() for part in re.split(r"\n\n", text) if part.strip()]
    nth = settings["nth_paragraph"]
    if len(parts) != settings["num_paragraphs"] or not 1 <= nth <= len(parts):
        return False
    first = re.match(r"\W*(\w+)", parts[nth - 1])
    return first is not None and first.group(1).lower() == settings["first_word"].lower()


def keyword_count(text: str, settings: Settings) -> bool:
    """A keyword so often."""
    count = len(re.findall(re.escape(settings["keyword"]), text, re.IGNORECASE))
    return compare_count(count, settings["relation"], settings["frequency"])


def letter_count(text: str, settings: Settings) -> bool:
    """A letter so often."""
    count = text.lower().count(settings["letter"].lower())
    return compare_count(count, settings["let_relation"], settings["let_frequency"])


def capital_count(text: str, settings: Settings) -> bool:
    """So many words all in capitals."""
    count = sum(word.isupper() for word in split_words(text))
    return compare_count(count, settings["capital_relation"], settings["capital_frequency"])


def bullets(text: str, settings: Settings) -> bool:
    """Exactly so many lines that begin with an asterisk or a hyphen."""
    found = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE) + re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(found) == settings["num_bullets"]


CONSTRAINTS: dict[str, Callable[[str, Settings], bool]] = {
    "change_case:capital_word_frequency": capital_count,
    "change_case:english_capital": lambda text, _: is_english_with_case(text, text.isupper()),
    "change_case:english_lowercase": lambda text, _: is_english_with_case(text, text.islower()),
    "combination:repeat_prompt": lambda text, s: text.strip().lower().startswith(s["prompt_to_repeat"].strip().lower()),
    "combination:two_responses": two_responses,
    "detectable_content:number_placeholders": lambda t, s: len(re.findall(r"\[.*?\]", t)) >= s["num_placeholders"],
    "detectable_content:postscript": postscript,
    "detectable_format:constrained_response": lambda t, _: re.search(r"My answer is (yes|no|maybe)\.", t) is not None,
    "detectable_format:json_format": json_format,
    "detectable_format:multiple_sections": sections,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:number_highlighted_sections": highlighted,
    "detectable_format:title": lambda t, _: any(part.strip() for part in re.findall(r"<<([^\n]+)>>", t)),
    "keywords:existence": lambda t, s: all(re.search(re.escape(w), t, re.IGNORECASE) for w in s["keywords"]),
    "keywords:forbidden_words": lambda t, s: (
        not any(re.search(rf"\b{re.escape(w)}\b", t, re.IGNORECASE) for w in s["forbidden_words"])
    ),
    "keywords:frequency": keyword_count,
    "keywords:letter_frequency": letter_count,
    "language:response_language": lambda text, s: detect_language(text) == s["language"],
    "length_constraints:nth_paragraph_first_word": nth_first_word,
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:number_sentences": lambda t, s: compare_count(count_sentences(t), s["relation"], s["num_sentences"]),
    "length_constraints:number_words": lambda t, s: compare_count(len(split_words(t)), s["relation"], s["num_words"]),
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": lambda t, s: t.strip().strip('"').lower().endswith(s["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, _: len(t.strip()) > 1 and t.strip()[0] == '"' == t.strip()[-1],
}
