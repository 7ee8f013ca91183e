"""Readers of the benchmarks' data files in their published formats: rows with the fields of a task file's prompt.

Each reader takes `path`, and `shots_path` for few-shot examples from other data, and returns the splits "test" and
"shots". Further arguments of lm-eval are ignored.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.data.formats.record_validation import is_missing
from lit_rlhf.data.sources import DataSource, Row, read_json, read_rows, read_text, source_name
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.tasks.constraints import check_constraint

Doc = dict[str, Any]
Reader = Callable[[DataSource], Iterator[Doc]]


class Docs(list[Doc]):
    """Rows of a split with the `features` that lm-eval reads; a `datasets` table decodes a row at each access."""

    @property
    def features(self) -> dict[str, None]:
        """The column names, as keys."""
        return dict.fromkeys(self[0])


Splits = dict[str, Docs]

NOT_IN_BACKGROUND = "Not in background."
DO_NOT_KNOW = "I don't know."


def load_splits(read: Reader, path: DataSource | None, shots_path: DataSource | None) -> Splits:
    """Read the splits into memory."""
    if path is None:
        raise UserError("tasks: a benchmark needs the path of its data file, or a name of the hub")
    splits = {"test": Docs(read(path))}
    splits["shots"] = Docs(read(shots_path)) if shots_path is not None else splits["test"]
    for name, docs in splits.items():
        if not docs:
            empty = path if shots_path is None or name == "test" else shots_path
            raise UserError(f"tasks: {source_name(empty)!r} holds no row")
    return splits


def read_first_column(row: Row, *names: str) -> Any:
    """Return the value of the first of several columns that is not null or NaN.

    Raises:
        UserError: the row has none of them.
    """
    for name in names:
        if not is_missing(row.fields.get(name)):
            return row.fields[name]
    raise UserError(f"{row.origin}: the row has no {' or '.join(map(repr, names))}")


def read_first_text(row: Row, *names: str) -> str:
    """Return the first of several columns that is not null, which must hold text."""
    value = read_first_column(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{row.origin}: {' or '.join(map(repr, names))} must be text, got {str(value)[:60]!r}")
    return value


def read_list(row: Row, name: str, kind: type) -> list[Any]:
    """Return a column that holds a list of values of one type."""
    value = read_first_column(row, name)
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise UserError(f"{row.origin}: {name!r} must be a list of {kind.__name__}, got {str(value)[:60]!r}")
    return value


def read_choice(row: Row, name: str, choices: dict[str, int]) -> int:
    """Return the number of a label, by its text in lower case."""
    value = read_first_column(row, name)
    # a table with missing values holds whole numbers as floats
    text = str(int(value) if isinstance(value, float) and value.is_integer() else value).strip().lower()
    if text not in choices:
        raise UserError(f"{row.origin}: {name} is {str(value)[:60]}; it must be one of {', '.join(choices)}")
    return choices[text]


def iter_nested(row: Row, name: str, label: str) -> Iterator[Row]:
    """Yield the objects of a column that is a list of them, as rows whose origin is numbered under a label."""
    for number, fields in enumerate(read_list(row, name, dict), start=1):
        yield Row(fields, f"{row.origin}, {label} {number}")


def squad(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read SQuADv2's JSON: articles, paragraphs, questions."""
    return load_splits(squad_docs, path, shots_path)


def squad_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per question, with the answered questions before it in its paragraph as history."""
    for article in read_articles(path):
        title = read_first_text(article, "title")
        for paragraph in iter_nested(article, "paragraphs", "paragraph"):
            history = ""
            for question in iter_nested(paragraph, "qas", "question"):
                texts = [read_first_text(each, "text") for each in iter_nested(question, "answers", "answer")]
                answers = list(dict.fromkeys(texts))
                doc = {
                    "title": title.replace("_", " "),
                    "background": read_first_text(paragraph, "context"),
                    "history": history,
                    "question": read_first_text(question, "question"),
                    "target": answers[0] if answers else NOT_IN_BACKGROUND,
                    "answers": answers,
                }
                yield doc
                history += f"Q: {doc['question']}\n\nA: {doc['target']}\n\n"


def read_articles(path: DataSource) -> Iterator[Row]:
    """Yield the articles of a file in SQuAD's or QuAC's format."""
    document, name = read_document(path)
    if not isinstance(document, Mapping) or "data" not in document:
        raise UserError(f"{name}: not in the format of SQuAD, data › paragraphs › qas")
    return iter_nested(Row(dict(document), name), "data", "article")


def read_document(data: DataSource) -> tuple[Any, str]:
    """Return a JSON document with its name; of rows in memory, what a file with them holds."""
    if isinstance(data, str | Path):
        return read_json(str(data)), Path(data).name
    return data if isinstance(data, Mapping) else {"data": [row.fields for row in read_rows(data)]}, "rows"


def quac(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read QuAC's JSON: dialogues about a section of an article."""
    return load_splits(quac_docs, path, shots_path)


