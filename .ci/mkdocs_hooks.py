"""Hook of mkdocs: formulas (fences of the language `math`) become MathML, which browsers render without a script."""

from typing import Any

from latex2mathml.converter import convert


def on_config(config: Any) -> Any:
    """Add the fence to the extension that reads fences."""
    fence = {"name": "math", "class": "math", "format": format_math}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def format_math(source: str, language: str, class_name: str, options: Any, md: Any, **settings: Any) -> str:
    """Return the HTML of a fence: a box that scrolls by itself, as wide as the page."""
    return f'<div class="{class_name}" tabindex="0">{convert(source.strip(), display="block")}</div>'
