"""The pages as a browser without JavaScript sees them: screens, undo, drafts, secrets, hostile text, limits."""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.judging_types import METADATA_FIELDS
from lit_rlhf.labeling.database import Database
from lit_rlhf.labeling.server import LabelSettings, create_label_app
from lit_rlhf.labeling.web import MAX_BODY
from tests.helpers.html_page import VOID, Page
from tests.labeling.conftest import Browser, Fill, make_task

VOID.add("input")
HOSTILE = {
    "html": "<script>alert(1)</script><img src=x onerror=alert(1)> </pre></textarea> &amp; \"'`",
    "template": "{{ 7 * 7 }} {% raw %} ${x}",
    "bidi": "safe \u202etxt.exe\u202c \u2066isolated\u2069 \u200f",
    "nul": "before\0after \x1b[31m \x07",
    "long": "x" * 100_000,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 中文 العربية",
    "lines": "\n\nfirst\n\n    indented\ttab\r\nlast\n",
}
RATING = {"overall": "6", **{f"flag-{name}": "no" for name in METADATA_FIELDS}}


def shown_texts(page: str) -> list[str]:
    """Return the texts of a page's cards and turns as a browser shows them."""
    found = []
    for raw in re.findall(r'<pre class="text" dir="auto">\n(.*?)</pre>', page, re.DOTALL):
        text = re.sub(r'<span class="hidden-character" title="[^"]*">U\+([0-9A-F]{4})</span>', _character, raw)
        found.append(html.unescape(text))
    return found


def _character(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)).replace("&", "&amp;").replace("\0", "\ue000")


