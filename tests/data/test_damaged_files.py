"""Damaged data, at random but seeded: it is read, or refused with one line that names the file; never a traceback."""

import csv
import gzip
import io
import json
import random
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from lit_rlhf.data.comparisons import tokenize_rankings
from lit_rlhf.data.demonstrations import tokenize_demonstrations
from lit_rlhf.data.formats.registry import _RECORD_TYPES, FORMATS, read_records
from lit_rlhf.data.prompt_template import PromptTemplate, encode_texts
from lit_rlhf.data.prompts import tokenize_prompts
from lit_rlhf.data.report import DatasetReport
from lit_rlhf.data.sources import read_rows
from lit_rlhf.data.truncation import TruncationPolicy
from lit_rlhf.errors import UserError
from lit_rlhf.evaluation.suites.bias import group_by_template, read_female_fractions
from lit_rlhf.evaluation.suites.toxicity import read_text_and_toxicity, toxicity_bin
from lit_rlhf.evaluation.suites.truthfulness import read_question
from lit_rlhf.evaluation.tasks import metrics, readers
from tests.data.conftest import byte_tokenizer

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
TREE = {
    "role": "prompter",
    "text": "hi",
    "replies": [{"role": "assistant", "text": t, "rank": n, "replies": []} for n, t in enumerate("ab")],
}
ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstration": [
        {"prompt": "a b", "completion": "c", "weight": 1},
        {"instruction": "do", "input": "it", "output": "done", "system": "be kind", "history": [["q", "a"]]},
        {"instruction": "do", "instances": [{"input": "x", "output": "y"}]},
        {"question": "why", "answer": "so", "passages": [["t", "s"]]},
        {"messages": TURNS, "tools": []},
        {"conversations": SHARE, "system": "s"},
        {"message_tree_id": "t", "prompt": TREE},
    ],
    "ranking": [
        {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [0, 1, 1], "labeler": "x"},
        {"context": TURNS[:1], "responses": ["b", "c"], "ranks": [1, 0]},
        {"question": "q", "passages": [["t", "s"]], "prediction 1": "a", "prediction 2": "b", "preference": [1]},
        {"prompt": "hi", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "no"}]},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"message_tree_id": "t", "prompt": TREE},
    ],
    "text": [{"text": "once upon a time"}, {"text": "née"}],
}
ROWS["prompt"] = [row for rows in (ROWS["demonstration"], ROWS["ranking"], ROWS["text"]) for row in rows]
ODD: list[Any] = [
    None, float("nan"), float("inf"), 0, -1, 10**400, 1.5, True, "", " ", "n/a", "\ud83d", "\x00", [], {}, [None], [[]],
    [{}], {"role": None}, [["a"]], ["a", 1], {"a": {"b": "\udc00"}}, b"\xff",
]  # fmt: skip


def damage_value(rng: random.Random, value: Any) -> Any:
    """Replace, remove or add one value, anywhere within a row."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        changed = dict(value)
        if rng.random() < 0.2:
            del changed[name]
        elif rng.random() < 0.1:
            changed[rng.choice(["system", "history", "weight", "from", "text", name.upper()])] = rng.choice(ODD)
        else:
            changed[name] = damage_value(rng, value[name])
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        index = rng.randrange(len(value))
        return [*value[:index], damage_value(rng, value[index]), *value[index + 1 :]]
    return rng.choice(ODD)


def write_file(rng: random.Random, path: Any, rows: list[dict[str, Any]]) -> None:
    """Write rows in the format of the path's ending; what the format cannot hold is left out."""
    ending = path.name.partition(".")[2].removesuffix(".gz")
    if ending == "parquet":
        table = pa.table({name: column(rows, name) for name in {k: 0 for row in rows for k in row}})
        content = parquet_bytes(table)
    elif ending in ("csv", "tsv"):
        names = list({k: 0 for row in rows for k in row})
        sink_text = io.StringIO()
        writer = csv.writer(sink_text, delimiter="\t" if ending == "tsv" else ",", escapechar="\\")
        writer.writerow(names)
        writer.writerows([[str(row.get(name, "")) for name in names] for row in rows])
        content = sink_text.getvalue().encode("utf-8", "surrogatepass")
    elif ending == "txt":
        content = "\n\n".join(str(row) for row in rows).encode("utf-8", "surrogatepass")
    else:
        dump = lambda value: json.dumps(value, ensure_ascii=rng.random() < 0.8, default=repr)  # noqa: E731
        text = dump(rows) if ending == "json" else "\n".join(map(dump, rows))
        content = text.encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        at = rng.randrange(len(content))
        content = content[:at] + bytes([rng.randrange(256)]) + content[at + rng.choice([0, 1, 1, 5]) :]
    content = gzip.compress(content) if path.suffix == ".gz" else content
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content))]
    path.write_bytes(content)


def parquet_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    try:
        pa.parquet.write_table(table, sink)
    except pa.ArrowNotImplementedError:  # an object without fields
        return parquet_bytes(pa.table({name: list(map(repr, table[name].to_pylist())) for name in table.column_names}))
    return sink.getvalue()


def column(rows: list[dict[str, Any]], name: str) -> pa.Array:
    values = [row.get(name) for row in rows]
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError):
        return pa.array([repr(value) for value in values])


TOKENIZER = byte_tokenizer(bos=True)
TOKENIZER.chat_template = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
JINJA = "{{ instruction + input }}{% for m in messages %}{{ m.content }}{% endfor %}{{ system }}"
TOKENIZE: dict[str, Any] = {
    "demonstration": tokenize_demonstrations,
    "ranking": tokenize_rankings,
    "prompt": tokenize_prompts,
}
ENDINGS = ["jsonl", "json", "csv", "tsv", "txt", "parquet", "jsonl.gz", "parquet.gz"]


