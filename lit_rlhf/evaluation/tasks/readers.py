"""Readers of the benchmarks' data files in their published formats: rows with the fields of a task file's prompt.

Each reader takes `path`, and `shots_path` for few-shot examples from another file, and returns the splits "test" and
"shots". Further arguments of lm-eval are ignored.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

from lit_rlhf.data.sources import Row, read_rows, read_text
from lit_rlhf.errors import UserError

Doc = dict[str, Any]
Reader = Callable[[str], Iterator[Doc]]


class Docs(list[Doc]):
    """Rows of a split with the `features` that lm-eval reads; a `datasets` table decodes a row at each access."""

    @property
    def features(self) -> dict[str, None]:
        """The column names, as keys."""
        return dict.fromkeys(self[0])


Splits = dict[str, Docs]

NOT_IN_BACKGROUND = "Not in background."
DO_NOT_KNOW = "I don't know."


def load_splits(read: Reader, path: str | None, shots_path: str | None) -> Splits:
    """Read the splits into memory."""
    if path is None:
        raise UserError("tasks: a benchmark needs the path of its data file, or a name of the hub")
    splits = {"test": Docs(read(path))}
    splits["shots"] = Docs(read(shots_path)) if shots_path is not None else splits["test"]
    for name, docs in splits.items():
        if not docs:
            raise UserError(f"tasks: {path if name == 'test' else shots_path!r} holds no row")
    return splits


def read_first_column(row: Row, *names: str) -> Any:
    """Return the value of the first of several columns that is not null.

    Raises:
        UserError: the row has none of them.
    """
    for name in names:
        if row.fields.get(name) is not None:
            return row.fields[name]
    raise UserError(f"{row.origin}: the row has no {' or '.join(map(repr, names))}")


def squad(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read SQuADv2's JSON: articles, paragraphs, questions."""
    return load_splits(squad_docs, path, shots_path)


def squad_docs(path: str) -> Iterator[Doc]:
    """Yield a row per question, with the answered questions before it in its paragraph as history."""
    for article in read_articles(path):
        for paragraph in article["paragraphs"]:
            history = ""
            for question in paragraph["qas"]:
                answers = list(dict.fromkeys(answer["text"] for answer in question["answers"]))
                doc = {
                    "title": article["title"].replace("_", " "),
                    "background": paragraph["context"],
                    "history": history,
                    "question": question["question"],
                    "target": answers[0] if answers else NOT_IN_BACKGROUND,
                    "answers": answers,
                }
                yield doc
                history += f"Q: {doc['question']}\n\nA: {doc['target']}\n\n"


def read_articles(path: str) -> list[Doc]:
    """Return the articles of a file in SQuAD's or QuAC's format."""
    try:
        data = json.loads(read_text(path))["data"]
        assert all(question["question"] for a in data for p in a["paragraphs"] for question in p["qas"])
    except (ValueError, KeyError, TypeError, AssertionError) as problem:
        raise UserError(f"{path!r} is not in the format of SQuAD, data › paragraphs › qas: {problem!r}") from None
    return list(data)