def test_ranks_are_recorded_by_completion_not_by_place(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("rank", count=1), browse("rank")
    texts = shown_texts(browser.open())[1:]
    browser.send(action="submit", **{f"rank-{place}": str(place + 1) for place in range(4)})
    (answer,) = database.list_answers()
    by_text = dict(zip(answer.task_content["completions"], answer.content["ranks"]))
    assert [by_text[text] for text in texts] == [1, 2, 3, 4]
    assert [answer.task_content["completions"][number] for number in answer.shown] == texts
    assert "All done" in browser.page


def test_a_comparison_is_recorded_by_completion_not_by_place(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("compare", count=12), browse("compare")
    chosen = []
    for _ in range(12):
        chosen.append(shown_texts(browser.open())[1])
        browser.send(action="submit", preference="first")
    answers = database.list_answers()
    assert {answer.content["preference"] for answer in answers} == {"first", "second"}, "the order is shuffled"
    for answer in answers:
        first, second = answer.task_content["completions"]
        assert {"first": first, "second": second}[answer.content["preference"]] in chosen


@pytest.mark.parametrize("value", ["tie", "both_bad"])
def test_an_undecided_comparison_is_recorded(fill: Fill, browse: Callable[..., Browser], value: str):
    database, browser = fill("compare", count=1), browse("compare")
    browser.open()
    browser.send(action="submit", preference=value)
    assert database.list_answers()[0].content == {"preference": value}


def test_a_rating_has_the_papers_fields(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("rate", count=1), browse("rate")
    browser.open()
    browser.send(action="submit", **RATING | {"flag-hallucination": "yes", "flag-satisfies_constraint": "none"})
    flags = {name: name == "hallucination" for name in METADATA_FIELDS if name != "satisfies_constraint"}
    assert database.list_answers()[0].content == {"overall": 6, "flags": flags}


def test_a_demonstration_keeps_its_lines(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("demonstrate", count=1), browse("demonstrate")
    browser.open()
    text = "\r\n  def f():\r\n\treturn <b>1</b>\r\n"
    browser.send(action="submit", completion=text)
    assert database.list_answers()[0].content == {"completion": "\n  def f():\n\treturn <b>1</b>\n"}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("rank", {"rank-0": "1", "rank-1": "2", "rank-2": "2"}, "Output D has no number"),
        ("rank", {"rank-0": "1", "rank-1": "5", "rank-2": "2", "rank-3": "1"}, "Output B has no number"),
        ("rank", {"rank-0": "1", "rank-1": "²", "rank-2": "2", "rank-3": "1"}, "Output B has no number"),
        ("rate", RATING | {"overall": "8"}, "overall quality is missing"),
        ("rate", {"overall": "3"}, "Not answered yet: Fails to follow"),
        ("rate", RATING | {"flag-hallucination": "none"}, "Not answered yet: Hallucination"),
        ("compare", {}, "No choice yet"),
        ("demonstrate", {"completion": "  \n"}, "The response is empty"),
        ("demonstrate", {"completion": "a\0b"}, "NUL"),
        ("demonstrate", {"completion": "x" * 200_001}, "at most 200,000"),
    ],
)
def test_an_incomplete_answer_comes_back_filled_in(
    fill: Fill, browse: Callable[..., Browser], kind: str, fields: dict[str, str], message: str
):
    database, browser = fill(kind, count=1), browse(kind)
    browser.open()
    page = browser.send(action="submit", **fields)
    assert browser.status == 422 and message in html.unescape(page) and database.list_answers() == []
    for name, value in fields.items():
        if name.startswith(("rank", "flag")) and value in ("1", "2", "yes", "no") and "none" not in fields.values():
            assert re.search(f'name="{name}" value="{value}" required checked', page)
    if "completion" in fields and len(fields["completion"]) < 100:
        assert f"\n{html.escape(fields['completion'])}</textarea>".replace("\0", "\0") in page


def test_skip_takes_a_reason(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("rank", count=2), browse("rank")
    browser.open()
    assert "choose why" in browser.send(action="skip") and browser.status == 422
    browser.send(action="skip", reason="language")
    assert [each.content for each in database.list_answers(actions=("skip",))] == [{"reason": "language"}]
    assert browser.status == 200 and "1 of 2" in browser.page


@pytest.mark.parametrize("kind", ["rank", "rate", "compare", "demonstrate"])
def test_undo_brings_the_answer_back_as_it_was(fill: Fill, browse: Callable[..., Browser], kind: str):
    database, browser = fill(kind, count=2), browse(kind)
    fields = {
        "rank": {"rank-0": "2", "rank-1": "1", "rank-2": "2", "rank-3": "4", "none_acceptable": "yes"},
        "rate": RATING | {"flag-satisfies_constraint": "none"},
        "compare": {"preference": "second"},
        "demonstrate": {"completion": "first <line>\nsecond"},
    }[kind] | {"note": "my note", "prompt-ambiguous": "yes"}
    browser.open()
    browser.send(action="submit", **fields)
    before = database.list_answers()[0]
    page = browser.undo()
    assert "taken back" in page and database.list_answers() == []
    for name, value in fields.items():
        if name not in ("completion", "note"):
            assert re.search(f'name="{name}" value="{value}"( required)? checked', page), name
    assert 'value="my note"' in page and ("completion" not in fields or "first &lt;line&gt;\nsecond</textarea>" in page)
    browser.send(action="submit", **fields)
    after = database.list_answers()[0]
    assert (after.task, after.content, after.shown) == (before.task, before.content, before.shown)


def test_a_draft_is_there_again(fill: Fill, browse: Callable[..., Browser]):
    fill("demonstrate", count=1)
    browser = browse("demonstrate")
    browser.open()
    browser.send("/draft", completion="half a <sentence>", action="draft")
    assert "\nhalf a &lt;sentence&gt;</textarea>" in browser.open()


def test_the_same_form_twice_counts_once(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("compare", count=2), browse("compare")
    browser.open()
    form = browser.hidden() | {"action": "submit", "preference": "tie"}
    for _ in range(2):
        response = browser.client.post("/answer", data=form)
    assert "counts once" in response.text and len(database.list_answers()) == 1


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["rank", "compare", "rate", "demonstrate"])
def test_hostile_text_is_shown_as_text(database: Database, browse: Callable[..., Browser], kind: str, name: str):
    text = HOSTILE[name]
    count = {"rank": 2, "compare": 2, "rate": 1, "demonstrate": 0}[kind]
    task = make_task(0, count)
    task.content["prompt"] = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    task.content["completions"] = [f"{text}{n}" for n in range(count)]
    database.add_tasks(kind, [task], [1])
    browser = browse(kind)
    page = browser.open()
    plain = text.replace("\r\n", "\n").replace("\0", "\ue000")
    texts = shown_texts(page)
    assert texts[:2] == [plain, plain] and sorted(texts[2:]) == [f"{plain}{n}" for n in range(count)]
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags].count("script") == 1 and "img" not in {tag for tag, _ in parsed.tags}
    assert "\0" not in page and not re.search("[\u202a-\u202e\u2066-\u2069]", page)


def test_a_hostile_note_and_demonstration_come_back_as_text(fill: Fill, browse: Callable[..., Browser]):
    fill("demonstrate", count=1)
    browser = browse("demonstrate")
    browser.open()
    browser.send(action="submit", completion=HOSTILE["html"], note=f'">{HOSTILE["html"]}')
    page = Page(browser.undo())
    assert [tag for tag, _ in page.tags].count("script") == 1 and "img" not in {tag for tag, _ in page.tags}


def test_sensitive_content_is_behind_a_warning(fill: Fill, browse: Callable[..., Browser]):
    fill("rank", count=1, sensitive="violence <b>")
    page = browse("rank").open()
    before, _, after = page.partition('<details class="panel sensitive">')
    assert "question 0?" not in before and "answer 0" not in before
    assert (
        "violence &lt;b&gt;" in after.partition("</summary>")[0] and "question 0?" in after.partition("</details>")[0]
    )
    assert 'id="skip"' in after


def test_nothing_on_a_page_names_the_model(fill: Fill, browse: Callable[..., Browser]):
    fill("rank", count=1, models=["secret-a", "secret-b", "secret-c", "secret-d"])
    assert "secret-" not in browse("rank").open()


def test_the_instructions_are_the_users_markdown_without_html(fill: Fill, browse: Callable[..., Browser]):
    fill("rank", count=1)
    text = (
        "# Mine\n\n- one **bold**\n\n<script>alert(1)</script> [x](javascript:alert(1)) ![y](http://example.com/y.png)"
    )
    browser = browse("rank", instructions=text)
    for path in ("/", "/instructions"):
        page = browser.open(path)
        assert "<h1>Mine</h1>" in page and "<strong>bold</strong>" in page
        assert "<script>alert" not in page and 'href="javascript' not in page and "<img" not in page


def test_every_page_has_the_headers_and_loads_nothing_from_elsewhere(fill: Fill, browse: Callable[..., Browser]):
    fill("rank", count=1)
    browser = browse("rank")
    for path in ("/", "/instructions", "/overview", "/static/style.css", "/static/label.js", "/nothing"):
        response = browser.client.get(path)
        assert "default-src 'self'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(src|href|action|url\()=?[\"']?(https?:)?//", response.text)
        assert not re.search(r"\son\w+=|\sstyle=|<style", response.text), "would need unsafe-inline"


def test_a_form_needs_the_sessions_token(fill: Fill, browse: Callable[..., Browser]):
    database, browser = fill("compare", count=1), browse("compare")
    browser.open()
    good = browser.hidden() | {"action": "submit", "preference": "tie"}
    for bad in (good | {"csrf": ""}, good | {"csrf": "0" * 64}, good | {"csrf": "é"}):
        for path in ("/answer", "/draft", "/undo"):
            assert browser.client.post(path, data=bad).status_code == 403
    browser.client.cookies.clear()
    assert browser.client.post("/answer", data=good).status_code == 403, "another site's form comes without the cookie"
    assert database.list_answers() == []


def test_the_cookie_is_for_this_site_alone(fill: Fill, browse: Callable[..., Browser]):
    fill("rank", count=1)
    cookie = browse("rank").client.get("/").headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie


def test_another_host_name_is_refused(fill: Fill, browse: Callable[..., Browser]):
    fill("rank", count=1)
    browser = browse("rank")
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert browser.client.get("/", headers={"host": host}).status_code == 400
    assert browser.client.get("/", headers={"host": "127.0.0.1:8000"}).status_code == 200


def test_a_body_is_limited_and_must_be_a_form(fill: Fill, browse: Callable[..., Browser]):
    fill("demonstrate", count=1)
    client = browse("demonstrate").client
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/answer", content=b"x" * (MAX_BODY + 1), headers=form).status_code == 413
    assert client.post("/answer", content=iter([b"x" * 1_000_000] * 3), headers=form).status_code == 413
    assert client.post("/answer", content=b"&".join([b"a=1"] * 300), headers=form).status_code == 400
    assert client.post("/answer", content="é=1".encode(), headers=form).status_code == 400
    assert client.post("/answer", json={"csrf": "x"}).status_code == 415


def test_an_answer_that_cannot_be_kept_is_offered_again(
    fill: Fill, browse: Callable[..., Browser], monkeypatch: pytest.MonkeyPatch
):
    database, browser = fill("demonstrate", count=1), browse("demonstrate")
    browser.open()

    def fail(*args: Any) -> str:
        raise UserError("database labels.db: database or disk is full: free some space")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "submit", fail)
        page = browser.send(action="submit", completion="long <work>")
    assert browser.status == 503 and "disk is full" in page
    fields = re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page)
    browser.client.post("/answer", data={name: html.unescape(value) for name, value in fields})
    assert database.list_answers()[0].content == {"completion": "long <work>"}


