"""The record of human feedback: tasks, labelers, leases and answers in one SQLite file, in WAL mode.

Answers are rows that are only ever appended: an undo is a row of its own, and triggers refuse updates and deletions. A
task is claimed, answered or reopened in one transaction each, so that several servers may share a file.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from threading import Lock
from time import time
from typing import Any, Literal, NamedTuple

from lit_rlhf.errors import UserError
from lit_rlhf.paths import expand_path
from lit_rlhf.suggestions import did_you_mean

Kind = Literal["rank", "rate", "demonstrate", "compare"]
KINDS: tuple[Kind, ...] = ("rank", "rate", "demonstrate", "compare")
Action = Literal["answer", "skip"]

OWNER = "owner"  # the account of the overview: its name and its role
APPLICATION_ID = 0x4C524C46
SCHEMA_VERSION = 1
LOCK_SECONDS = 30.0  # how long a transaction waits for that of another server
LEASE_SECONDS = 1800.0

_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE tasks (
    id INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    key TEXT NOT NULL,              -- the row's own id, or a hash of its content
    position REAL NOT NULL,         -- tasks are claimed in this order
    content TEXT NOT NULL,          -- JSON of a `Content`
    gold TEXT,                      -- JSON of the known answer; such a task is answered by every labeler
    labels_wanted INTEGER NOT NULL, -- 0: by every labeler
    num_labels INTEGER NOT NULL DEFAULT 0,  -- answers of this task that are not undone
    UNIQUE (kind, key)
);
CREATE INDEX tasks_in_order ON tasks (kind, position);
CREATE TABLE labelers (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL,             -- "labeler" or "owner"
    secret_hash TEXT                -- SHA-256 of the secret in the link; NULL: no link was made
);
CREATE TABLE leases (
    task INTEGER NOT NULL REFERENCES tasks,
    labeler INTEGER NOT NULL REFERENCES labelers,
    token TEXT NOT NULL UNIQUE,     -- an answer carries it, which makes sending it twice harmless
    started REAL NOT NULL,          -- Unix time
    expires REAL NOT NULL,
    shown TEXT NOT NULL,            -- JSON: the completions' numbers in the order in which they are shown
    draft TEXT,                     -- JSON: the form as it was last kept
    PRIMARY KEY (task, labeler)
) WITHOUT ROWID;
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    task INTEGER NOT NULL REFERENCES tasks,
    labeler INTEGER NOT NULL REFERENCES labelers,
    action TEXT NOT NULL,           -- "answer", "skip", "undo", "surplus": the lease had run out and others answered
    content TEXT NOT NULL,          -- JSON: the answer, or the reason of a skip
    shown TEXT NOT NULL,
    seconds REAL,                   -- from showing to answering; NULL: not known
    created REAL NOT NULL,
    undoes INTEGER UNIQUE REFERENCES answers,
    submission TEXT UNIQUE          -- the lease's token
);
CREATE INDEX answers_of_task ON answers (task, labeler);
CREATE INDEX answers_of_labeler ON answers (labeler, id);
CREATE VIEW current_answers AS
    SELECT * FROM answers AS own WHERE action != 'undo'
    AND NOT EXISTS (SELECT 1 FROM answers AS later WHERE later.undoes = own.id);
CREATE TRIGGER answers_keep BEFORE UPDATE ON answers BEGIN SELECT RAISE(ABORT, 'answers are only appended'); END;
CREATE TRIGGER answers_stay BEFORE DELETE ON answers BEGIN SELECT RAISE(ABORT, 'answers are only appended'); END;
"""


class NewTask(NamedTuple):
    """A task to add."""

    key: str
    content: dict[str, Any]  # JSON-serializable, see `lit_rlhf.labeling.tasks.Content`
    gold: dict[str, Any] | None = None
    origin: str = ""  # file and line, for messages


