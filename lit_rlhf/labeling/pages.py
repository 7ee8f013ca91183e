"""The pages as HTML: templates, filled with what the database holds."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_rlhf.labeling.answers import (
    MAX_TEXT,
    OPTIONAL_QUESTIONS,
    PROMPT_FLAGS,
    RATING_QUESTIONS,
    SKIP_REASONS,
    letter,
)
from lit_rlhf.labeling.database import Kind, Lease
from lit_rlhf.labeling.overview import format_agreement
from lit_rlhf.labeling.text import show_text

HEADINGS: dict[Kind, str] = {
    "rank": "Rank the outputs",
    "rate": "Rate the output",
    "demonstrate": "Write a response",
    "compare": "Compare two responses",
}
PLACES = ("First", "Second")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(str(files("lit_rlhf.labeling") / "templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"show": show_text, "agreement": format_agreement, "letter": letter}
    return environment


def render_page(name: str, **values: Any) -> str:
    """Fill a template; text is escaped, an undefined name is an error."""
    return _environment().get_template(f"{name}.jinja").render(**values)


def read_instructions(kind: Kind) -> str:
    """Return the instructions that are shown where the user has none: the paper's, in other words, as Markdown."""
    return (files("lit_rlhf.labeling") / "instructions" / f"{kind}.md").read_text(encoding="utf-8")


def render_task(lease: Lease, form: dict[str, str], **values: Any) -> str:
    """Return the page of a task.

    Args:
        lease: The task.
        form: What is filled in.
        values: The page's other variables: csrf, instructions, progress, done, total, undo, note, error.
    """
    content = lease.content
    outputs = []
    for place, number in enumerate(lease.shown):
        heading = {"rank": f"Output {letter(place)}", "compare": f"{PLACES[place % 2]} response"}.get(
            lease.kind, "Output"
        )
        outputs.append(
            {"letter": letter(place), "place": place, "heading": heading, "text": content["completions"][number]}
        )
    return render_page(
        "task",
        lease=lease,
        form=form,
        heading=HEADINGS[lease.kind],
        prompt=content["prompt"],
        outputs=outputs,
        sensitive=content.get("sensitive"),
        questions=RATING_QUESTIONS,
        optional=OPTIONAL_QUESTIONS,
        prompt_flags=PROMPT_FLAGS,
        has_flags=any(name.startswith("prompt-") or (name == "note" and form[name]) for name in form),
        reasons=SKIP_REASONS,
        max_text=MAX_TEXT,
        **values,
    )


def render_message(heading: str, text: str, **values: Any) -> str:
    """Return a page with one message.

    Args:
        heading: Its heading.
        text: The message.
        values: Any of `go` (an address to go on to), `form` and `action` (a form to send again), `undo` and `csrf` (the
            number of the last answer), `lost` (a text to show for copying).
    """
    defaults: dict[str, Any] = {"go": None, "form": None, "action": None, "undo": None, "csrf": None, "lost": None}
    return render_page("message", heading=heading, text=text, **(defaults | values))
