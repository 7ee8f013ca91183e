"""`lit-rlhf label` and `lit-rlhf chat`: settings, sources of tasks, what is refused in one line."""

from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the extra [label] is not installed")

from lit_rlhf.commands import label
from lit_rlhf.labeling import serving
from lit_rlhf.labeling.database import Database
from tests.cli.conftest import Command
from tests.helpers.small_runs import write_rows

RANK = [{"prompt": f"w{n}", "completions": ["w1 w2", "w3 w4", "w5"]} for n in range(4)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tasks, where a server ends as soon as it has started."""
    write_rows(tmp_path / "tasks.jsonl", RANK)
    (tmp_path / "empty.md").write_text("\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "serve", lambda app, listener: listener.close())
    return tmp_path


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tasks.jsonl", "--model", "m"], "TASKS and --model exclude each other"),
        (["--model", "m"], "--model and --prompts belong together"),
        (["tasks.jsonl", "--overlap", "1.5"], "--overlap is a share"),
        (["tasks.jsonl", "--overlap", "0.5"], "a task would need 2 labelers, and there are 1"),
        (
            ["tasks.jsonl", "--labels-per-task", "3", "--labelers", "a,b"],
            "a task would need 3 labelers, and there are 2",
        ),
        (["tasks.jsonl", "--labelers", "a, a"], "the name 'a' is given twice"),
        (["tasks.jsonl", "--labelers", "a,,b"], "the name at place 2 is empty"),
        (["tasks.jsonl", "--labelers", "owner"], "nobody may be named 'owner'"),
        (["tasks.jsonl", "--labelers", "overview"], "nobody may be named 'overview'"),
        (["tasks.jsonl", "--labelers", "a\nb"], "holds a character that cannot be printed"),
        (["tasks.jsonl", "--labelers", "a\udcff"], "holds a character that cannot be printed"),
        (["tasks.jsonl", "--overlap", "nan"], "--overlap is a share"),
        (["tasks.jsonl", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["tasks.jsonl", "--instructions", "empty.md"], "'empty.md' is empty"),
        (["tasks.jsonl", "--db", "."], "database . is a folder"),
        (["tasks.jsonl", "--db", "tasks.jsonl"], "file is not a database"),
        (["tasks.jsonl", "--db", "tasks.jsonl/l.db"], "cannot be written"),
        (["tasks.jsonl", "--host", "0.0.0.0"], "is open to others: name the people"),
        (["tasks.jsonl", "--labels-per-task", "0"], "must be 1 or more"),
        (["tasks.jsonl", "--kind", "order"], "invalid choice"),
        (["tasks.jsonl", "--color"], "has no option"),
        (["task.jsonl"], "did you mean 'tasks.jsonl'"),
        ([], "no database runs/labels.db yet: name a file TASKS"),
        (["--db", "new.db"], "no database new.db yet: name a file TASKS"),
        (["tasks.jsonl", "--gold", "tasks.jsonl"], "the ranks must be 3 numbers"),
        (["tasks.jsonl", "--instructions", "no.md"], "no data file 'no.md'"),
        (["tasks.jsonl", "--port", "99999"], "--port 99999"),
        (["export", "no.db", "--to", "x"], "no database no.db"),
        (["import", "no.json"], "no data file"),
        (["import", "tasks.jsonl"], "not an export of"),
    ],
)
def test_a_wrong_setting_is_one_line(folder: Path, command: Command, args: list[str], message: str):
    code, _, error = command("label", *args)
    assert code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["empty.md", "tasks.jsonl"], "nothing is written"


def test_bad_tasks_leave_nothing_behind(folder: Path, command: Command):
    write_rows(folder / "bad.jsonl", [*RANK, {"prompt": "p", "completions": ["one"]}])
    code, _, error = command("label", "bad.jsonl", "--db", "l.db")
    assert code == 2 and "bad.jsonl:5: 1 completions" in error and not (folder / "l.db").exists()
    write_rows(folder / "gold.jsonl", [{"prompt": "p", "first": "a", "second": "b", "preference": "first"}])
    code, _, error = command("label", "tasks.jsonl", "--db", "l.db", "--gold", "gold.jsonl")
    assert code == 2 and "holds tasks to compare, and the others are to rank" in error
    assert Database(folder / "l.db").kinds() == [], "known answers of another kind: no task is added either"


def test_a_port_in_use_is_refused_before_anything_is_written(folder: Path, command: Command):
    with closing(serving.bind("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, error = command("label", "tasks.jsonl", "--db", "l.db", "--port", port)
        assert code == 2 and f"--port {port}: " in error and "in use" in error and not (folder / "l.db").exists()
        code, _, error = command("chat", "--model", "none", "--db", "l.db", "--port", port)
        assert code == 2 and "in use" in error and not (folder / "l.db").exists()


def test_many_people_have_a_link_each(folder: Path, command: Command):
    names = ",".join(f"p{n}" for n in range(40))
    code, out, _ = command("label", "tasks.jsonl", "--db", "l.db", "--labelers", names)
    assert code == 0 and out.count("/login/") == 41


def test_nobody_takes_the_account_of_the_overview(folder: Path, command: Command, llama: str):
    write_rows(folder / "theirs.jsonl", [{**RANK[0], "ranks": [0, 1, 1], "labeler": "owner"}])
    for args in (["import", "theirs.jsonl", "--db", "l.db"], ["tasks.jsonl", "--db", "l.db", "--labelers", "owner"]):
        code, _, error = command("label", *args)
        assert code == 2 and "may be named 'owner'" in error
    code, _, error = command("chat", "--model", llama, "--name", "owner", "--db", "l.db")
    assert code == 2 and "may be named 'owner'" in error and Database(folder / "l.db").list_labelers() == []


def test_a_start_prints_the_address_and_a_restart_goes_on(folder: Path, command: Command):
    code, out, _ = command("label", "tasks.jsonl", "--db", "l.db")
    assert code == 0 and "4 tasks to rank, 4 of them new" in out and "http://127.0.0.1:" in out
    assert "4 tasks to rank, 0 of them new" in command("label", "tasks.jsonl", "--db", "l.db")[1]
    assert command("label", "--db", "l.db")[0] == 0, "without the file"
    write_rows(folder / "tasks.jsonl", [*RANK, {"prompt": "new", "completions": ["a", "b", "c"]}])
    assert "5 tasks to rank, 1 of them new" in command("label", "tasks.jsonl", "--db", "l.db")[1]
    write_rows(folder / "tasks.jsonl", RANK[1:])
    code, _, error = command("label", "tasks.jsonl", "--db", "l.db")
    assert code == 2 and "no longer holds 2 of the 5 tasks" in error and "start without the file" in error
    assert len(Database(folder / "l.db").task_keys("rank")) == 5


def test_links_are_printed_once_and_renewed_on_demand(folder: Path, command: Command):
    args = ("label", "tasks.jsonl", "--db", "l.db", "--labelers", "ann,bo")
    first = command(*args)[1]
    assert [first.count(f"{name}: http://127.0.0.1") for name in ("ann", "bo", "overview")] == [1, 1, 1]
    again = command(*args, *())[1]
    assert "/login/" not in again and "the links of ann, bo, owner are those of an earlier start" in again
    more = command(*args[:-1], "ann,bo,cy")[1]
    assert more.count("/login/") == 1 and "cy: http" in more
    assert command(*args, "--new-links")[1].count("/login/") == 3


def test_overlap_and_gold_decide_how_many_labels_a_task_gets(folder: Path, command: Command):
    write_rows(folder / "gold.jsonl", [{**RANK[0], "prompt": "known", "ranks": [0, 1, 1]}])
    args = ["tasks.jsonl", "--labelers", "a,b,c", "--labels-per-task", "2", "--overlap", "0.5", "--gold", "gold.jsonl"]
    assert command("label", *args, "--db", "l.db")[0] == 0
    with Database(folder / "l.db").read() as connection:
        wanted = [row[0] for row in connection.execute("SELECT labels_wanted FROM tasks ORDER BY position")]
    assert sorted(wanted) == [0, 2, 2, 3, 3]


def test_outputs_are_sampled_from_models_once(folder: Path, command: Command, llama: str, monkeypatch):
    write_rows(folder / "prompts.jsonl", [{"prompt": f"w{n} w{n + 1}"} for n in range(3)])
    args = ["--model", llama, "--prompts", "prompts.jsonl", "--samples", "3", "--max-new-tokens", "6", "--db", "l.db"]
    code, out, error = command("label", *args)
    assert code == 0, error
    assert "3 tasks to rank" in out
    database = Database(folder / "l.db")
    ann = database.add_labeler("ann")
    lease = database.claim("rank", ann)
    assert lease and lease.content["models"] == [llama] * len(lease.content["completions"])
    assert 2 <= len(set(lease.content["completions"])) <= 3
    monkeypatch.setattr("lit_rlhf.labeling.model_samples.sample_tasks", lambda *args: pytest.fail("sampled again"))
    assert "sampled at an earlier start" in command("label", *args)[1]


def test_too_many_samples_are_refused_before_a_model_is_loaded(folder: Path, command: Command):
    write_rows(folder / "prompts.jsonl", [{"prompt": "w1"}])
    code, _, error = command("label", "--model", "none", "--prompts", "prompts.jsonl", "--samples", "30")
    assert code == 2 and "30 responses per prompt; to rank takes 2 to 9" in error


def test_the_choices_of_the_command_are_those_of_the_package():
    from lit_rlhf.labeling.database import KINDS
    from lit_rlhf.labeling.exports import FORMS
    from lit_rlhf.labeling.imports import READERS

    assert label.KINDS == KINDS and set(label.IMPORTS) == set(READERS)
    assert set(label.EXPORTS) == {form for forms in FORMS.values() for form in forms}


def test_import_and_export_by_the_command(folder: Path, command: Command):
    rows = [{**row, "ranks": [0, 1, 1], "labeler": "ann", "seconds": 2.0} for row in RANK]
    write_rows(folder / "theirs.jsonl", rows)
    assert (
        "4 answers to 4 tasks to rank, 4 of them new" in command("label", "import", "theirs.jsonl", "--db", "l.db")[1]
    )
    assert "4 rankings of 4 answers" in command("label", "export", "l.db", "--to", "mine.jsonl")[1]
    code, _, error = command("label", "export", "l.db", "--to", "mine.jsonl")
    assert code == 2 and "exists already" in error


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "a", "--model", "b", "--model", "c"], "one or two models, got 3"),
        (["--model", "a", "--temperature", "-1"], "--temperature must be 0 or more"),
        (["--model", "a", "--temperature", "nan"], "--temperature must be 0 or more"),
        (["--model", "a", "--model", "a", "--temperature", "0"], "two greedy responses of the same model"),
        (["--model", "no-such-folder/x"], "no-such-folder"),
        ([], "--model"),
    ],
)
def test_a_wrong_chat_is_one_line(folder: Path, command: Command, args: list[str], message: str):
    code, _, error = command("chat", *args)
    assert code == 2 and message in error and error.count("\n") == 1
    assert not (folder / "runs").exists(), "no database is made"


def test_chat_starts_with_two_models(folder: Path, command: Command, llama: str, model_folders: dict[str, str]):
    code, out, error = command("chat", "--model", llama, "--model", model_folders["gpt2"], "--db", "l.db")
    assert code == 0 and "http://127.0.0.1:" in out and "votes are comparisons in l.db" in out, error


def test_chat_with_one_model_says_how_to_vote(folder: Path, command: Command, llama: str):
    assert "no vote with one response: repeat --model" in command("chat", "--model", llama, "--db", "l.db")[1]
    assert "votes are comparisons" in command("chat", "--model", llama, "--model", llama, "--db", "l.db")[1]


def test_an_export_is_for_named_people(folder: Path, command: Command):
    rows = [{**RANK[0], "ranks": [0, 1, 1], "labeler": name} for name in ("ann", "bo", "cy")]
    write_rows(folder / "theirs.jsonl", rows)
    assert command("label", "import", "theirs.jsonl", "--db", "l.db")[0] == 0
    assert "2 rankings" in command("label", "export", "l.db", "--labelers", "ann, bo", "--to", "mine.jsonl")[1]
    code, _, error = command("label", "export", "l.db", "--to", "mine.jsonl/in-a-file.jsonl")
    assert code == 2 and "--to: cannot write" in error and error.count("\n") == 1


def test_known_answers_are_apart_from_the_tasks_and_added_with_them_or_not_at_all(folder: Path, command: Command):
    gold = write_rows(folder / "gold.jsonl", [{**RANK[2], "ranks": [0, 1, 1]}])
    code, _, error = command("label", "tasks.jsonl", "--gold", str(gold), "--db", "l.db")
    assert code == 2 and "gold.jsonl:1: " in error and "tasks.jsonl:3; leave one of them out" in error
    assert Database(folder / "l.db").kinds() == [], "nothing is added"
    assert command("label", "tasks.jsonl", "--db", "l.db")[0] == 0
    code, _, error = command("label", "--gold", str(gold), "--db", "l.db")
    assert code == 2 and "has no known answer in l.db" in error
    ids = [{**row, "id": number} for number, row in enumerate(RANK)]
    write_rows(folder / "tasks.jsonl", ids[:2])
    assert command("label", "tasks.jsonl", "--db", "m.db")[0] == 0
    write_rows(folder / "gold.jsonl", [{**ids[3], "id": 0, "ranks": [0, 1, 1]}])
    write_rows(folder / "more.jsonl", ids[2:])
    code, _, error = command("label", "more.jsonl", "--gold", str(gold), "--db", "m.db")
    assert code == 2 and "the task '0' has other content" in error
    assert len(Database(folder / "m.db").task_keys("rank")) == 2, "the tasks are not added either"


def test_a_home_folder_of_nobody_is_a_name_like_others(folder: Path, command: Command):
    assert command("label", "tasks.jsonl", "--db", "~no-such-user.db")[0] == 0
    assert (folder / "~no-such-user.db").is_file()
