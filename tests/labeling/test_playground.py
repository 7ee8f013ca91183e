"""The playground: streamed responses, a vote that is a comparison, and what a page shows of it."""

import html
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rlhf.data.records import Message
from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import Database
from lit_rlhf.labeling.playground import create_chat_app
from lit_rlhf.labeling.responders import load_responder
from tests.helpers.browser import BROWSER, Chromium
from tests.helpers.serving import running
from tests.labeling.conftest import Browser

Add = Callable[[str], None]


def echo(name: str, gate: threading.Event | None = None):
    def respond(turns: list[Message], add: Add) -> None:
        add(f"{name} <b> ")
        if gate is not None:
            assert gate.wait(30)
        add(f"{len(turns)} {turns[-1]['content']}")

    return respond


def chat(database: Database, *models, seed: int = 0) -> Browser:
    labeler = database.add_labeler("ann")
    return Browser(create_chat_app(database, labeler, models, ("127.0.0.1",), seed))


def send(browser: Browser, path: str, **fields: str) -> str:
    form = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', browser.page))
    return browser._keep(browser.client.post(path, data=form | fields))


@pytest.fixture
def pair(database: Database) -> Browser:
    return chat(database, ("model-a", echo("A")), ("model-b", echo("B")))


def talk(browser: Browser, message: str) -> str:
    """Send a message, and return the page when all responses are complete."""
    browser.open() if not browser.page else None
    response = browser.client.post(
        "/send", data=dict(re.findall(r'name="(\w+)" value="([^"]*)"', browser.page)) | {"message": message}
    )
    address = str(response.url)
    for _ in range(1000):
        if "writing …" not in browser.open(address):
            return browser.page
    raise AssertionError(browser.page)


def test_a_vote_is_a_comparison_and_reveals_the_names(database: Database, pair: Browser):
    page = talk(pair, "hi")
    assert "model-a" not in page and "model-b" not in page
    texts = [html.unescape(each) for each in re.findall(r'aria-live="polite">\n(.*?)</pre>', page, re.DOTALL)]
    assert sorted(texts) == ["A <b> 1 hi", "B <b> 1 hi"]
    page = send(pair, "/vote", preference="first")
    assert f"The first was model-{texts[0][0].lower()}" in page
    (answer,) = database.list_answers("compare")
    better = {"first": 0, "second": 1}[answer.content["preference"]]
    assert answer.task_content["completions"][better] == texts[0]
    assert answer.task_content["models"] == ["model-a", "model-b"]
    assert answer.task_content["fields"] == {"prompt": [{"role": "user", "content": "hi"}]}
    assert f"{texts[0][0]} &lt;b&gt; 3 again" in talk(pair, "again"), "the conversation goes on with the better one"


def test_which_model_is_first_is_random(database: Database, pair: Browser):
    firsts = set()
    for number in range(12):
        pair.page = ""
        firsts.add(re.findall(r'aria-live="polite">\n(.)', talk(pair, f"hi {number}"))[0])
    assert firsts == {"A", "B"}


def test_one_model_needs_no_vote(database: Database):
    browser = chat(database, ("model-a", echo("A")))
    assert "A &lt;b&gt; 1 hi" in talk(browser, "hi")
    assert "A &lt;b&gt; 3 again" in talk(browser, "again") and "model-a" in browser.page
    assert database.kinds() == []


def test_two_samples_of_one_model_are_voted_on(database: Database):
    numbers = iter(range(100))

    def respond(turns: list[Message], add: Add) -> None:
        add(f"sample {next(numbers)}")

    browser = chat(database, ("model-a", respond), ("model-a", respond))
    page = talk(browser, "hi")
    assert "two samples of model-a" in page and "sample 0" in page and "sample 1" in page
    page = send(browser, "/vote", preference="first")
    assert "The vote is kept." in page and "The first was" not in page
    (answer,) = database.list_answers("compare")
    assert answer.task_content["models"] == ["model-a", "model-a"]
    assert sorted(answer.task_content["completions"]) == ["sample 0", "sample 1"]


def test_equal_responses_are_not_voted_on(database: Database):
    browser = chat(database, ("model-a", echo("A")), ("model-b", echo("A")))
    page = talk(browser, "hi")
    assert "nothing to vote on" in page and 'id="vote"' not in page
    send(browser, "/vote", preference="first")
    assert browser.status == 422 and database.kinds() == []
    browser.page = page
    assert "A &lt;b&gt; 3 again" in talk(browser, "again"), "the conversation goes on"


def test_a_stream_sends_each_part_and_its_end(database: Database):
    gate = threading.Event()
    browser = chat(database, ("model-a", echo("A", gate)))
    browser.open()
    page = send(browser, "/send", message="hi")
    (path,) = re.findall(r'data-stream="([^"]+)"', page)
    threading.Timer(0.2, gate.set).start()
    body = browser.client.get(path).text
    assert body == 'data: "A <b> "\n\ndata: "1 hi"\n\nevent: end\ndata: ""\n\n'


def test_a_failure_is_shown_and_there_is_no_vote(database: Database):
    def fail(turns: list[Message], add: Add) -> None:
        raise UserError("the conversation has 900 tokens <x>")

    browser = chat(database, ("model-a", echo("A")), ("model-b", fail))
    page = talk(browser, "hi")
    assert "900 tokens &lt;x&gt;" in page and 'id="vote"' not in page
    send(browser, "/vote", preference="first")
    assert database.kinds() == []


@pytest.mark.parametrize("message", ["", "  ", "a\0b", "x" * 20_001])
def test_a_message_that_is_none_is_refused(pair: Browser, message: str):
    pair.open()
    send(pair, "/send", message=message)
    assert pair.status == 422


def test_a_form_of_another_site_is_refused(database: Database, pair: Browser):
    pair.open()
    assert pair.client.post("/send", data={"csrf": "0" * 64, "message": "hi"}).status_code == 403
    pair.client.cookies.clear()
    assert pair.client.get("/stream/x/0").status_code == 404


def test_a_model_responds_word_by_word_as_generate_does(llama: str):
    parts: list[str] = []
    respond = load_responder(llama, 12, 0.0)
    respond([{"role": "user", "content": "w1 w2"}], parts.append)
    again: list[str] = []
    respond([{"role": "user", "content": "w1 w2"}], again.append)
    assert "".join(parts) == "".join(again) and len(parts) > 1
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens"):
        respond([{"role": "user", "content": "w1 " * 500}], parts.append)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: apt-get install chromium")
def test_chat_in_a_browser(database: Database, tmp_path: Path):
    gate = threading.Event()
    models = [("model-a", echo("A", gate)), ("model-b", echo("B", gate))]
    browser = Chromium(tmp_path / "profile")
    try:
        with running(create_chat_app(database, database.add_labeler("ann"), models, ("127.0.0.1",))) as address:
            tab = browser.open_tab(360)
            tab.open(address)
            tab.tab_to("textarea")
            tab.type("hello <i>")
            with tab.next_page():
                tab.press_control_enter()
            tab.wait("[...document.querySelectorAll('[data-stream]')].every(e => e.textContent.includes('<b>'))")
            gate.set()
            tab.wait("document.getElementById('vote') && document.readyState === 'complete'")
            assert "1 hello <i>" in tab.evaluate("document.body.innerText")
            with tab.next_page():
                tab.press("2")
            assert "The first was model-" in tab.evaluate("document.body.innerText")
            assert tab.evaluate("document.documentElement.scrollWidth") <= 360
            assert tab.console() == [] and all(each.startswith(f"{address}/") for each in tab.requests())
    finally:
        browser.close()
    assert len(database.list_answers("compare")) == 1
