"""`make readme-assets`: the picture of README.md, from the report of a quickstart.

`python -m tests.helpers.readme_assets [runs/quickstart/report.html]`
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.helpers.browser import BROWSER, Chromium, Tab
from tests.helpers.pages import ROOT

PICTURE = ROOT / "docs" / "quickstart-report.png"
WIDTH, MARGIN, COLORS = 1000, 8, 96
PARTS = (".cards", ".pair")  # of the report: the key numbers, and the plots of preference and alignment tax


def draw_report(report: Path, picture: Path) -> None:
    """Write parts of a report, one below the other, as a PNG of few colors."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Chromium(Path(profile))
        try:
            tab = browser.open_tab(WIDTH)
            tab.open(report.resolve().as_uri())
            parts = [draw_part(tab, selector) for selector in PARTS]
        finally:
            browser.close()
    page = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        page.paste(part, (0, sum(above.height for above in parts[:number])))
    page.quantize(COLORS, dither=Image.Dither.NONE).save(picture, optimize=True)


def draw_part(tab: Tab, selector: str) -> Image.Image:
    """Return an element of the page and a margin above and below it."""
    top, height = tab.evaluate(
        f"(b => [b.top, b.height])(document.querySelector('{selector}').getBoundingClientRect())"
    )
    clip = {"x": 0, "y": top - MARGIN, "width": WIDTH, "height": height + 2 * MARGIN, "scale": 1}
    shot = tab.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


if __name__ == "__main__":
    source = Path(*sys.argv[1:2] or [ROOT / "runs" / "quickstart" / "report.html"])
    if BROWSER is None or not source.is_file():
        sys.exit(f"error: {'no chromium here' if BROWSER is None else f'no {source}: run make quickstart first'}")
    draw_report(source, PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size / 1e3:.0f} kB")
