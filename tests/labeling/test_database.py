"""The record: claims never overshoot, answers are only appended, nothing is lost by threads, processes or time."""

import multiprocessing
import os
import sqlite3
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import LEASE_SECONDS, Database, ImportedAnswer, LabelerAccount
from tests.labeling.conftest import Fill, make_task


def work(path: Path, name: str, kind: str = "rank") -> list[str]:
    """Answer until nothing is left; return the tasks' prompts."""
    database = Database(path)
    labeler, done = database.add_labeler(name), []
    while (lease := database.claim(kind, labeler)) is not None:
        assert database.submit(lease.token, labeler, "answer", {"ranks": [1, 2, 3, 4], "by": name}) == "answer"
        done.append(lease.content["fields"]["prompt"])
    return done


def labels_by_task(database: Database) -> Counter[str]:
    return Counter(each.key for each in database.list_answers())


def check_integrity(database: Database) -> None:
    """The number of labels kept with each task is that of its answers."""
    with database.read() as connection:
        rows = connection.execute(
            "SELECT num_labels, labels_wanted, "
            "(SELECT COUNT(*) FROM current_answers WHERE task = tasks.id AND action = 'answer') FROM tasks"
        ).fetchall()
    for kept, wanted, counted in rows:
        assert kept == counted and (wanted == 0 or counted <= wanted)


def test_a_task_goes_to_different_people_until_it_has_its_labels(fill: Fill):
    database = fill("rank", count=2, labels=2)
    assert [len(work(database.path, name)) for name in ("ann", "bo", "cy")] == [2, 2, 0]
    assert set(labels_by_task(database).values()) == {2}
    check_integrity(database)


def test_a_claim_is_resumed_and_holds_its_task(fill: Fill):
    database = fill("rank", count=1)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    lease = database.claim("rank", ann)
    assert database.claim("rank", ann) == lease
    assert database.claim("rank", bo) is None


def test_a_lease_runs_out_and_a_late_answer_is_kept_as_surplus(fill: Fill):
    database = fill("rank", count=1)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    late = database.claim("rank", ann, now=0.0)
    lease = database.claim("rank", bo, now=LEASE_SECONDS + 1)
    assert late and lease and lease.task == late.task
    # while bo holds the task, ann's late answer would be one too many
    assert database.submit(late.token, ann, "answer", {"ranks": [1, 1, 1, 1]}, now=LEASE_SECONDS + 2) == "surplus"
    assert database.submit(lease.token, bo, "answer", {"ranks": [1, 2, 3, 4]}, now=LEASE_SECONDS + 3) == "answer"
    assert [each.labeler for each in database.list_answers()] == ["bo"]
    assert [each.labeler for each in database.list_answers(actions=("surplus",))] == ["ann"]
    check_integrity(database)


def test_a_late_answer_counts_where_the_task_still_takes_one(fill: Fill):
    database = fill("rank", count=1)
    ann = database.add_labeler("ann")
    late = database.claim("rank", ann, now=0.0)
    assert late and database.submit(late.token, ann, "answer", {}, now=10 * LEASE_SECONDS) == "answer"


def test_a_draft_is_kept_and_extends_the_lease(fill: Fill):
    database = fill("demonstrate", count=1)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    lease = database.claim("demonstrate", ann, now=0.0)
    assert lease and database.keep_draft(lease.token, ann, {"completion": "half"}, now=LEASE_SECONDS - 1)
    assert database.claim("demonstrate", bo, now=LEASE_SECONDS + 1) is None
    resumed = database.claim("demonstrate", ann, now=LEASE_SECONDS + 1)
    assert resumed and resumed.draft == {"completion": "half"}
    assert not database.keep_draft(lease.token, bo, {"completion": "not mine"}, now=LEASE_SECONDS + 2)


def test_sending_an_answer_twice_counts_once(fill: Fill):
    database = fill("rank", count=1, labels=2)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    lease = database.claim("rank", ann)
    assert lease
    outcomes = [database.submit(lease.token, ann, "answer", {"ranks": [1, 2, 3, 4]}) for _ in range(3)]
    assert outcomes == ["answer", "repeated", "repeated"] and len(database.list_answers()) == 1
    assert database.submit(lease.token, bo, "answer", {}) == "unknown"