def quac_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per question, with the dialogue before it as history."""
    for article in read_articles(path):
        title = read_first_text(article, "title")
        if article.fields.get("section_title"):
            title = f"{title} -- {read_first_text(article, 'section_title')}"
        for paragraph in iter_nested(article, "paragraphs", "paragraph"):
            history = ""
            for question in iter_nested(paragraph, "qas", "question"):
                answers = [read_quac_answer(each) for each in iter_nested(question, "answers", "answer")]
                if not answers:
                    raise UserError(f"{question.origin}: a question needs an answer; CANNOTANSWER is one")
                original = question.fields.get("orig_answer")
                target = answers[0]
                if original is not None:
                    fields = original if isinstance(original, dict) else {}
                    target = read_quac_answer(Row(fields, f"{question.origin}, orig_answer"))
                doc = {
                    "title": title,
                    "background": read_first_text(paragraph, "context").removesuffix("CANNOTANSWER").strip(),
                    "history": history,
                    "question": read_first_text(question, "question"),
                    "target": target,
                    "answers": list(dict.fromkeys(answers)),
                }
                yield doc
                history += f"Q: {doc['question']}\n\nA: {target}\n\n"


def read_quac_answer(answer: Row) -> str:
    """Return an answer's text, with the prompt's fallback in place of CANNOTANSWER."""
    return replace_cannotanswer(read_first_text(answer, "text"))


def replace_cannotanswer(answer: str) -> str:
    """Return an answer, with the prompt's fallback in place of CANNOTANSWER."""
    return DO_NOT_KNOW if answer == "CANNOTANSWER" else answer