class LabelerAccount(NamedTuple):
    """One person."""

    id: int
    name: str
    role: str  # "labeler" or "owner"


class Lease(NamedTuple):
    """A task that a labeler has claimed."""

    task: int
    kind: Kind
    content: dict[str, Any]
    token: str
    started: float  # Unix time
    shown: list[int]  # shown[i] is the number of the completion at place i
    draft: dict[str, str] | None


class Answer(NamedTuple):
    """One answer that is not undone, with its task."""

    id: int
    task: int
    key: str
    kind: Kind
    labeler: str
    action: str  # "answer", "skip" or "surplus"
    content: dict[str, Any]
    shown: list[int]
    seconds: float | None
    created: float  # Unix time
    task_content: dict[str, Any]
    gold: dict[str, Any] | None


class ImportedAnswer(NamedTuple):
    """An answer that was given elsewhere."""

    labeler: str
    action: Action
    content: dict[str, Any]
    seconds: float | None = None
    shown: list[int] | None = None


class Progress(NamedTuple):
    """How far the tasks of a kind are."""

    tasks: int
    finished: int  # tasks with all labels wanted; gold tasks are not counted
    labels: int
    labels_wanted: int


class LabelerProgress(NamedTuple):
    """What one labeler has done."""

    answered: int  # and skipped
    median_seconds: float | None  # of the answers; None without any
    gold_tasks: int  # tasks with a known answer


