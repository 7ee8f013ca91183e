"""Damaged exports of every tool, one entry at a time: read and usable, or refused in one line with file and row."""

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.labeling.database import Database
from lit_rlhf.labeling.exports import FORMS, export_answers
from lit_rlhf.labeling.imports import read_import
from lit_rlhf.labeling.overview import build_overview
from lit_rlhf.labeling.pages import render_page
from tests.helpers.fuzzing import list_paths, parent_of
from tests.labeling.test_exports import AS_COLUMNS, FIELDS, PROMPTS, RANKED, answered, label_studio, potato

VALUES = (None, True, [], {}, "", 0, -1, 0.5, 10**400, math.nan, "text", ["text"], [["text"]], [0, 0, 0], {"a": 1})
KINDS = ("rank", "compare", "rate", "demonstrate")
OWN: dict[str, dict[str, Any]] = {
    "rank": {"id": "1", "prompt": "p", "completions": ["a", "b", "c"], "models": ["x", "y", "z"], "ranks": [0, 1, 1]},
    "compare": {"prompt": "p", "first": "a", "second": "b", "preference": "tie", "both_bad": True},
    "rate": {"prompt": "p", "answer": "a", "overall": 3, "hallucination": True},
    "demonstrate": {"prompt": [{"role": "user", "content": "p"}], "completion": "a"},
}
EXTRAS = {"labeler": "ann", "seconds": 1.5, "note": "n", "prompt_flags": ["ambiguous"], "none_acceptable": True}
ROWS: dict[str, dict[str, Any]] = {
    **{kind: {**row, **EXTRAS} for kind, row in OWN.items()},
    "rank with an order": {**OWN["rank"], **EXTRAS, "shown": [2, 0, 1], "sensitive": "violence"},
    "label-studio ranker": label_studio({"ranker": ["z", "x", "y"]}),
    "label-studio buckets": label_studio({"ranker": {"rank-1": ["y"], "rank-2": ["x", "z"]}}),
    "label-studio pairwise": label_studio({"selected": "right"}, "pairwise"),
    "argilla 2": {
        "id": "1",
        "fields": FIELDS,
        "responses": {"ranking": [{"value": RANKED, "user_id": "u", "status": "submitted"}]},
    },
    "argilla 1": {"fields": FIELDS, "responses": [{"user_id": "u", "values": {"ranking": {"value": RANKED}}}]},
    "argilla 1 hub": {**FIELDS, "ranking": [{"user_id": "u", "value": AS_COLUMNS, "status": "submitted"}]},
    "argilla 2 hub": {**FIELDS, "ranking.responses": [RANKED], "ranking.responses.users": ["u"]},
    "argilla text": {"fields": {"prompt": "p"}, "responses": {"answer": [{"value": "a", "user_id": "u"}]}},
    "potato": potato("B,D=A,C"),
}


def damaged(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows with one entry removed, or of another type."""
    for path in list_paths(rows):
        for value in ("removed", *VALUES):
            changed = copy.deepcopy(rows)
            if value == "removed":
                del parent_of(changed, path)[path[-1]]
            else:
                parent_of(changed, path)[path[-1]] = value
            yield f"{path} = {value!r:.50}", changed


def check(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Import rows with each damage in turn. What is taken can be looked at and exported."""
    path, taken, num_refused = folder / "theirs.json", [], 0
    for what, changed in [("nothing", rows), *damaged(rows)]:
        path.write_text(json.dumps(changed))
        try:
            taken.append(read_import(str(path)))
        except UserError as problem:
            assert "theirs.json" in str(problem) and "\n" not in str(problem), what
            assert what != "nothing", problem
            num_refused += 1
        except Exception as problem:
            raise AssertionError(f"{what}: {type(problem).__name__}: {problem}") from problem
    assert num_refused > 5 and len(taken) > 5
    database = Database(folder / "l.db")
    for kind in {each.kind for each in taken}:
        own = [
            (task, answers) for each in taken if each.kind == kind for task, answers in zip(each.tasks, each.answers)
        ]
        tasks = [task._replace(key=str(number)) for number, (task, _) in enumerate(own)]
        database.import_answers(kind, tasks, [answers for _, answers in own])
        render_page("overview", overview=build_overview(database, kind), live=False)
        for form in FORMS[kind]:
            if form != "datasets":
                export_answers(database, folder / f"{kind}-{form}", form, kind, with_gold=True)


@pytest.mark.parametrize("name", ROWS)
def test_a_damaged_row_is_refused_or_usable(tmp_path: Path, name: str):
    check(tmp_path, [ROWS[name]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_export_to_label_studio_is_refused_or_usable(tmp_path: Path, kind: str):
    export_answers(answered(tmp_path, kind, PROMPTS[1:2]), tmp_path / "own.json", "label-studio")
    (row,) = json.loads((tmp_path / "own.json").read_text())
    check(tmp_path, [{**row, "annotations": row["annotations"][:1]}])
