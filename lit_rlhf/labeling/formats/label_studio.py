"""Label Studio's JSON: ranker (lists and buckets), pairwise, rating and text area; out and in."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lit_rlhf.data.formats.record_validation import is_missing
from lit_rlhf.data.formats.registry import read_records
from lit_rlhf.data.formats.row_readers import get_messages
from lit_rlhf.data.records import PromptRow, to_messages, to_plain_text
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.judges.judging_types import MAX_RATING, METADATA_FIELDS, MIN_RATING
from lit_rlhf.labeling.answers import PREFERENCES, SKIP_REASONS
from lit_rlhf.labeling.database import Answer, ImportedAnswer, Kind, NewTask
from lit_rlhf.labeling.formats.imported import (
    PROMPT_NAMES,
    ImportBuilder,
    Imported,
    find_text,
    read_extras,
    read_labeler,
    read_seconds,
    task_of,
)
from lit_rlhf.labeling.tasks import PromptWithCompletions, StrictReport, build_content, dense_bins, is_name, read_gold

_TYPES: dict[str, Kind] = {"ranker": "rank", "pairwise": "compare", "rating": "rate", "textarea": "demonstrate"}
_PAIRS = (("first", "second"), ("text1", "text2"), ("answer1", "answer2"), ("response1", "response2"))
_SINGLE = ("answer", "response", "completion", "output")
_OWN = "lit_rlhf"  # under "meta": what Label Studio has no place for


def to_label_studio(kind: Kind, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Return tasks with annotations; what Label Studio has no place for is kept under "meta"."""
    tasks: dict[int, dict[str, Any]] = {}
    for answer in answers:
        content = answer.task_content
        if answer.task not in tasks:
            data: dict[str, Any] = {"prompt": to_plain_text(content["prompt"])}
            if kind == "rank":
                texts = enumerate(content["completions"], start=1)
                data["items"] = [{"id": f"output-{n}", "title": f"output {n}", "body": text} for n, text in texts]
            elif kind == "compare":
                data["first"], data["second"] = content["completions"]
            elif kind == "rate":
                (data["answer"],) = content["completions"]
            meta = {_OWN: {"key": answer.key, "content": content, "gold": answer.gold}}
            tasks[answer.task] = {"id": answer.task, "data": data, "meta": meta, "annotations": []}
        own = {"content": answer.content, "shown": answer.shown}
        annotation: dict[str, Any] = {
            "id": answer.id,
            "completed_by": {"email": answer.labeler},
            "was_cancelled": answer.action == "skip",
            "lead_time": answer.seconds,
            "meta": {_OWN: own},
            "result": [] if answer.action == "skip" else _results(kind, answer.content),
        }
        tasks[answer.task]["annotations"].append(annotation)
    return list(tasks.values())


def _results(kind: Kind, content: dict[str, Any]) -> list[dict[str, Any]]:
    def result(name: str, to_name: str, kind: str, value: dict[str, Any]) -> dict[str, Any]:
        return {"id": name, "from_name": name, "to_name": to_name, "type": kind, "value": value}

    if kind == "rank":
        buckets: dict[str, list[str]] = {}
        for rank in sorted(set(content["ranks"])):
            buckets[f"rank-{rank}"] = [f"output-{n}" for n, own in enumerate(content["ranks"], 1) if own == rank]
        return [result("rank", "items", "ranker", {"ranker": buckets})]
    if kind == "compare":
        side = {"first": "left", "second": "right"}.get(content["preference"])
        if side is not None:
            return [result("preference", "first,second", "pairwise", {"selected": side})]
        return [result("undecided", "prompt", "choices", {"choices": [content["preference"]]})]
    if kind == "rate":
        flags = [
            result(name, "answer", "choices", {"choices": ["yes" if value else "no"]})
            for name, value in content["flags"].items()
        ]
        return [result("overall", "answer", "rating", {"rating": content["overall"]}), *flags]
    return [result("completion", "prompt", "textarea", {"text": [content["completion"]]})]


def read_label_studio(rows: Sequence[Row], origin: str) -> Imported:
    """Read an export of Label Studio.

    Raises:
        UserError: A row has no prompt or items, an annotation ranks some of the items alone, or nothing is annotated.
    """
    kind = _find_kind(rows, origin)
    builder = ImportBuilder(kind)
    for row in rows:
        task, ids = _read_task(kind, row)
        builder.add(task, None)
        for where in _annotation_rows(row):
            answer = _read_annotation(kind, ids, where, builder.notes)
            if answer is not None:
                builder.add(task._replace(origin=where.origin), answer)
    return builder.build(origin)


def _annotations(row: Row) -> list[dict[str, Any]]:
    found = row.fields.get("annotations", row.fields.get("completions"))
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UserError(f"{row.origin}: no list of annotations: export from Label Studio as JSON, not JSON-MIN")
    return found