class Database:
    """A file of tasks and answers.

    Args:
        path: The file.
        create: Whether to make it where it is missing.

    Raises:
        UserError: The file is missing, cannot be written, is of another program or of another version.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = expand_path(path)
        self._turn = Lock()  # threads of this process queue here: SQLite would sleep between its attempts
        if self.path.is_dir():
            raise UserError(f"database {self.path} is a folder: name a file, such as {self.path / 'labels.db'}")
        if not self.path.exists() and not create:
            names = [each.name for each in self.path.parent.glob("*.db")] if self.path.parent.is_dir() else []
            raise UserError(f"no database {self.path}{did_you_mean(self.path.name, names)}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        except OSError as problem:
            raise UserError(f"database {self.path}: cannot be written ({problem.strerror}): use another --db") from None
        self._prepare()

    def _prepare(self) -> None:
        """Create the tables in an empty file; check those of another."""
        with self._connection() as connection:
            is_new = self._check_schema(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            if not is_new:
                return
            connection.execute("BEGIN IMMEDIATE")
            if self._check_schema(connection):  # another server may have been first
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                values = {"id": secrets.token_hex(8), "key": secrets.token_hex(32)}
                connection.executemany("INSERT INTO settings VALUES (?, ?)", values.items())
            connection.execute("COMMIT")

    def _check_schema(self, connection: sqlite3.Connection) -> bool:
        """Return whether the file is empty; refuse that of another program or version, unchanged."""
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        if not tables and not version and not application:
            return True
        if application != APPLICATION_ID:
            raise UserError(f"database {self.path} is of another program: name another file by --db")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"database {self.path} has schema version {version}, and this lit-rlhf reads version "
                f"{SCHEMA_VERSION}: use the lit-rlhf that wrote it, or export there and import here"
            )
        return False

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Open the file, and turn what SQLite reports about it into one line."""
        connection = None
        try:
            # absolute: SQLite would take ":memory:" for no file
            connection = sqlite3.connect(self.path.absolute(), timeout=LOCK_SECONDS, isolation_level=None)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as problem:
            raise UserError(f"database {self.path}: {problem}: {_advice(problem)}") from problem
        finally:
            if connection is not None:
                connection.close()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """Open one consistent state of the file."""
        with self._connection() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that holds the file's lock: all of it is written at the end, or nothing."""
        with self._turn, self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    def read_setting(self, name: str) -> str | None:
        """Return a stored setting."""
        with self.read() as connection:
            row = connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    # labelers

    def add_labeler(self, name: str, role: str = "labeler") -> LabelerAccount:
        """Return the labeler of a name, added where new.

        Raises:
            UserError: A labeler would have the name of the owner.
        """
        with self.write() as connection:
            return _find_or_add_labeler(connection, name, role)

    def make_secret(self, labeler: LabelerAccount) -> str:
        """Return a new secret for a labeler's link; an earlier one is no longer valid."""
        secret = secrets.token_urlsafe(24)
        with self.write() as connection:
            values = (_hash(secret), labeler.id)
            connection.execute("UPDATE labelers SET secret_hash = ? WHERE id = ?", values)
        return secret

    def has_secret(self, labeler: LabelerAccount) -> bool:
        """Return whether a link was made for a labeler."""
        with self.read() as connection:
            row = connection.execute("SELECT secret_hash FROM labelers WHERE id = ?", (labeler.id,)).fetchone()
        return row is not None and row[0] is not None

    def authenticate(self, secret: str) -> LabelerAccount | None:
        """Return whose secret this is, in a time that does not depend on it."""
        found, given = None, _hash(secret)
        with self.read() as connection:
            rows = connection.execute("SELECT id, name, role, secret_hash FROM labelers").fetchall()
        for *fields, secret_hash in rows:
            if hmac.compare_digest(given, secret_hash or ""):
                found = LabelerAccount(*fields)
        return found

    def list_labelers(self) -> list[LabelerAccount]:
        """Return all labelers."""
        with self.read() as connection:
            rows = connection.execute("SELECT id, name, role FROM labelers WHERE role = 'labeler' ORDER BY name")
            return [LabelerAccount(*row) for row in rows]

    # tasks

    def add_tasks(
        self,
        kind: Kind,
        tasks: Sequence[NewTask],
        labels_wanted: Sequence[int],
        settings: Mapping[str, str] | None = None,
    ) -> int:
        """Add the tasks that the file does not hold yet, all or none; return their number.

        Args:
            kind: Of all of them.
            tasks: With known answers or without.
            labels_wanted: Of each; 0: by every labeler.
            settings: To store with them.

        Raises:
            UserError: A task has the id of one in the file, and other content or another known answer.
        """
        with self.write() as connection:
            added = _add_tasks(connection, self.path, kind, tasks, labels_wanted)
            connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", (settings or {}).items())
            return added

    def task_keys(self, kind: Kind) -> list[str]:
        """Return the keys of all tasks of a kind, in order."""
        with self.read() as connection:
            rows = connection.execute("SELECT key FROM tasks WHERE kind = ? ORDER BY position, id", (kind,))
            return [row[0] for row in rows]

    def kinds(self) -> list[Kind]:
        """Return the kinds of tasks in the file."""
        with self.read() as connection:
            found = {row[0] for row in connection.execute("SELECT DISTINCT kind FROM tasks")}
        return [kind for kind in KINDS if kind in found]

    def progress(self, kind: Kind) -> Progress:
        """Return how far the tasks of a kind are."""
        query = """
            SELECT COUNT(*), COALESCE(SUM(num_labels >= labels_wanted), 0), COALESCE(SUM(num_labels), 0),
                COALESCE(SUM(labels_wanted), 0) FROM tasks WHERE kind = ? AND gold IS NULL
        """
        with self.read() as connection:
            return Progress(*connection.execute(query, (kind,)).fetchone())

    def labeler_progress(self, kind: Kind, labeler: LabelerAccount) -> LabelerProgress:
        """Return what a labeler has done of the tasks of a kind."""
        query = (
            "SELECT action, seconds FROM current_answers JOIN tasks ON tasks.id = task WHERE labeler = ? AND kind = ?"
        )
        with self.read() as connection:
            rows = connection.execute(query, (labeler.id, kind)).fetchall()
            gold = "SELECT COUNT(*) FROM tasks WHERE kind = ? AND gold IS NOT NULL"
            (num_gold,) = connection.execute(gold, (kind,)).fetchone()
        seconds = [value for action, value in rows if action == "answer" and value is not None]
        return LabelerProgress(len(rows), median(seconds) if seconds else None, num_gold)

    # a labeler's work

    def claim(self, kind: Kind, labeler: LabelerAccount, now: float | None = None) -> Lease | None:
        """Return the task that a labeler works on, claimed now where there is none; None if nothing is left.

        A task counts its answers and the leases of others that have not run out, and is claimed only below the number
        of labels wanted.
        """
        now = time() if now is None else now
        with self.write() as connection:
            lease = _find_lease(connection, kind, labeler, now)
            if lease is None:
                row = connection.execute(_NEXT_TASK, {"kind": kind, "labeler": labeler.id, "now": now}).fetchone()
                if row is None:
                    return None
                shown = _shuffle(json.loads(row[1]), f"{row[2]}\0{labeler.name}")
                _insert_lease(connection, row[0], labeler, now, shown)
                lease = _find_lease(connection, kind, labeler, now)
            assert lease is not None
            connection.execute("UPDATE leases SET expires = ? WHERE token = ?", (now + LEASE_SECONDS, lease.token))
            return lease

    def find_lease(self, token: str, labeler: LabelerAccount) -> Lease | None:
        """Return a labeler's lease, also one that has run out; None if it was answered or never given."""
        with self.read() as connection:
            row = connection.execute(f"{_LEASE} WHERE token = ? AND labeler = ?", (token, labeler.id)).fetchone()
        return None if row is None else _read_lease(row)

    def keep_draft(self, token: str, labeler: LabelerAccount, draft: dict[str, str], now: float | None = None) -> bool:
        """Keep a form that is not finished, and extend its lease; False if there is no such lease."""
        now = time() if now is None else now
        with self.write() as connection:
            values = (json.dumps(draft), now + LEASE_SECONDS, token, labeler.id, now)
            query = "UPDATE leases SET draft = ?, expires = ? WHERE token = ? AND labeler = ? AND expires > ?"
            return connection.execute(query, values).rowcount == 1

    def submit(
        self,
        token: str,
        labeler: LabelerAccount,
        action: Action,
        content: dict[str, Any],
        seconds: float | None = None,
        now: float | None = None,
    ) -> str:
        """Append an answer or a skip.

        Args:
            token: Of the lease.
            labeler: Its owner.
            action: What the labeler did.
            content: The answer; or the skip's reason.
            seconds: Time spent on the page; at most that since it was claimed, which is the default.
            now: Unix time.

        Returns:
            "answer" or "skip"; "surplus" if the lease had run out and others have answered: the answer is kept, and is
            not one of the labels; "repeated" if this lease was answered before; "unknown" if it was never given.
        """
        now = time() if now is None else now
        with self.write() as connection:
            own = (token, labeler.id)
            if connection.execute("SELECT 1 FROM answers WHERE submission = ? AND labeler = ?", own).fetchone():
                return "repeated"
            row = connection.execute(
                "SELECT task, started, expires, shown FROM leases WHERE token = ? AND labeler = ?", own
            ).fetchone()
            if row is None:
                return "unknown"
            task, started, expires, shown = row
            recorded: str = action
            if action == "answer" and expires <= now and not _has_capacity(connection, task, labeler, now):
                recorded = "surplus"
            spent = max(now - started, 0.0)
            seconds = spent if seconds is None else min(max(seconds, 0.0), spent)
            connection.execute(
                "INSERT INTO answers (task, labeler, action, content, shown, seconds, created, submission) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (task, labeler.id, recorded, _dumps(content), shown, round(seconds, 3), now, token),
            )
            connection.execute("DELETE FROM leases WHERE token = ?", (token,))
            if recorded == "answer":
                connection.execute("UPDATE tasks SET num_labels = num_labels + 1 WHERE id = ?", (task,))
            return recorded

    def last_answer(self, kind: Kind, labeler: LabelerAccount) -> int | None:
        """Return the number of the last answer or skip of a labeler that is not undone."""
        query = """
            SELECT current_answers.id FROM current_answers JOIN tasks ON tasks.id = task
            WHERE labeler = ? AND kind = ? AND submission IS NOT NULL ORDER BY current_answers.id DESC LIMIT 1
        """
        with self.read() as connection:
            row = connection.execute(query, (labeler.id, kind)).fetchone()
        return None if row is None else int(row[0])

    def undo(self, answer: int, labeler: LabelerAccount, draft: dict[str, str], now: float | None = None) -> bool:
        """Take an answer back by a row of its own, and give its task to the labeler again.

        Args:
            answer: Its number.
            labeler: Whose answer it is.
            draft: The form to show, filled in.
            now: Unix time.

        Returns:
            Whether it was taken back; not if it was before.
        """
        now = time() if now is None else now
        with self.write() as connection:
            query = "SELECT task, action, shown FROM current_answers WHERE id = ? AND labeler = ?"
            row = connection.execute(query, (answer, labeler.id)).fetchone()
            if row is None:
                return False
            task, action, shown = row
            connection.execute(
                "INSERT INTO answers (task, labeler, action, content, shown, created, undoes) "
                "VALUES (?, ?, 'undo', '{}', ?, ?, ?)",
                (task, labeler.id, shown, now, answer),
            )
            if action == "answer":
                connection.execute("UPDATE tasks SET num_labels = num_labels - 1 WHERE id = ?", (task,))
            _insert_lease(connection, task, labeler, now, json.loads(shown), draft, from_surplus=action == "surplus")
            return True

    # answers

    def find_answer(self, number: int) -> Answer:
        """Return one answer."""
        with self.read() as connection:
            return _read_answer(connection.execute(f"{_ANSWER} WHERE own.id = ?", (number,)).fetchone())

    def list_answers(self, kind: Kind | None = None, actions: Sequence[str] = ("answer",)) -> list[Answer]:
        """Return the answers that are not undone, by task and then by time."""
        with self.read() as connection:
            rows = connection.execute(f"{_ANSWER} ORDER BY tasks.position, tasks.id, own.id").fetchall()
        answers = map(_read_answer, rows)
        return [each for each in answers if each.action in actions and kind in (None, each.kind)]

    def num_undone(self, labeler: str) -> int:
        """Return how many answers a labeler took back."""
        query = "SELECT COUNT(*) FROM answers JOIN labelers ON labelers.id = labeler WHERE action = 'undo' AND name = ?"
        with self.read() as connection:
            return int(connection.execute(query, (labeler,)).fetchone()[0])

    def import_answers(self, kind: Kind, tasks: Sequence[NewTask], answers: Sequence[Sequence[ImportedAnswer]]) -> int:
        """Add tasks with answers given elsewhere, all or none; return how many answers were new.

        An answer that the file holds already (of the same labeler to the same task) is not added again.

        Raises:
            UserError: A task has the id of one in the file, and other content; or a labeler has the name of the owner.
        """
        added, now = 0, time()
        with self.write() as connection:
            # 0 would be "by every labeler", also of a task that nobody has answered
            wanted = [0 if task.gold else max(len(own), 1) for task, own in zip(tasks, answers)]
            _add_tasks(connection, self.path, kind, tasks, wanted)
            for task, own in zip(tasks, answers):
                row = connection.execute("SELECT id FROM tasks WHERE kind = ? AND key = ?", (kind, task.key)).fetchone()
                for each in own:
                    labeler = _find_or_add_labeler(connection, each.labeler)
                    known = "SELECT 1 FROM current_answers WHERE task = ? AND labeler = ?"
                    if connection.execute(known, (row[0], labeler.id)).fetchone():
                        continue
                    shown = each.shown or list(range(len(task.content.get("completions", ()))))
                    values = (row[0], labeler.id, each.action, _dumps(each.content), _dumps(shown), each.seconds, now)
                    connection.execute(
                        "INSERT INTO answers (task, labeler, action, content, shown, seconds, created) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?)",
                        values,
                    )
                    added += 1
                    if each.action == "answer":
                        query = (
                            "UPDATE tasks SET num_labels = num_labels + 1, labels_wanted = CASE labels_wanted WHEN 0 "
                            "THEN 0 ELSE MAX(labels_wanted, num_labels + 1) END WHERE id = ?"
                        )
                        connection.execute(query, (row[0],))
        return added