def several(database: Database, *names: str) -> tuple[dict[str, Browser], Any]:
    app = create_label_app(database, LabelSettings("rank", "# Rank"))
    browsers = {}
    for name in names:
        labeler = database.add_labeler(name, "owner" if name == "owner" else "labeler")
        browsers[name] = Browser(app)
        page = browsers[name].open(f"/login/{database.make_secret(labeler)}")
        assert f"Hello {name}" in page and 'http-equiv="refresh"' in page
    return browsers, app


def test_each_person_has_a_link_and_sees_their_own_work_alone(fill: Fill):
    database = fill("rank", count=3, labels=1)
    browsers, app = several(database, "ann", "bo", "owner")
    first, second = browsers["ann"].open(), browsers["bo"].open()
    assert re.findall(r"question \d", first) != re.findall(r"question \d", second), "each has a task of their own"
    browsers["ann"].send(action="submit", **{f"rank-{place}": "1" for place in range(4)})
    stolen = browsers["bo"].hidden() | {"csrf": browsers["ann"].hidden()["csrf"]}
    assert browsers["ann"].client.post("/answer", data=stolen).status_code == 409, "a lease is its owner's"
    assert browsers["ann"].client.get("/overview").status_code == 403
    assert "1 by you · 1 of 3 in all" in browsers["ann"].page
    overview = browsers["owner"].open()
    assert "Overview: rank" in overview and "<td>ann</td>" in overview
    stranger = TestClient(app, base_url="http://127.0.0.1")
    assert stranger.get("/").status_code == 401 and stranger.get("/login/guess").status_code == 401
    assert stranger.post("/answer", data=stolen).status_code == 401


