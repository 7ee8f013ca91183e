"""Other people's text on a page: shown as it is, never read as HTML, with what is invisible made visible."""

from __future__ import annotations

import re
import unicodedata

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

# characters that would be invisible, or that reorder the text around them
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]")


def show_text(text: str) -> Markup:
    """Escape a text for a page, and name its control characters, such as NUL or a right-to-left override."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    parts: list[Markup] = []
    end = 0
    for match in _HIDDEN.finditer(text):
        character = match[0]
        name = unicodedata.name(character, f"control character {ord(character)}").lower()
        parts += [
            escape(text[end : match.start()]),
            Markup('<span class="hidden-character" title="{}">U+{}</span>').format(name, f"{ord(character):04X}"),
        ]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])


def render_markdown(text: str) -> Markup:
    """Convert the instructions from Markdown; HTML within is shown as text, and no image is loaded."""
    return Markup(MarkdownIt("js-default", {"html": False}).disable("image").render(text))