_LEASE = "SELECT task, kind, content, token, started, shown, draft FROM leases JOIN tasks ON tasks.id = leases.task"
_ANSWER = (
    "SELECT own.id, tasks.id, key, kind, name, action, own.content, shown, seconds, created, tasks.content, gold "
    "FROM current_answers AS own JOIN tasks ON tasks.id = own.task JOIN labelers ON labelers.id = own.labeler"
)
_OTHERS = (
    "SELECT COUNT(*) FROM leases AS other WHERE other.task = tasks.id AND other.labeler != :labeler "
    "AND other.expires > :now"
)
_HAS_CAPACITY = f"(labels_wanted = 0 OR num_labels + ({_OTHERS}) < labels_wanted)"  # besides the leases of others
_NEXT_TASK = f"""
    SELECT id, content, key FROM tasks WHERE kind = :kind AND (labels_wanted = 0 OR num_labels < labels_wanted)
    AND NOT EXISTS (SELECT 1 FROM current_answers AS own WHERE own.task = tasks.id AND own.labeler = :labeler)
    AND {_HAS_CAPACITY} ORDER BY position, id LIMIT 1
"""


def _find_lease(connection: sqlite3.Connection, kind: Kind, labeler: LabelerAccount, now: float) -> Lease | None:
    """Return the newest lease of a labeler whose task still takes this labeler's answer."""
    query = (
        f"{_LEASE} WHERE labeler = :labeler AND kind = :kind AND (expires > :now OR {_HAS_CAPACITY}) "
        "ORDER BY started DESC, task DESC LIMIT 1"
    )
    row = connection.execute(query, {"labeler": labeler.id, "kind": kind, "now": now}).fetchone()
    return None if row is None else _read_lease(row)