def test_undo_appends_a_row_and_gives_the_task_back(fill: Fill):
    database = fill("rank", count=2)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    lease = database.claim("rank", ann)
    assert lease
    database.submit(lease.token, ann, "answer", {"ranks": [1, 2, 3, 4]})
    last = database.last_answer("rank", ann)
    assert last is not None and database.undo(last, ann, {"rank-0": "1"})
    assert not database.undo(last, ann, {}), "once"
    assert database.list_answers() == [] and database.num_undone("ann") == 1
    other = database.claim("rank", bo)
    assert other and other.task != lease.task, "the task that was given back is held"
    again = database.claim("rank", ann)
    assert again and (again.task, again.shown, again.draft) == (lease.task, lease.shown, {"rank-0": "1"})
    assert again.token != lease.token
    assert database.submit(again.token, ann, "answer", {"ranks": [2, 1, 3, 4]}) == "answer"
    with database.read() as connection:
        assert connection.execute("SELECT action FROM answers ORDER BY id").fetchall() == [
            ("answer",),
            ("undo",),
            ("answer",),
        ]
    check_integrity(database)


def test_nobody_undoes_the_answer_of_another(fill: Fill):
    database = fill("rank", count=1)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    lease = database.claim("rank", ann)
    assert lease
    database.submit(lease.token, ann, "answer", {})
    last = database.last_answer("rank", ann)
    assert last is not None and not database.undo(last, bo, {}) and len(database.list_answers()) == 1


def test_a_skipped_task_goes_to_another_person_and_not_back(fill: Fill):
    database = fill("rank", count=1)
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    lease = database.claim("rank", ann)
    assert lease and database.submit(lease.token, ann, "skip", {"reason": "language"}) == "skip"
    assert database.claim("rank", ann) is None
    assert database.claim("rank", bo) is not None


@pytest.mark.parametrize("statement", ["UPDATE answers SET content = '{}'", "DELETE FROM answers"])
def test_answers_are_only_appended(fill: Fill, statement: str):
    database = fill("rank", count=1)
    work(database.path, "ann")
    with pytest.raises(sqlite3.IntegrityError, match="only appended"), database.write() as connection:
        connection.execute(statement)
    assert len(database.list_answers()) == 1


def test_tasks_with_known_answers_go_to_everyone_between_the_others(fill: Fill):
    database = fill("rank", count=10)
    gold = [make_task(100 + n, 4, {"ranks": [1, 2, 3, 4]}) for n in range(2)]
    database.add_tasks("rank", gold, [0, 0])
    assert len(work(database.path, "ann")) == 12 and len(work(database.path, "bo")) == 2
    assert [n for n, key in enumerate(database.task_keys("rank")) if key in ("task-100", "task-101")] == [3, 9]


def test_the_order_shown_is_shuffled_per_labeler_and_recorded(fill: Fill):
    database = fill("rank", count=20, labels=3, completions=9)
    for name in ("ann", "bo", "cy"):
        work(database.path, name)
    answers = database.list_answers()
    by_labeler = {name: [each.shown for each in answers if each.labeler == name] for name in ("ann", "bo", "cy")}
    assert all(sorted(shown) == list(range(9)) for own in by_labeler.values() for shown in own)
    assert by_labeler["ann"] != by_labeler["bo"] != by_labeler["cy"]
    firsts = Counter(shown[0] for own in by_labeler.values() for shown in own)
    assert len(firsts) >= 8, f"each completion comes first now and then: {firsts}"


def test_seconds_are_at_most_those_since_the_claim(fill: Fill):
    database = fill("rank", count=3)
    ann = database.add_labeler("ann")
    for given_seconds, now in ((None, 7.0), (3.5, 7.0), (1e9, 7.0)):
        lease = database.claim("rank", ann, now=0.0)
        assert lease
        database.submit(lease.token, ann, "answer", {}, given_seconds, now)
    assert [each.seconds for each in database.list_answers()] == [7.0, 3.5, 7.0]