def check_outcome(read: Any, name: str) -> bool:
    """Return whether it was read; a refusal must be one line that names the file, or the setting that is at fault."""
    try:
        read()
    except UserError as error:
        message = str(error)
        assert name in message and "\n" not in message, message
        return False
    return True


def read_damaged(seed: int, folder: Any) -> bool:
    rng = random.Random(seed)
    kind = rng.choice(sorted(ROWS))
    path = folder / f"rows.{rng.choice(ENDINGS)}"
    first = rng.choice(ROWS[kind])
    rows = [first] * rng.randrange(1, 4) + [rng.choice(ROWS[kind])] * (rng.random() < 0.1)
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        index = rng.randrange(len(rows))
        changed = damage_value(rng, rows[index])
        rows[index] = changed if isinstance(changed, dict) else {"odd": changed}
    write_file(rng, path, rows)
    format = rng.choice([*["auto"] * 20, *(each.name for each in FORMATS[kind])])
    template = PromptTemplate(TOKENIZER, rng.choice([None, None, "chat", "instruction", "plain", JINJA]))
    report = DatasetReport(str(path))

    def read() -> None:
        records: list[Any] = read_records(read_rows(str(path)), kind, _RECORD_TYPES[kind], format, report)
        assert len(records) == report.num_kept
        if kind in TOKENIZE:
            rows = TOKENIZE[kind](records, template, TruncationPolicy(64, 64), report)
            assert len(rows) == report.num_kept
        else:
            encode_texts(TOKENIZER, [record.text for record in records])

    return check_outcome(read, path.name)


@pytest.mark.parametrize("start", range(0, 1200, 100))
def test_rows_of_any_kind_are_read_or_refused_with_the_file(start, tmp_path):
    assert sum(read_damaged(seed, tmp_path) for seed in range(start, start + 100)) > 5


def read_toxicity(path: str) -> None:
    assert all(0 <= (toxicity_bin(read_text_and_toxicity(row, "prompt")[1]) or 0) < 4 for row in read_rows(path))


def qas(**question: Any) -> dict[str, Any]:
    return {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [{"question": "q", **question}]}]}]}


SENTENCES = [
    {"sentid": f"a.{who}.1.{gender}.txt", "sentence": "x"}
    for who in ("b", "someone")
    for gender in ("male", "female", "neutral")
]
DROP_ANSWER = {"number": "3", "spans": [], "date": {"day": "1"}}
WORDS, CONSTRAINT = "length_constraints:number_words", {"relation": "at least", "num_words": 3}
QUESTION = {"Question": "q", "Best Answer": "a", "Correct Answers": "a; b", "Incorrect Answers": "c", "Category": "k"}
TEXT_ROW = {"text": "the cat sat on it", "label": 1}
EVALUATION: dict[str, tuple[Any, Any]] = {  # reader, content
    "toxicity": (read_toxicity, [{"prompt": {"text": "x", "toxicity": t}} for t in (0.1, 0.3, 0.6, None, 1.0)]),
    "truthfulness": (lambda path: [read_question(row) for row in read_rows(path)], [QUESTION] * 2),
    "winogender": (lambda path: group_by_template(read_rows(path)), SENTENCES),
    "occupations": (read_female_fractions, [{"occupation": "nurse", "bls_pct_female": "90.4"}]),
    "squad": (readers.squad, qas(answers=[{"text": "a"}])),
    "quac": (readers.quac, qas(answers=[{"text": "CANNOTANSWER"}], orig_answer={"text": "a"})),
    "drop": (readers.drop, {"p": {"passage": "c", "qa_pairs": [{"question": "q", "answer": DROP_ANSWER}]}}),
    "hellaswag": (readers.hellaswag, [{"ctx": "c", "endings": ["a", "b"], "label": 1, "activity_label": "A"}]),
    "rte": (readers.rte, [{"premise": "p", "hypothesis": "h", "label": "entailment"}]),
    "sst": (readers.sentiment, [TEXT_ROW]),
    "wsc": (readers.wsc, [{**TEXT_ROW, "target": {"span1_text": "cat", "span2_text": "it", "span2_index": 4}}]),
    "fr_en": (readers.translation, [{"translation": {"fr": "a", "en": "b"}}]),
    "tldr": (readers.summaries, [{"post": "a", "summary": "b"}]),
    "bbh": (readers.bbh, [{"task": "t", "input": "i", "target": "x"}]),
    "ifeval": (readers.ifeval, [{"prompt": "p", "instruction_id_list": [WORDS], "kwargs": [CONSTRAINT]}]),
}  # fmt: skip


def read_damaged_evaluation(seed: int, folder: Any) -> bool:
    rng = random.Random(seed)
    name = sorted(EVALUATION)[seed % len(EVALUATION)]
    read, content = EVALUATION[name]
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        content = damage_value(rng, content)
    if isinstance(content, list) and rng.random() < 0.5:
        path = folder / f"rows.{rng.choice(ENDINGS)}"
        write_file(rng, path, [row if isinstance(row, dict) else {"odd": row} for row in content] or [{}])
    else:
        path = folder / "rows.json"
        path.write_text(json.dumps(content, default=repr))
    return check_outcome(lambda: run_ifeval(read(str(path)), name), path.name)


def run_ifeval(splits: Any, name: str) -> None:
    """Check a response to every prompt: what was read must be of use."""
    if name == "ifeval":
        for doc in splits["test"]:
            metrics.ifeval(doc, ["One, two.\n\nThree"])


@pytest.mark.parametrize("start", range(0, 1200, 150))
def test_evaluation_data_is_read_or_refused_with_the_file(start, tmp_path):
    assert sum(read_damaged_evaluation(seed, tmp_path) for seed in range(start, start + 150)) > 5