def _has_capacity(connection: sqlite3.Connection, task: int, labeler: LabelerAccount, now: float) -> bool:
    """Return whether a task takes one more label, besides the leases of others."""
    query = f"SELECT 1 FROM tasks WHERE id = :task AND {_HAS_CAPACITY}"
    return connection.execute(query, {"task": task, "labeler": labeler.id, "now": now}).fetchone() is not None


def _read_lease(row: Sequence[Any]) -> Lease:
    task, kind, content, token, started, shown, draft = row
    return Lease(task, kind, json.loads(content), token, started, json.loads(shown), _loads(draft))


def _read_answer(row: Sequence[Any]) -> Answer:
    number, task, key, kind, labeler, action, content, shown, seconds, created, task_content, gold = row
    answer, order = json.loads(content), json.loads(shown)
    known = _loads(gold)
    return Answer(
        number, task, key, kind, labeler, action, answer, order, seconds, created, json.loads(task_content), known
    )


def _insert_lease(
    connection: sqlite3.Connection,
    task: int,
    labeler: LabelerAccount,
    now: float,
    shown: list[int],
    draft: dict[str, str] | None = None,
    from_surplus: bool = False,
) -> None:
    # a surplus answer never was one of the labels: its task, given back, is claimed only if it takes one
    expires = now if from_surplus else now + LEASE_SECONDS
    values = (
        task,
        labeler.id,
        secrets.token_urlsafe(16),
        now,
        expires,
        _dumps(shown),
        _dumps(draft) if draft else None,
    )
    connection.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)", values)