def test_threads_claim_each_label_once(fill: Fill):
    database = fill("rank", count=25, labels=2)
    done: list[str] = []
    threads = [threading.Thread(target=lambda name=name: done.extend(work(database.path, name))) for name in "abcdef"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(done) == {f"question {n}?": 2 for n in range(25)}
    check_integrity(database)


def test_processes_claim_each_label_once(fill: Fill):
    database = fill("rank", count=20, labels=2)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        done = pool.starmap(work, [(database.path, name) for name in ("ann", "bo", "cy")])
    assert Counter(prompt for own in done for prompt in own) == {f"question {n}?": 2 for n in range(20)}
    check_integrity(database)


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["claim", "answer", "skip", "undo", "wait"])), max_size=40
)


@settings(max_examples=15)
@given(STEPS, st.integers(1, 2))
def test_no_order_of_steps_gives_a_task_too_many_labels(tmp_path_factory: pytest.TempPathFactory, steps, labels: int):
    database = Database(tmp_path_factory.mktemp("steps") / "labels.db")
    database.add_tasks("rank", [make_task(n) for n in range(3)], [labels] * 3)
    people: list[LabelerAccount] = [database.add_labeler(name) for name in ("ann", "bo", "cy")]
    held: dict[int, list[str]] = {0: [], 1: [], 2: []}
    now, given_answers = 1.0, 0
    for person, step in steps:
        labeler = people[person]
        if step == "wait":
            now += LEASE_SECONDS + 1
        elif step == "claim":
            lease = database.claim("rank", labeler, now)
            held[person] += [lease.token] if lease else []
        elif step == "undo":
            last = database.last_answer("rank", labeler)
            given_answers -= last is not None and database.undo(last, labeler, {}, now)
        elif held[person]:
            outcome = database.submit(held[person].pop(), labeler, step, {}, now=now)
            given_answers += outcome in ("answer", "skip", "surplus")
        check_integrity(database)
    kept = database.list_answers(actions=("answer", "skip", "surplus"))
    assert len(kept) == given_answers, "every answer that was sent and not taken back is there"
    assert max(Counter((each.task, each.labeler) for each in kept).values(), default=0) <= 1


def test_secrets_are_kept_as_hashes_and_replaced(database: Database):
    ann, bo = database.add_labeler("ann"), database.add_labeler("bo")
    first, other = database.make_secret(ann), database.make_secret(bo)
    assert database.authenticate(first) == ann and database.authenticate(other) == bo
    assert first.encode() not in database.path.read_bytes()
    second = database.make_secret(ann)
    assert database.authenticate(first) is None and database.authenticate(second) == ann
    assert database.authenticate("") is None and database.authenticate("\udcff") is None


def test_a_labeler_without_a_link_has_no_secret_that_fits(database: Database):
    database.add_labeler("ann")
    assert all(database.authenticate(secret) is None for secret in ("", "ann", "None"))


def test_tasks_are_added_once_and_a_changed_one_is_refused(database: Database):
    tasks = [make_task(0), make_task(1)]
    assert database.add_tasks("rank", tasks, [1, 1]) == 2
    assert database.add_tasks("rank", [*tasks, make_task(2)], [1, 1, 1]) == 1
    changed = make_task(1)._replace(content=make_task(7).content)
    with pytest.raises(UserError, match=r"tasks\.jsonl:1: the task 'task-1' has other content"):
        database.add_tasks("rank", [make_task(3), changed], [1, 1])
    assert database.task_keys("rank") == ["task-0", "task-1", "task-2"], "all or none"


def test_imported_answers_are_added_once(database: Database):
    answers = [[ImportedAnswer("ann", "answer", {"ranks": [1, 2, 3, 4]}, 5.0), ImportedAnswer("bo", "skip", {})]]
    assert database.import_answers("rank", [make_task(0)], answers) == 2
    assert database.import_answers("rank", [make_task(0)], answers) == 0
    assert [(each.labeler, each.seconds) for each in database.list_answers()] == [("ann", 5.0)]
    check_integrity(database)


