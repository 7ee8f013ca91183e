"""All four screens in headless Chromium: by keyboard alone and by mouse, at two widths; nothing leaves the machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS
from lit_rlhf.labeling.database import Database, NewTask
from lit_rlhf.labeling.pages import read_instructions
from lit_rlhf.labeling.server import LabelSettings, create_label_app
from tests.helpers.browser import BROWSER, Chromium, Tab
from tests.helpers.serving import running

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
# set it to a folder to look at the pages
SCREENSHOTS = os.environ.get("LIT_RLHF_SCREENSHOTS")

CODE = "Use:\n\n```python\ndef squares(n):\n    for i in range(n):\n        yield i * i\n```\n\nOne value at a time."
TEXTS = [
    CODE,
    "<script>document.title = 'broken'</script> is shown, not run. " + "A long line of words. " * 80,
    "x" * 3000,
    "no",
]
PROMPT = "Write a function that yields the squares of 0 to n - 1.\nKeep it short."


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def start(path: Path, kind: str, count: int = 2, **content: object) -> Database:
    database = Database(path / "labels.db")
    size = {"rank": 4, "compare": 2, "rate": 1, "demonstrate": 0}[kind]
    turns = [{"role": "system", "content": "You are a terse assistant."}, {"role": "user", "content": PROMPT}]
    tasks = [
        NewTask(f"task-{n}", {"fields": {"prompt": turns}, "prompt": turns, "completions": TEXTS[:size], **content})
        for n in range(count)
    ]
    database.add_tasks(kind, tasks, [1] * count)
    return database


def app_of(database: Database, kind: str):
    only = database.add_labeler("ann")
    return create_label_app(database, LabelSettings(kind, read_instructions(kind), only, ("127.0.0.1",)))


def look(tab: Tab, name: str) -> None:
    if SCREENSHOTS:
        tab.screenshot(Path(SCREENSHOTS) / f"{name}.png")


def check_quiet(tab: Tab, address: str) -> None:
    assert tab.console() == []
    assert [each for each in tab.requests() if not each.startswith(f"{address}/")] == []
    assert tab.evaluate("document.title") != "broken"


def check_fits(tab: Tab, width: int) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "the page does not scroll sideways"
    outside = tab.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.offsetParent && e.getBoundingClientRect().right > "
        "innerWidth + 1 && !e.closest('.text, .for-screen-readers, .scroll')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []


RATING = dict.fromkeys(METADATA_FIELDS, False)


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("kind", ["rank", "rate", "compare", "demonstrate"])
def test_a_screen_by_keyboard_alone(chromium: Chromium, tmp_path: Path, kind: str, width: int):
    database = start(tmp_path, kind)
    with running(app_of(database, kind)) as address:
        tab = chromium.open_tab(width)
        tab.open(address)
        check_fits(tab, width)
        look(tab, f"{kind}-{width}")
        tab.press("i")
        assert tab.evaluate("document.getElementById('instructions').open")
        look(tab, f"{kind}-{width}-instructions")
        tab.press("i")
        with tab.next_page():
            answer_by_keyboard(tab, kind)
        (answer,) = database.list_answers()
        check_content(answer, kind)
        assert answer.seconds is not None and 0 < answer.seconds < 100
        with tab.next_page():
            tab.evaluate("document.activeElement.blur()")
            tab.press("u")
        assert database.list_answers() == []
        look(tab, f"{kind}-{width}-undone")
        with tab.next_page():
            if kind == "demonstrate":
                tab.tab_to("textarea")
                tab.press_control_enter()
            else:
                tab.evaluate("document.activeElement.blur()")
                tab.press("Enter")
        assert database.list_answers()[0].content == answer.content, "the same answer, filled in"
        tab.evaluate("document.activeElement.blur()")
        tab.press("s", "ArrowDown")
        with tab.next_page():
            tab.tab_to("#skip-submit")
            tab.press("Enter")
        assert [each.content["reason"] for each in database.list_answers(actions=("skip",))] == ["language"]
        check_quiet(tab, address)


def answer_by_keyboard(tab: Tab, kind: str) -> None:
    if kind == "rank":
        tab.wait("document.activeElement.matches('.card')")
        tab.press("2", "ArrowDown", "1", "ArrowDown", "2", "ArrowDown")
        tab.tab_to("input[name=rank-3]")  # without the keys of the script: native radios
        tab.press("Space", "ArrowRight", "ArrowRight", "ArrowRight", "Enter")
    elif kind == "rate":
        tab.evaluate("document.activeElement.blur()")
        tab.press("5")
        tab.tab_to("input[name=flag-hallucination]")
        tab.press("Space", "n")
        tab.press("Enter")
    elif kind == "compare":
        tab.tab_to("input[name=preference]")
        tab.press("Space", "ArrowDown", "ArrowDown", "Enter")
    else:
        tab.tab_to("textarea")
        tab.type("def squares(n):\n    return (i * i for i in range(n))")
        tab.press_control_enter()


def check_content(answer, kind: str) -> None:
    if kind == "rank":
        ranks = [answer.content["ranks"][number] for number in answer.shown]
        assert ranks == [2, 1, 2, 4]
    elif kind == "rate":
        assert answer.content == {"overall": 5, "flags": RATING | {"hallucination": True}}
    elif kind == "compare":
        assert answer.content == {"preference": "tie"}
    else:
        assert answer.content == {"completion": "def squares(n):\n    return (i * i for i in range(n))"}


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("kind", ["rank", "rate", "compare", "demonstrate"])
def test_a_screen_by_mouse(chromium: Chromium, tmp_path: Path, kind: str, width: int):
    database = start(tmp_path, kind)
    with running(app_of(database, kind)) as address:
        tab = chromium.open_tab(width, dark=True)
        tab.open(address)
        answer_by_mouse(tab, kind)
        look(tab, f"{kind}-{width}-dark")
        with tab.next_page():
            tab.click("#submit")
        (answer,) = database.list_answers()
        check_content(answer, kind)
        with tab.next_page():
            tab.click("#undo")
        with tab.next_page():
            tab.click("#submit")
        assert database.list_answers()[0].content == answer.content
        tab.click("#skip > summary")
        tab.click("input[name=reason][value=unclear]")
        look(tab, f"{kind}-{width}-skip")
        with tab.next_page():
            tab.click("#skip-submit")
        assert [each.content["reason"] for each in database.list_answers(actions=("skip",))] == ["unclear"]
        look(tab, f"done-{width}")
        check_quiet(tab, address)


def answer_by_mouse(tab: Tab, kind: str) -> None:
    if kind == "rank":
        for place, value in ((1, 1), (2, 2), (3, 4)):
            tab.click(f"input[name=rank-{place}][value='{value}']")
        tab.evaluate("scrollTo(0, document.getElementById('bins').offsetTop - 10)")
        tab.drag(".card[data-place='0'] .handle", ".bin[data-bin='2']")
        tab.wait("document.querySelector('input[name=rank-0]:checked')")
        assert tab.evaluate("document.querySelector('.bin[data-bin=\"2\"]').innerText").split()[-2:] == ["A", "C"]
    elif kind == "rate":
        tab.click("input[name=overall][value='5']")
        tab.click("input[name=flag-hallucination][value=yes]")
        tab.click("#all-no")
    elif kind == "compare":
        tab.click("input[name=preference][value=tie]")
    else:
        tab.click("textarea")
        tab.type("def squares(n):\n    return (i * i for i in range(n))")


def test_a_draft_survives_a_closed_tab(chromium: Chromium, tmp_path: Path):
    database = start(tmp_path, "demonstrate")
    with running(app_of(database, "demonstrate")) as address:
        tab = chromium.open_tab(800)
        tab.open(address)
        tab.click("textarea")
        tab.type("half of it")
        tab.wait("document.getElementById('draft-state').textContent === 'draft kept'")
        other = chromium.open_tab(800)
        other.open(address)
        assert other.evaluate("document.querySelector('textarea').value") == "half of it"
        check_quiet(tab, address)


def test_sensitive_content_is_seen_after_the_warning(chromium: Chromium, tmp_path: Path):
    database = start(tmp_path, "compare", sensitive="violence")
    with running(app_of(database, "compare")) as address:
        tab = chromium.open_tab(800)
        tab.open(address)
        look(tab, "sensitive")
        visible = "document.querySelector('.card .text').checkVisibility({contentVisibilityAuto: true})"
        assert not tab.evaluate(visible)
        tab.click(".sensitive > summary")
        assert tab.evaluate(visible)
        check_quiet(tab, address)


def test_pages_work_without_javascript_and_at_twice_the_size(chromium: Chromium, tmp_path: Path):
    database = start(tmp_path, "rank")
    with running(app_of(database, "rank")) as address:
        tab = chromium.open_tab(360)
        tab.call("Emulation.setScriptExecutionDisabled", value=True)
        tab.open(address)
        for place, value in enumerate((2, 1, 2, 4)):
            tab.click(f"input[name=rank-{place}][value='{value}']")
        with tab.next_page():
            tab.click("#submit")
        check_content(database.list_answers()[0], "rank")
        zoomed = chromium.open_tab(720)  # 200 % zoom of 1440
        zoomed.open(address)
        check_fits(zoomed, 720)
        look(zoomed, "rank-720-zoomed")


def test_the_overview_is_live(chromium: Chromium, tmp_path: Path):
    database = start(tmp_path, "compare", count=3)
    app = app_of(database, "compare")
    for name in ("bo", "cy"):
        labeler = database.add_labeler(name)
        lease = database.claim("compare", labeler)
        assert lease
        database.submit(lease.token, labeler, "answer", {"preference": "first"}, 0.5)
    with running(app) as address:
        for width in (360, 1440):
            tab = chromium.open_tab(width)
            tab.open(f"{address}/overview")
            assert "2 of 3 labels" in tab.evaluate("document.body.innerText")
            check_fits(tab, width)
            look(tab, f"overview-{width}")
            check_quiet(tab, address)
    assert json.dumps(database.kinds()) == '["compare"]'