def _results_of(annotation: Row) -> list[dict[str, Any]]:
    """Return the results of an annotation, each with an object as its value."""
    found = annotation.fields.get("result") or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UserError(f'{annotation.origin}: "result" must be a list of objects')
    values = [each.get("value") or {} for each in found]
    if not all(isinstance(value, dict) for value in values):
        raise UserError(f'{annotation.origin}: the "value" of each result must be an object')
    return [{**each, "value": value} for each, value in zip(found, values, strict=True)]


def _annotation_rows(row: Row) -> list[Row]:
    return [Row(each, f"{row.origin} annotation {number}") for number, each in enumerate(_annotations(row), start=1)]


def _find_kind(rows: Sequence[Row], origin: str) -> Kind:
    for row in rows:
        for annotation in _annotation_rows(row):
            for result in _results_of(annotation):
                if str(result.get("type")) in _TYPES:
                    return _TYPES[str(result["type"])]
                if result.get("from_name") == "undecided":
                    return "compare"
    raise UserError(f"{origin}: no annotation of a type that is read: {', '.join(_TYPES)}")


def _own(row: Row) -> dict[str, Any]:
    meta = row.fields.get("meta")
    own = meta.get(_OWN, {}) if isinstance(meta, dict) else {}
    if not isinstance(own, dict):
        raise UserError(f'{row.origin}: "{_OWN}" under "meta" must be an object')
    return own


def _read_own_task(kind: Kind, own: dict[str, Any], origin: str) -> NewTask:
    """Return a task as `to_label_studio` wrote it."""
    key, content, gold = own.get("key"), own.get("content"), own.get("gold")
    if not is_name(key) or not isinstance(content, dict) or not isinstance(content.get("fields"), dict):
        raise UserError(f'{origin}: "{_OWN}" under "meta" must hold the key and the content of the task')
    turns = get_messages(Row(content, origin), "prompt")
    (record,) = read_records([Row(content["fields"], origin)], "prompt", PromptRow, "auto", StrictReport(origin))
    if to_messages(record.prompt) != turns:
        raise UserError(f'{origin}: the prompt under "{_OWN}" differs from that in its fields')
    checked = build_content(kind, turns, content.get("completions"), content["fields"], Row(content, origin))
    if gold is not None:
        if not isinstance(gold, dict):
            raise UserError(f"{origin}: the known answer must be an object")
        flags = gold.get("flags") if isinstance(gold.get("flags"), dict) else {}
        columns = {**gold, **(flags or {})}
        gold = read_gold(kind, PromptWithCompletions(turns, checked["completions"], columns, origin))
    return NewTask(str(key), dict(checked), gold, origin)


def _read_task(kind: Kind, row: Row) -> tuple[NewTask, list[str]]:
    """Return a task, and the ids of its items."""
    own = _own(row)
    if own:
        task = _read_own_task(kind, own, row.origin)
        return task, [f"output-{number}" for number in range(1, len(task.content["completions"]) + 1)]
    data = row.fields.get("data")
    if not isinstance(data, dict):
        raise UserError(f'{row.origin}: no "data" object: this is no task of Label Studio')
    prompt = find_text(data, PROMPT_NAMES, row)
    completions: list[Any] = []
    ids: list[str] = []
    if kind == "rank":
        items = _items(data, row)
        completions, ids = [_body(item, row) for item in items], [str(item["id"]) for item in items]
        if len(set(ids)) < len(ids):
            raise UserError(f"{row.origin}: two items have one id; they are {', '.join(ids)}")
    elif kind == "compare":
        pair = next((pair for pair in _PAIRS if all(isinstance(data.get(name), str) for name in pair)), None)
        if pair is None:
            names = "; ".join(" and ".join(pair) for pair in _PAIRS)
            raise UserError(f"{row.origin}: no two texts to compare: their columns are {names}")
        completions = [data[name] for name in pair]
    elif kind == "rate":
        completions = [find_text(data, _SINGLE, row)]
    fields = {name: value for name, value in data.items() if isinstance(value, str | int | float | bool)}
    left_out = {*PROMPT_NAMES, *(name for pair in _PAIRS for name in pair), *_SINGLE}
    kept = {name: value for name, value in fields.items() if name not in left_out and not is_missing(value)}
    return task_of(kind, prompt, completions, row.fields.get("id"), kept, row.origin), ids


def _items(data: dict[str, Any], row: Row) -> list[dict[str, Any]]:
    for value in data.values():
        if isinstance(value, list) and value and all(isinstance(each, dict) and "id" in each for each in value):
            return value
    raise UserError(f'{row.origin}: no list of items with "id" and "body" in "data"')