def test_a_server_started_again_takes_the_form_of_before(fill: Fill):
    database = fill("rank", count=1)
    browsers, _ = several(database, "ann")
    browser = browsers["ann"]
    browser.open()
    form = browser.hidden() | {"action": "submit", **{f"rank-{place}": "1" for place in range(4)}}
    again = create_label_app(Database(database.path), LabelSettings("rank", "# Rank"))
    client = TestClient(again, base_url="http://127.0.0.1", cookies=dict(browser.client.cookies))
    assert "All done" in client.post("/answer", data=form).text and len(database.list_answers()) == 1


def test_secrets_are_in_no_log(fill: Fill, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    database = fill("rank", count=1)
    caplog.set_level(0)
    secret = database.make_secret(database.add_labeler("ann"))
    client = TestClient(create_label_app(database, LabelSettings("rank", "")), base_url="http://127.0.0.1")
    client.get(f"/login/{secret}")
    client.get(f"/login/{secret}x")
    client.get("/")
    own = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    captured = capfd.readouterr()
    assert secret not in own + captured.out + captured.err


def test_the_overview_shows_agreement_and_disagreements(fill: Fill):
    database = fill("rank", count=6, labels=2)
    database.add_tasks("rank", [make_task(50, 4, {"ranks": [1, 2, 3, 4]})], [0])
    browsers, _ = several(database, "ann", "bo", "owner")
    assert "only one labeler" in browsers["owner"].open("/overview")
    for name, reverse in (("ann", False), ("bo", True)):
        labeler = database.add_labeler(name)
        while (lease := database.claim("rank", labeler)) is not None:
            turn = reverse and lease.content["fields"]["prompt"] in ("question 0?", "question 50?")
            database.submit(lease.token, labeler, "answer", {"ranks": [4, 3, 2, 1] if turn else [1, 2, 3, 4]})
    page = browsers["owner"].open("/overview?live=0")
    assert "refresh" not in page.partition("<title>")[0] and "12 of 12 labels" in page
    # 7 tasks with 6 pairs each, of which two tasks disagree on all
    assert "71.4 %" in page and "Krippendorff" in page
    rows = {name: page.partition(f"<td>{name}</td>")[2].partition("</tr>")[0] for name in ("ann", "bo")}
    assert "100.0 %" in rows["ann"] and "(1)" in rows["ann"] and "0.0 % [" in rows["bo"]
    assert "task-0: ann A &gt; B &gt; C &gt; D; bo D &gt; C &gt; B &gt; A" in page and "task-1:" not in page


def test_the_pages_are_well_formed(fill: Fill, browse: Callable[..., Browser], tmp_path: Path):
    for kind in ("rank", "rate", "compare", "demonstrate"):
        database = fill(kind, count=1, sensitive="warning")
        browser = browse(kind)
        for path in ("/", "/instructions", "/overview"):
            Page(browser.open(path))
    assert database.kinds() == ["rank", "rate", "demonstrate", "compare"]
