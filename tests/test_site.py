"""The documentation's site: every public name and every page is there, no link is dead, and it works in a browser.

The browser's checks need chromium, all of them the extra [docs].
"""

import ast
import importlib
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tests.helpers.browser import BROWSER, Chromium, Tab
from tests.helpers.pages import DOCS, README, ROOT, blocks
from tests.helpers.site_checks import HEADINGS, LOW_CONTRAST, NAMELESS, WIDER_THAN_THE_PAGE

CONFIG = ROOT / ".ci" / "mkdocs.yml"
NEEDED = ("material", "mkdocstrings_handlers.python", "latex2mathml")
PUBLIC = sorted(path.parent.name for path in (ROOT / "lit_rlhf").glob("*/__init__.py") if "__all__" in path.read_text())
# set it to a folder to look at the pages
SCREENSHOTS = os.environ.get("LIT_RLHF_SCREENSHOTS")


def is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


needs_docs = pytest.mark.skipif(not all(map(is_installed, NEEDED)), reason="the extra [docs] is not installed")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")


def test_every_page_is_in_the_navigation_once() -> None:
    listed = re.findall(r"[\w/-]+\.md", CONFIG.read_text().partition("\nnav:")[2])
    pages = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(listed) == pages


def test_every_page_is_in_the_overview() -> None:
    overview = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in DOCS if page.name != "index.md" and f"({page.name})" not in overview] == []


class Links(HTMLParser):
    """The links and the anchors of a page, and everything that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.anchors |= {named[name] or "" for name in ("id", "name") if name in named}
        if tag == "a" and named.get("href"):
            self.links.append(named["href"] or "")
        elif tag in ("script", "img", "link", "iframe", "source") and (named.get("src") or named.get("href")):
            self.loaded.append(named.get("src") or named.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # not --quiet: what is not logged does not count as a warning
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(CONFIG), "-d", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Links]:
    return {path.relative_to(site).as_posix(): Links(path.read_text()) for path in site.rglob("*.html")}


@needs_docs
def test_every_link_leads_somewhere_and_every_page_is_reached(site: Path, pages: dict[str, Links]) -> None:
    dead, reached, to_visit = [], {"index.html"}, ["index.html"]
    while to_visit:
        page = to_visit.pop()
        for link in pages[page].links:
            if re.match(r"[a-z]+:", link):
                continue
            path, anchor = map(unquote, urldefrag(link))
            target = os.path.normpath(Path(page).parent / path) if path not in ("", ".") else page
            if target.endswith((".ipynb", ".json")) and (site / target).is_file():  # a file to download
                continue
            target = target if target.endswith(".html") else os.path.normpath(Path(target) / "index.html")
            if target not in pages or (anchor and anchor not in pages[target].anchors):
                dead.append(f"{page}: {link}")
            elif target not in reached:
                reached.add(target)
                to_visit.append(target)
    assert dead == []
    assert set(pages) - reached == {"404.html"}


@needs_docs
def test_a_page_loads_nothing_from_outside(pages: dict[str, Links]) -> None:
    loaded = [(page, url) for page, found in pages.items() for url in found.loaded]
    assert [each for each in loaded if re.match(r"(https?:)?//", each[1])] == []


@needs_docs
def test_every_public_name_is_documented(site: Path) -> None:
    """What a package lists in `__all__`, and what the pages import."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    documented = {line.split(" ")[0] for line in inventory.splitlines()}
    assert {"callbacks", "modules", "rollout"} < set(PUBLIC)
    for package in PUBLIC:
        names = {f"lit_rlhf.{package}.{name}" for name in importlib.import_module(f"lit_rlhf.{package}").__all__}
        assert names - documented == set()
    imported = [
        node
        for page in (README, *DOCS)
        for text in blocks(page, "python")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lit_rlhf")
    ]
    # a class of `lit_rlhf.rewards.base` is documented as one of `lit_rlhf.rewards`
    by_package = {(name.split(".")[1], name.rsplit(".", 1)[1]) for name in documented if name.count(".") > 1}
    names = {(f"{node.module}.".split(".")[1], alias.name) for node in imported for alias in node.names}
    assert names - by_package == set()


@needs_docs
def test_formulas_are_mathml(site: Path) -> None:
    for name in ("sft", "reward-model", "ppo"):
        formulas = len(blocks(ROOT / "docs" / f"{name}.md", "math"))
        assert (site / f"{name}.html").read_text().count("<math ") == formulas > 2


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    pytest.importorskip("uvicorn", reason="the extra [label] is not installed")
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.staticfiles import StaticFiles

    from tests.helpers.serving import running

    with running(Starlette(routes=[Mount("/", StaticFiles(directory=site, html=True))])) as url:
        yield url


def check_page(tab: Tab, address: str, width: int) -> None:
    assert tab.evaluate(LOW_CONTRAST) == []
    assert tab.evaluate(WIDER_THAN_THE_PAGE) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    assert tab.evaluate(NAMELESS) == []
    levels = tab.evaluate(HEADINGS)
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
    assert tab.console() == []
    assert [each for each in tab.requests() if not each.startswith((f"{address}/", "data:"))] == []


LOOKED_AT = ("index", "ppo", "hardware", "troubleshooting", "api/rewards")


@needs_docs
@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("page", LOOKED_AT)
def test_a_page_in_the_browser(chromium: Chromium, address: str, page: str, width: int, dark: bool) -> None:
    tab = chromium.open_tab(width, dark=dark)
    tab.open(f"{address}/{page}.html")
    check_page(tab, address, width)
    if SCREENSHOTS:
        name = f"{page.replace('/', '-')}-{width}-{'dark' if dark else 'light'}.png"
        tab.screenshot(Path(SCREENSHOTS) / name, full=False)


@needs_docs
@needs_browser
def test_the_keyboard_is_enough(chromium: Chromium, address: str) -> None:
    tab = chromium.open_tab(1280)
    tab.open(f"{address}/index.html")
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.matches('.md-skip')"), "the first stop leads past the navigation"
    tab.press("f")  # of the theme: find
    tab.wait("document.activeElement.matches('.md-search__input')")
    tab.type("whitening")
    tab.wait("document.querySelectorAll('.md-search-result__item').length > 0")
    with tab.next_page():
        tab.press("ArrowDown", "Enter")
    assert tab.evaluate("location.pathname") == "/ppo.html"
    tab.tab_to("article table, .md-typeset__scrollwrap, article a")
    check_page(tab, address, 1280)
