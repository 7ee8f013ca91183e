"""The 25 constraints of IFEval (Zhou et al., 2023), each a rule-based check of a text.

Sentences and capitalized words are counted by our own rules (the data set's authors use a trained splitter); languages
are detected by `langdetect`.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from lit_rlhf.errors import UserError

Settings = dict[str, Any]


def satisfies_constraint(name: str, settings: Settings, text: str) -> bool:
    """Return whether a text satisfies a constraint; an empty text satisfies none.

    Raises:
        UserError: unknown constraint.
    """
    if name not in CONSTRAINTS:
        raise UserError(f"ifeval: unknown constraint {name!r}; known are {', '.join(sorted(CONSTRAINTS))}")
    return bool(text.strip()) and CONSTRAINTS[name](text, settings)


def check_constraint(name: Any, settings: Any, origin: str) -> None:
    """Refuse a constraint that cannot be checked; `origin` is the row's file and line.

    Raises:
        UserError: unknown constraint, or a setting that is missing or of another type.
    """
    if not isinstance(name, str) or name not in CONSTRAINTS:
        raise UserError(f"{origin}: unknown constraint {name!r}; known are {', '.join(sorted(CONSTRAINTS))}")
    for setting in REQUIRED_SETTINGS.get(name, ()):
        value = settings.get(setting)
        if "relation" in setting:
            valid, expected = value in ("less than", "at least"), "'less than' or 'at least'"
        elif setting.startswith(("num_", "nth_")) or setting.endswith("frequency"):
            valid, expected = type(value) in (int, float) and value == value // 1 >= 0, "a whole number"
        elif setting in ("keywords", "forbidden_words"):
            valid, expected = isinstance(value, list) and all(isinstance(w, str) for w in value), "a list of texts"
        else:
            valid, expected = isinstance(value, str) and bool(value.strip()), "a text"
        if not valid:
            raise UserError(f"{origin}: {setting} of {name} must be {expected}, got {str(value)[:60]!r}")


def relaxed_variants(text: str) -> list[str]:
    """Return the variants of a text for the loose metric: without first or last line, and without emphasis."""
    lines = text.split("\n")
    variants = [text, "\n".join(lines[1:]), "\n".join(lines[:-1]), "\n".join(lines[1:-1])]
    variants = [variant.strip() for variant in variants]
    return [text, *variants, *(variant.replace("*", "") for variant in variants)]


def compare_count(count: int, relation: str, number: int) -> bool:
    """Return whether a count is "less than" or "at least" a number."""
    return count < number if relation == "less than" else count >= number


def split_words(text: str) -> list[str]:
    """Return the words of a text."""
    return re.findall(r"\w+", text)


def count_sentences(text: str) -> int:
    """Return the number of sentences: . ! ? … before white space or the end, except after abbreviations."""
    stripped = re.sub(r"\b(Mr|Mrs|Ms|Dr|Prof|St|vs|etc|e\.g|i\.e|[A-Z])\.", r"\1", text.strip())
    parts = re.split(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n{2,}", stripped)
    return sum(bool(re.search(r"\w", part)) for part in parts)


def detect_language(text: str) -> str:
    """Return the code of the language; "" if it is unknown."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0  # it samples otherwise
    try:
        return str(detect(text))
    except LangDetectException:
        return ""


def is_english_with_case(text: str, has_right_case: bool) -> bool:
    """Return whether the case is right and the text may be English."""
    return has_right_case and detect_language(text) in ("en", "")