def _body(item: dict[str, Any], row: Row) -> str:
    for name in ("body", "html", "text", "title"):
        if isinstance(item.get(name), str):
            return str(item[name])
    raise UserError(f"{row.origin}: the item {item.get('id')!r} has no text")


def _read_annotation(kind: Kind, ids: list[str], where: Row, notes: list[str]) -> ImportedAnswer | None:
    fields, own = where.fields, _own(where)
    person = fields.get("completed_by")
    person = person.get("email") or person.get("id") if isinstance(person, dict) else person
    labeler = read_labeler(person, 'no "completed_by"', where.origin)
    seconds = read_seconds(fields.get("lead_time"), "lead_time", where.origin)
    content, shown = own.get("content", {}), own.get("shown")
    if not isinstance(content, dict):
        raise UserError(f'{where.origin}: the "content" of "{_OWN}" under "meta" must be an object')
    extras = read_extras(content, where.origin)
    if fields.get("was_cancelled"):
        reason = content.get("reason")
        return ImportedAnswer(
            labeler, "skip", {"reason": reason if reason in list(SKIP_REASONS) else "other", **extras}, seconds, shown
        )
    results = _results_of(where)
    if not results:
        notes.append(f"{where.origin}: empty, left out")
        return None
    return ImportedAnswer(labeler, "answer", _read_results(kind, ids, results, where, notes) | extras, seconds, shown)


def _read_results(
    kind: Kind, ids: list[str], results: list[dict[str, Any]], where: Row, notes: list[str]
) -> dict[str, Any]:
    values = {str(each.get("type")): each["value"] for each in results if each.get("type") != "choices"}
    choices = {str(each.get("from_name")): each["value"].get("choices") for each in results}
    if kind == "rank":
        return {"ranks": _read_ranker(values.get("ranker", {}).get("ranker"), ids, where, notes)}
    if kind == "compare":
        selected = values.get("pairwise", {}).get("selected")
        undecided = choices.get("undecided")
        sides = {"left": "first", "right": "second"}
        preference = undecided[0] if isinstance(undecided, list) and undecided else sides.get(str(selected))
        if preference not in PREFERENCES:
            raise UserError(f"{where.origin}: the pair has no choice of left or right, it is {selected!r}")
        return {"preference": preference}
    if kind == "rate":
        overall = values.get("rating", {}).get("rating")
        if type(overall) is not int or not MIN_RATING <= overall <= MAX_RATING:
            allowed = f"a whole number from {MIN_RATING} to {MAX_RATING}"
            raise UserError(f"{where.origin}: the rating must be {allowed}, it is {overall!r}")
        flags = {name: choices[name] == ["yes"] for name in METADATA_FIELDS if choices.get(name)}
        return {"overall": overall, "flags": flags}
    text = values.get("textarea", {}).get("text")
    parts = text if isinstance(text, list) else [text]
    if not all(isinstance(part, str) for part in parts) or not "".join(parts).strip():
        raise UserError(f"{where.origin}: the text area is empty")
    return {"completion": "\n".join(parts)}


def _read_ranker(value: Any, ids: list[str], where: Row, notes: list[str]) -> list[int]:
    """Return the bin of each completion, from a list of ids, or from buckets of them."""
    count = len(ids)
    if isinstance(value, dict) and len(value) == 1 and not re.search(r"\d+$", next(iter(value))):
        (value,) = value.values()  # a list under the name of its tag
    if isinstance(value, list):
        placed = [(str(each), number) for number, each in enumerate(value, start=1)]
    elif isinstance(value, dict) and all(isinstance(bucket, list) for bucket in value.values()):
        if value.get("_"):
            raise UserError(f"{where.origin}: {len(value['_'])} of {count} items are in no bucket")
        names = [name for name in value if name != "_"]
        numbers = [re.search(r"(\d+)$", name) for name in names]
        if all(numbers):
            order = [int(number[1]) for number in numbers if number]
        else:
            order = list(range(1, len(names) + 1))
            note = f"buckets are ranked in the order of the file, best first: {' > '.join(names)}"
            if note not in notes:
                notes.append(note)
        placed = [(str(each), number) for name, number in zip(names, order, strict=True) for each in value[name]]
    else:
        raise UserError(f"{where.origin}: no ranking of the items, it is {value!r}")
    bins = dict(placed)
    missing = [each for each in ids if each not in bins]
    if missing or len(bins) != count or len(placed) != count:
        what = f"the item {missing[0]!r} is not ranked" if missing else "an item is ranked that the task does not have"
        if len(bins) < len(placed):
            what = "an item is ranked twice"
        raise UserError(f"{where.origin}: {what}")
    ranks = [bins[each] for each in ids]
    return ranks if min(ranks) >= 1 and max(ranks) <= count else dense_bins(ranks)
