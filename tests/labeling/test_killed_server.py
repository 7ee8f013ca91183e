"""Many labelers at once: every answer exactly once, also through `kill -9`, and with two servers on one database."""

import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from lit_rlhf.labeling.database import Database
from tests.helpers.scripted_labelers import LabelServer, ScriptedLabeler, work_together
from tests.helpers.small_runs import write_rows

TASKS, PEOPLE = 60, 6


def rank_by_length(prompt: str, outputs: list[str]) -> list[int]:
    order = sorted({len(text) for text in outputs})
    return [order.index(len(text)) + 1 for text in outputs]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    rows = [{"prompt": f"question {n}", "completions": [f"{n}" + "x" * k for k in range(4)]} for n in range(TASKS)]
    write_rows(tmp_path / "tasks.jsonl", rows)
    return tmp_path


def check_record(path: Path, labelers: list[ScriptedLabeler]) -> None:
    database = Database(path, create=False)
    answers = database.list_answers()
    by_task = Counter(each.key for each in answers)
    assert Counter(by_task.values()) == {1: TASKS * 4 // 5, 2: TASKS // 5}, "no task over its number of labels"
    sent = [lease for labeler in labelers for _, lease in labeler.sent]
    with database.read() as connection:
        kept = [row[0] for row in connection.execute("SELECT submission FROM answers")]
    assert Counter(kept) == Counter(sent) and set(Counter(kept).values()) == {1}, "each answer that was sent, once"
    assert all(each.content["ranks"] == [1, 2, 3, 4] for each in answers)
    assert max(Counter((each.key, each.labeler) for each in answers).values()) == 1
    assert database.list_answers(actions=("surplus",)) == []


def test_no_answer_is_lost_or_doubled_by_kill_9(tasks: Path):
    names = [f"p{n}" for n in range(PEOPLE)]
    args = ["tasks.jsonl", "--db=labels.db", "--overlap=0.2", f"--labelers={','.join(names)}"]
    server = LabelServer(args, tasks)
    labelers = [ScriptedLabeler(server.links[name], rank_by_length) for name in names]
    killed = []

    def kill_in_the_middle() -> None:
        database = Database(tasks / "labels.db")
        for share in (0.2, 0.6):
            while database.progress("rank").labels < share * TASKS:
                time.sleep(0.01)
            server.kill()
            killed.append(database.progress("rank").labels)
            server.start()

    killer = threading.Thread(target=kill_in_the_middle)
    killer.start()
    work_together(labelers)
    killer.join()
    assert "are those of an earlier start" in server.output and "0 of them new" in server.output
    assert f"{TASKS * 6 // 5:,} of {TASKS * 6 // 5:,} labels are in labels.db" in server.stop()
    assert len(killed) == 2 and killed[1] < TASKS * 6 // 5
    check_record(tasks / "labels.db", labelers)


def test_two_servers_share_a_database(tasks: Path):
    names = [f"p{n}" for n in range(PEOPLE)]
    args = ["tasks.jsonl", "--db=labels.db", "--overlap=0.2", f"--labelers={','.join(names)}"]
    first = LabelServer(args, tasks)
    second = LabelServer(args, tasks)
    links = [
        link if n % 2 else link.replace(first.address, second.address) for n, link in enumerate(first.links.values())
    ]
    links = [link for name, link in zip(first.links, links) if name != "overview"]
    labelers = [ScriptedLabeler(link, rank_by_length) for link in links]
    work_together(labelers)
    first.stop(), second.stop()
    check_record(tasks / "labels.db", labelers)