def _add_tasks(
    connection: sqlite3.Connection, path: Path, kind: Kind, tasks: Sequence[NewTask], labels_wanted: Sequence[int]
) -> int:
    query = "SELECT COALESCE(MAX(position) + 1, 0) FROM tasks WHERE gold IS NULL"
    (start,) = connection.execute(query).fetchone()
    new: list[tuple[NewTask, int]] = []
    for task, wanted in zip(tasks, labels_wanted, strict=True):
        query = "SELECT content, gold FROM tasks WHERE kind = ? AND key = ?"
        row = connection.execute(query, (kind, task.key)).fetchone()
        if row is None:
            new.append((task, wanted))
        elif row[0] != _dumps(task.content):
            raise UserError(
                f"{task.origin}: the task {task.key!r} has other content than in {path}, where it may have been "
                "answered: give the changed row another id, or name another file by --db"
            )
        elif task.gold is not None and row[1] != _dumps(task.gold):
            stored = "no known answer" if row[1] is None else "another known answer"
            raise UserError(
                f"{task.origin}: the task {task.key!r} has {stored} in {path}, where it may have been answered: leave "
                "the row out, or name another file by --db"
            )
    others = [each for each in new if each[0].gold is None]
    known = [each for each in new if each[0].gold is not None]
    insert = "INSERT INTO tasks (kind, key, position, content, gold, labels_wanted) VALUES (?, ?, ?, ?, ?, ?)"
    for number, (task, wanted) in enumerate(others):
        connection.execute(insert, (kind, task.key, start + number, _dumps(task.content), None, wanted))
    # tasks with known answers are spread evenly between the others
    query = "SELECT COALESCE(MIN(position), 0), COALESCE(MAX(position), 0) FROM tasks WHERE kind = ? AND gold IS NULL"
    low, high = connection.execute(query, (kind,)).fetchone()
    for number, (task, wanted) in enumerate(known):
        position = low - 0.5 + (number + 0.5) * (high + 1 - low) / len(known)
        gold = _dumps(task.gold)
        connection.execute(insert, (kind, task.key, position, _dumps(task.content), gold, wanted))
    return len(new)