def drop(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read DROP's JSON: passages by name, with questions."""
    return load_splits(drop_docs, path, shots_path)


def drop_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per question. Answers are lists of spans; a number or a date is a list of one span."""
    passages, name = read_document(path)
    if not isinstance(passages, Mapping) or not all(isinstance(passage, dict) for passage in passages.values()):
        raise UserError(f"{name}: not in DROP's format, name › passage and qa_pairs")
    for key, fields in passages.items():
        passage = Row(fields, f"{name}, passage {key!r}")
        for pair in iter_nested(passage, "qa_pairs", "question"):
            answer = pair.fields.get("answer")
            others = pair.fields.get("validated_answers") or []
            rows = Row({"answers": [answer, *others] if isinstance(others, list) else others}, pair.origin)
            spans = [each for each in map(drop_answer, iter_nested(rows, "answers", "answer")) if each]
            if not spans:
                raise UserError(f"{pair.origin}: a question needs an answer")
            doc = {
                "passage": read_first_text(passage, "passage"),
                "question": read_first_text(pair, "question"),
                "answers": spans,
            }
            yield {**doc, "target": ", ".join(spans[0])}


def drop_answer(answer: Row) -> list[str]:
    """Return the spans of an answer: a number, spans, or a date."""
    if answer.fields.get("number") not in (None, ""):
        return [str(answer.fields["number"])]
    if answer.fields.get("spans"):
        return list(read_list(answer, "spans", str))
    date = answer.fields.get("date") or {}
    if not isinstance(date, dict):
        raise UserError(f"{answer.origin}: a date must have a day, a month or a year, got {str(date)[:60]!r}")
    text = " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))
    return [text] if text else []


def hellaswag(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of ctx (or activity_label and ctx), endings and label."""
    return load_splits(hellaswag_docs, path, shots_path)


def hellaswag_docs(path: DataSource) -> Iterator[Doc]:
    """Yield "Activity: context" with its endings as choices."""
    for row in read_rows(path):
        activity = row.fields.get("activity_label")
        context, endings = read_first_text(row, "ctx"), read_list(row, "endings", str)
        yield {
            "context": context if is_missing(activity) or not activity else f"{activity}: {context}",
            "choices": list(endings),
            "gold": read_choice(row, "label", {str(n): n for n in range(len(endings))}),
        }


def rte(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of premise, hypothesis and label ("entailment" or 0 for entailment)."""
    return load_splits(rte_docs, path, shots_path)


def rte_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row with the choices Yes and No."""
    other = ("not_entailment", "not entailment", "contradiction", "neutral", "unknown", "1")
    labels = {"entailment": 0, "0": 0, **dict.fromkeys(other, 1)}
    for row in read_rows(path):
        gold = read_choice(row, "label", labels)
        texts = {
            "premise": read_first_text(row, "premise"),
            "hypothesis": read_first_text(row, "hypothesis").rstrip("."),
        }
        yield {**texts, "choices": ["Yes", "No"], "gold": gold}


def sentiment(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of text (or sentence) and label, 1 for positive."""
    return load_splits(sentiment_docs, path, shots_path)


def sentiment_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row with the choices negative and positive."""
    for row in read_rows(path):
        label = read_choice(row, "label", {"0": 0, "1": 1})
        yield {"text": read_first_text(row, "text", "sentence"), "choices": ["negative", "positive"], "gold": label}


def wsc(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read SuperGLUE's rows: text, target (span1_text, span2_text, span2_index) and label."""
    return load_splits(wsc_docs, path, shots_path)


def wsc_docs(path: DataSource) -> Iterator[Doc]:
    """Yield the passage with its pronoun in bold, the noun, and whether the pronoun refers to it."""
    for row in read_rows(path):
        fields = read_first_column(row, "target")
        target = Row(fields if isinstance(fields, dict) else {}, f"{row.origin}, target")
        words = read_first_text(row, "text").split(" ")
        pronoun, noun = read_first_text(target, "span2_text"), read_first_text(target, "span1_text")
        index = read_choice(target, "span2_index", {str(n): n for n in range(len(words))})
        words[index] = words[index].replace(pronoun, f"**{pronoun}**", 1)
        same = bool(read_choice(row, "label", {"false": 0, "0": 0, "true": 1, "1": 1}))
        yield {"passage": " ".join(words), "pronoun": f"**{pronoun}**", "noun": noun, "same": same}


def translation(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of french and english (or fr and en), or lines of English, tab, French."""
    return load_splits(translation_docs, path, shots_path)


def translation_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per sentence pair."""
    if not (isinstance(path, str | Path) and str(path).removesuffix(".gz").endswith((".txt", ".tsv"))):
        for row in read_rows(path):
            pair = row.fields.get("translation")
            texts = Row(pair, row.origin) if isinstance(pair, dict) else row
            yield {
                "french": read_first_text(texts, "fr", "french"),
                "english": read_first_text(texts, "en", "english"),
            }
        return
    for number, line in enumerate(read_text(str(path)).split("\n"), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) < 2 or not all(part.strip() for part in parts[:2]):
            raise UserError(f"{path}:{number}: a line is English, tab, French")
        yield {"french": parts[1], "english": parts[0]}


def summaries(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of article and highlights (CNN/DM), or of post and summary (TL;DR)."""
    return load_splits(summary_docs, path, shots_path)


def summary_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per document."""
    for row in read_rows(path):
        document = read_first_text(row, "article", "post", "prompt", "document")
        yield {"document": document, "summary": read_first_text(row, "highlights", "summary", "label")}


def bbh(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of task, input and target."""
    return load_splits(bbh_docs, path, shots_path)


def bbh_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per question, with its task as group."""
    for row in read_rows(path):
        target = read_first_column(row, "target")
        if not isinstance(target, str | int | float) or not str(target).strip():
            raise UserError(f"{row.origin}: 'target' must be a text or a number, got {str(target)[:60]!r}")
        yield {"input": read_first_text(row, "input"), "target": str(target), "group": read_first_text(row, "task")}


def ifeval(path: DataSource | None = None, shots_path: DataSource | None = None, **_: Any) -> Splits:
    """Read rows of prompt, instruction_id_list and kwargs."""
    return load_splits(ifeval_docs, path, shots_path)


def ifeval_docs(path: DataSource) -> Iterator[Doc]:
    """Yield a row per prompt; the constraints are JSON, as their settings differ between rows."""
    for row in read_rows(path):
        names, settings = read_list(row, "instruction_id_list", str), read_list(row, "kwargs", dict)
        if not names or len(names) != len(settings):
            raise UserError(f"{row.origin}: {len(names)} constraints and {len(settings)} settings")
        known = [{key: value for key, value in each.items() if not is_missing(value)} for each in settings]
        for name, each in zip(names, known):
            check_constraint(name, each, row.origin)
        yield {"prompt": read_first_text(row, "prompt"), "constraints": json.dumps(list(zip(names, known)))}