def test_a_database_of_another_version_is_refused_and_kept(fill: Fill):
    path = fill("rank").path
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"schema version 99.*export there and import here"):
        Database(path)
    assert path.read_bytes() == before


def test_a_file_of_another_program_is_refused_and_kept(tmp_path: Path):
    text, other = tmp_path / "notes.txt", tmp_path / "other.db"
    text.write_text("not a database " * 100)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    for path, message in ((text, "not a database"), (other, "another program"), (tmp_path, "is a folder")):
        before = path.read_bytes() if path.is_file() else b""
        with pytest.raises(UserError, match=message):
            Database(path)
        assert not before or path.read_bytes() == before


def test_a_missing_database_is_not_made_by_a_reader(tmp_path: Path):
    Database(tmp_path / "labels.db")
    with pytest.raises(UserError, match=r"no database .*label\.db.*did you mean 'labels.db'"):
        Database(tmp_path / "label.db", create=False)
    assert not (tmp_path / "label.db").exists()


def test_a_full_disk_loses_nothing_and_says_what_to_do(fill: Fill):
    database = fill("demonstrate", count=2)
    ann = database.add_labeler("ann")
    lease = database.claim("demonstrate", ann)
    assert lease
    with database.write() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()

    class FullDisk(Database):
        def _connection(self):  # type: ignore[no-untyped-def]
            return self.limited()

        from contextlib import contextmanager

        @contextmanager
        def limited(self):  # type: ignore[no-untyped-def]
            with super()._connection() as connection:
                connection.execute(f"PRAGMA max_page_count = {pages}")
                yield connection

    full = FullDisk(database.path)
    with pytest.raises(UserError, match=r"full: free some space on that disk, then send the answer again"):
        full.submit(lease.token, ann, "answer", {"completion": "x" * 100_000})
    assert database.list_answers() == []
    assert database.submit(lease.token, ann, "answer", {"completion": "x" * 100_000}) == "answer"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        Database(tmp_path / "labels.db")


def test_a_read_only_database_is_named(fill: Fill, monkeypatch: pytest.MonkeyPatch):
    database = fill("rank")
    ann = database.add_labeler("ann")
    connect = sqlite3.connect

    def read_only(path: Path, **settings: object) -> sqlite3.Connection:
        return connect(f"file:{path}?mode=ro", uri=True, **settings)  # type: ignore[call-overload]

    monkeypatch.setattr(sqlite3, "connect", read_only)
    with pytest.raises(UserError, match="readonly database: the file and its folder must be writable"):
        database.claim("rank", ann)


def test_only_the_owner_may_read_the_file(database: Database):
    assert database.path.stat().st_mode & 0o077 == 0


def test_a_known_answer_that_would_be_ignored_is_refused(database: Database):
    known = {"ranks": [1, 2, 3, 4]}
    database.add_tasks("rank", [make_task(0), make_task(1, gold=known)], [1, 0])
    assert database.add_tasks("rank", [make_task(1, gold=known)], [0]) == 0
    for number, gold, stored in ((0, known, "no known answer"), (1, {"ranks": [4, 3, 2, 1]}, "another known answer")):
        with pytest.raises(UserError, match=f"the task 'task-{number}' has {stored}"):
            database.add_tasks("rank", [make_task(number, gold=gold)], [0])
    assert database.add_tasks("rank", [make_task(1)], [1]) == 0, "answers to it can be imported"


def test_an_imported_task_without_an_answer_wants_one(database: Database):
    database.import_answers("rank", [make_task(0)], [[]])
    assert database.progress("rank").labels_wanted == 1
    for name, gets_it in (("ann", True), ("bo", False)):
        labeler = database.add_labeler(name)
        lease = database.claim("rank", labeler)
        assert (lease is not None) == gets_it
        if lease is not None:
            database.submit(lease.token, labeler, "answer", {"ranks": [1, 2, 3, 4]})