def quac(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read QuAC's JSON: dialogues about a section of an article."""
    return load_splits(quac_docs, path, shots_path)


def quac_docs(path: str) -> Iterator[Doc]:
    """Yield a row per question, with the dialogue before it as history."""
    for article in read_articles(path):
        section = article.get("section_title")
        title = f"{article['title']} -- {section}" if section else article["title"]
        for paragraph in article["paragraphs"]:
            history = ""
            for question in paragraph["qas"]:
                answers = [replace_cannotanswer(answer["text"]) for answer in question["answers"]]
                target = replace_cannotanswer(question.get("orig_answer", question["answers"][0])["text"])
                doc = {
                    "title": title,
                    "background": paragraph["context"].removesuffix("CANNOTANSWER").strip(),
                    "history": history,
                    "question": question["question"],
                    "target": target,
                    "answers": list(dict.fromkeys(answers)),
                }
                yield doc
                history += f"Q: {doc['question']}\n\nA: {target}\n\n"


def replace_cannotanswer(answer: str) -> str:
    """Return an answer, with the prompt's fallback in place of CANNOTANSWER."""
    return DO_NOT_KNOW if answer == "CANNOTANSWER" else answer


def drop(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read DROP's JSON: passages by name, with questions."""
    return load_splits(drop_docs, path, shots_path)


def drop_docs(path: str) -> Iterator[Doc]:
    """Yield a row per question. Answers are lists of spans; a number or a date is a list of one span."""
    try:
        passages = json.loads(read_text(path))
        pairs = [(passage["passage"], pair) for passage in passages.values() for pair in passage["qa_pairs"]]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path!r} is not in DROP's format, name › passage and qa_pairs: {problem!r}") from None
    for passage, pair in pairs:
        answers = [drop_answer(each) for each in (pair["answer"], *(pair.get("validated_answers") or []))]
        answers = [answer for answer in answers if answer]
        doc = {"passage": passage, "question": pair["question"], "answers": answers}
        yield {**doc, "target": ", ".join(answers[0]) if answers else ""}


def drop_answer(answer: Doc) -> list[str]:
    """Return the spans of an answer: a number, spans, or a date."""
    if answer.get("number"):
        return [str(answer["number"])]
    if answer.get("spans"):
        return list(answer["spans"])
    date = answer.get("date") or {}
    text = " ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part))
    return [text] if text else []


def hellaswag(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of ctx (or activity_label and ctx), endings and label."""
    return load_splits(hellaswag_docs, path, shots_path)


def hellaswag_docs(path: str) -> Iterator[Doc]:
    """Yield "Activity: context" with its endings as choices."""
    for row in read_rows(path):
        activity = row.fields.get("activity_label")
        context = f"{activity}: {read_first_column(row, 'ctx')}" if activity else read_first_column(row, "ctx")
        yield {
            "context": context,
            "choices": list(read_first_column(row, "endings")),
            "gold": int(read_first_column(row, "label")),
        }


def rte(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of premise, hypothesis and label ("entailment" or 0 for entailment)."""
    return load_splits(rte_docs, path, shots_path)


def rte_docs(path: str) -> Iterator[Doc]:
    """Yield a row with the choices Yes and No."""
    for row in read_rows(path):
        gold = 0 if read_first_column(row, "label") in ("entailment", 0, "0") else 1
        texts = {
            "premise": read_first_column(row, "premise"),
            "hypothesis": read_first_column(row, "hypothesis").rstrip("."),
        }
        yield {**texts, "choices": ["Yes", "No"], "gold": gold}


def sentiment(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of text (or sentence) and label, 1 for positive."""
    return load_splits(sentiment_docs, path, shots_path)


def sentiment_docs(path: str) -> Iterator[Doc]:
    """Yield a row with the choices negative and positive."""
    for row in read_rows(path):
        label = int(read_first_column(row, "label"))
        if label not in (0, 1):
            raise UserError(f"{row.origin}: label is {label}; it is 0 (negative) or 1 (positive)")
        yield {"text": read_first_column(row, "text", "sentence"), "choices": ["negative", "positive"], "gold": label}


def wsc(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read SuperGLUE's rows: text, target (span1_text, span2_text, span2_index) and label."""
    return load_splits(wsc_docs, path, shots_path)


def wsc_docs(path: str) -> Iterator[Doc]:
    """Yield the passage with its pronoun in bold, the noun, and whether the pronoun refers to it."""
    for row in read_rows(path):
        target = read_first_column(row, "target")
        words = read_first_column(row, "text").split(" ")
        index, pronoun = int(target["span2_index"]), target["span2_text"]
        words[index] = words[index].replace(pronoun, f"**{pronoun}**", 1)
        same = read_first_column(row, "label") in (True, 1, "True", "true")
        yield {"passage": " ".join(words), "pronoun": f"**{pronoun}**", "noun": target["span1_text"], "same": same}


def translation(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of french and english (or fr and en), or lines of English, tab, French."""
    return load_splits(translation_docs, path, shots_path)


def translation_docs(path: str) -> Iterator[Doc]:
    """Yield a row per sentence pair."""
    if not path.removesuffix(".gz").endswith((".txt", ".tsv")):
        for row in read_rows(path):
            pair = row.fields.get("translation") or row.fields
            yield {
                "french": read_first_column(Row(pair, row.origin), "fr", "french"),
                "english": read_first_column(Row(pair, row.origin), "en", "english"),
            }
        return
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) < 2:
            raise UserError(f"{path}:{number}: a line is English, tab, French")
        yield {"french": parts[1], "english": parts[0]}


def summaries(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of article and highlights (CNN/DM), or of post and summary (TL;DR)."""
    return load_splits(summary_docs, path, shots_path)


def summary_docs(path: str) -> Iterator[Doc]:
    """Yield a row per document."""
    for row in read_rows(path):
        document = read_first_column(row, "article", "post", "prompt", "document")
        yield {"document": document, "summary": read_first_column(row, "highlights", "summary", "label")}


def bbh(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of task, input and target."""
    return load_splits(bbh_docs, path, shots_path)


def bbh_docs(path: str) -> Iterator[Doc]:
    """Yield a row per question, with its task as group."""
    for row in read_rows(path):
        yield {
            "input": read_first_column(row, "input"),
            "target": str(read_first_column(row, "target")),
            "group": read_first_column(row, "task"),
        }


def ifeval(path: str | None = None, shots_path: str | None = None, **_: Any) -> Splits:
    """Read rows of prompt, instruction_id_list and kwargs."""
    return load_splits(ifeval_docs, path, shots_path)


def ifeval_docs(path: str) -> Iterator[Doc]:
    """Yield a row per prompt; the constraints are JSON, as their settings differ between rows."""
    for row in read_rows(path):
        names, settings = read_first_column(row, "instruction_id_list"), read_first_column(row, "kwargs")
        if len(names) != len(settings):
            raise UserError(f"{row.origin}: {len(names)} constraints and {len(settings)} settings")
        known = [{key: value for key, value in each.items() if value is not None} for each in settings]
        yield {"prompt": read_first_column(row, "prompt"), "constraints": json.dumps(list(zip(names, known)))}