def _find_or_add_labeler(connection: sqlite3.Connection, name: str, role: str = "labeler") -> LabelerAccount:
    if (name == OWNER) != (role == OWNER):
        raise UserError(f"no labeler may be named {name!r}: that is the account of the overview; choose another name")
    connection.execute("INSERT OR IGNORE INTO labelers (name, role) VALUES (?, ?)", (name, role))
    return LabelerAccount(*connection.execute("SELECT id, name, role FROM labelers WHERE name = ?", (name,)).fetchone())


def _shuffle(content: dict[str, Any], seed: str) -> list[int]:
    """Return a random order of a task's completions, which depends on the task and the labeler alone."""
    order = list(range(len(content.get("completions", ()))))
    Random(hashlib.sha256(seed.encode()).digest()).shuffle(order)
    return order


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _loads(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _statements(script: str) -> Iterator[str]:
    """Split a script into complete statements: `executescript` would commit after each."""
    part = ""
    for line in script.splitlines(keepends=True):
        part += line
        if sqlite3.complete_statement(part):
            yield part
            part = ""


def _advice(problem: sqlite3.DatabaseError) -> str:
    text = str(problem)
    if "full" in text:
        return "free some space on that disk, then send the answer again; what was answered before is kept"
    if "readonly" in text or "unable to open" in text:
        return "the file and its folder must be writable: change their permissions, or name another file by --db"
    if "locked" in text:
        return f"another program has held it for {LOCK_SECONDS:g} s: close that, then try again"
    if "not a database" in text or "malformed" in text:
        return "name another file by --db"
    return "check the disk, then try again; what was answered before is kept"