def two_responses(text: str, settings: Settings) -> bool:
    """Exactly two different responses, separated by six asterisks."""
    parts = [part.strip() for part in text.split("******")]
    inner = [part for index, part in enumerate(parts) if part or 0 < index < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def postscript(text: str, settings: Settings) -> bool:
    """A postscript that starts with the marker."""
    marker = settings["postscript_marker"]
    letters = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(marker, re.escape(marker.lower()))
    return re.search(rf"\s*{letters}.*$", text.lower(), re.MULTILINE) is not None


def json_format(text: str, settings: Settings) -> bool:
    """The text is JSON, possibly in a code fence."""
    content = re.sub(r"^```(json|JSON|Json)?|```$", "", text.strip()).strip()
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def highlighted(text: str, settings: Settings) -> bool:
    """At least `num_highlights` non-empty parts in asterisks."""
    highlights = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
    return sum(bool(part.strip("*").strip()) for part in highlights) >= settings["num_highlights"]


def sections(text: str, settings: Settings) -> bool:
    """At least `num_sections` numbered sections with the heading."""
    heading = settings.get("section_spliter") or settings.get("section_splitter", "")
    return len(re.split(rf"\s?{re.escape(heading)}\s?\d+\s?", text)) - 1 >= settings["num_sections"]


def paragraphs(text: str, settings: Settings) -> bool:
    """Exactly `num_paragraphs` parts, separated by three asterisks."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    is_filled = [bool(part.strip()) for part in parts]
    return all(is_filled[1:-1]) and sum(is_filled) == settings["num_paragraphs"]


def nth_first_word(text: str, settings: Settings) -> bool:
    """Exactly `num_paragraphs` paragraphs, and the nth starts with `first_word`."""
    parts = [part.strip() for part in re.split(r"\n\n", text) if part.strip()]
    nth = int(settings["nth_paragraph"])  # a table with missing cells stores 2 as 2.0
    if len(parts) != settings["num_paragraphs"] or not 1 <= nth <= len(parts):
        return False
    first = re.match(r"\W*(\w+)", parts[nth - 1])
    return first is not None and first.group(1).lower() == settings["first_word"].lower()


def keyword_count(text: str, settings: Settings) -> bool:
    """The keyword occurs less than, or at least, `frequency` times."""
    count = len(re.findall(re.escape(settings["keyword"]), text, re.IGNORECASE))
    return compare_count(count, settings["relation"], settings["frequency"])


def letter_count(text: str, settings: Settings) -> bool:
    """The letter occurs less than, or at least, `let_frequency` times."""
    count = text.lower().count(settings["letter"].lower())
    return compare_count(count, settings["let_relation"], settings["let_frequency"])


def capital_count(text: str, settings: Settings) -> bool:
    """Less than, or at least, `capital_frequency` words are in capitals."""
    count = sum(word.isupper() for word in split_words(text))
    return compare_count(count, settings["capital_relation"], settings["capital_frequency"])


def bullets(text: str, settings: Settings) -> bool:
    """Exactly `num_bullets` lines that start with an asterisk or a hyphen."""
    items = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE) + re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(items) == settings["num_bullets"]


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
    "length_constraints:number_sentences": lambda t, s: compare_count(
        count_sentences(t), s["relation"], s["num_sentences"]
    ),
    "length_constraints:number_words": lambda t, s: compare_count(len(split_words(t)), s["relation"], s["num_words"]),
    "punctuation:no_comma": lambda text, _: "," not in text,
    "startend:end_checker": lambda t, s: t.strip().strip('"').lower().endswith(s["end_phrase"].strip().lower()),
    "startend:quotation": lambda t, _: len(t.strip()) > 1 and t.strip()[0] == '"' == t.strip()[-1],
}

# Names of the settings that a constraint reads.
REQUIRED_SETTINGS: dict[str, tuple[str, ...]] = {
    "change_case:capital_word_frequency": ("capital_relation", "capital_frequency"),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:multiple_sections": ("num_sections",),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "keywords:existence": ("keywords",),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:frequency": ("keyword", "relation", "frequency"),
    "keywords:letter_frequency": ("letter", "let_relation", "let_frequency"),
    "language:response_language": ("language",),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", "nth_paragraph", "first_word"),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_sentences": ("relation", "num_sentences"),
    "length_constraints:number_words": ("relation", "num_words"),
    "startend:end_checker": ("end_phrase",),
}
