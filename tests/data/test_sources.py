"""Reading rows: every kind of file, and one clear line for every way in which a file can be wrong."""

import gzip
import io
import json
import subprocess
import sys

import pytest

from lit_rlhf.data.sources import Row, parse_json_lines, read_rows, read_stdin
from lit_rlhf.errors import UserError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b\u2028ü", "n": 2}]


def save(path, content):
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps({"data": ROWS})),
        ("rows.json", "\n".join(json.dumps(row) for row in ROWS)),
    ],
)
def test_json_forms(tmp_path, name, content, ending):
    rows = read_rows(save(tmp_path / (name + ending), content))
    assert [row.fields for row in rows] == ROWS


def test_origins_name_file_and_line(tmp_path):
    rows = read_rows(save(tmp_path / "rows.jsonl", '{"a": 1}\n\n{"a": 2}\n'))
    assert [row.origin for row in rows] == ["rows.jsonl:1", "rows.jsonl:3"]
    rows = read_rows(save(tmp_path / "rows.csv", 'a,b\n"x\ny",1\nz,2\n'))
    assert [row.origin for row in rows] == ["rows.csv:2", "rows.csv:4"]
    assert rows[0].fields == {"a": "x\ny", "b": "1"}
    rows = read_rows(save(tmp_path / "rows.json", '[{"a": 1}, "bare"]'))
    assert [(row.origin, row.fields) for row in rows] == [
        ("rows.json row 1", {"a": 1}),
        ("rows.json row 2", {"text": "bare"}),
    ]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_text_documents_are_separated_by_blank_lines(tmp_path, ending):
    rows = read_rows(save(tmp_path / f"t.txt{ending}", "\n\none\n two\r\n\r\n \nthree\n"))
    assert [(row.fields["text"], row.origin[-2:]) for row in rows] == [("one\n two", ":3"), ("three", ":7")]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_parquet(tmp_path, ending):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    path = save(tmp_path / f"copy.parquet{ending}", (tmp_path / "rows.parquet").read_bytes())
    rows = read_rows(path)
    assert len(rows) == 2
    assert [row.fields for row in rows] == ROWS
    assert rows[1].fields == ROWS[1] and rows[-1].origin == f"copy.parquet{ending} row 2"
    assert [row.fields for row in rows[:1]] == ROWS[:1]


def test_hub_names(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' doesn't exist\nmore")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.fields for row in read_rows("org/name")] == ROWS
    read_rows("org/name:main", split="test")
    read_rows("org/name:main@validation[:5%]")
    assert calls == [
        ("org/name", None, "train"),
        ("org/name", "main", "test"),
        ("org/name", "main", "validation[:5%]"),
    ]
    with pytest.raises(UserError, match=r"'org/absent' \(config default, split train\) .*doesn't exist; a local file"):
        read_rows("org/absent")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl:2: this line does not parse as JSON: .*column 7"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"x\.jsonl:2: a row must be a JSON object or a string, this one is a list"),
        ("x.jsonl", "\n \n", "is empty"),
        ("x.json", "[]", "is empty"),
        ("x.json", '[{"a": 1},\n{"a" 2}]', r"x\.json:2: does not parse as JSON"),
        ("x.json", '{"rows": []}', 'a list of rows, or an object with one under "data"'),
        ("x.csv", "a,b\n", "is empty"),
        ("x.csv", "a,b\n1,2\n3\n", r"x\.csv:3: 1 columns where the head line names 2"),
        ("x.csv", "a,b\n1,2,3,4\n", r"x\.csv:2: 4 columns where the head line names 2"),
        ("x.csv", 'a,b\n1,"2\n', r"x\.csv:\d: does not parse as CSV"),
        ("x.txt", " \n\n", "is empty"),
        ("x.jsonl", b'{"a": "\xff"}', r"x\.jsonl:1: not UTF-8"),
        (
            "x.jsonl",
            '{"a": 1}\n{"a": {"b": ["\\ud83d"]}}\n',
            r"x\.jsonl:2: a text holds \\ud83d, half of a surrogate pair",
        ),
        ("x.jsonl", '{"a\\udc00": 1}\n', r"x\.jsonl:1: a text holds \\udc00"),
        ("x.json", '["a", "b\\ud83d"]', r"x\.json row 2: a text holds \\ud83d"),
        ("x.jsonl", '{"a": [{"b": 1, "c": 2, "b": 1}]}', r"x\.jsonl:1: the key 'b' is given twice in one JSON object"),
        ("x.json", '[{}, {"a": 1, "a": 2}]', r"x\.json row 2: the key 'a' is given twice"),
        ("x.jsonl", "\n" + '{"a": ' + "9" * 5000 + "}", r"x\.jsonl:2: this JSON cannot be read: .*4300"),
        ("x.json", "[" * 100_000, r"x\.json: this JSON cannot be read: .*recursion"),
        ("x.csv", "a,b,a\n1,2,3\n", r"x\.csv:1: the head line names 'a' twice"),
        ("x.tsv", "a\t\t\n1\t2\t3\n", r"x\.tsv:1: the head line names '' twice"),
        ("x.csv", "\n\na,b\n1,2\n\n3\n", r"x\.csv:6: 1 columns where the head line names 2"),
        ("x.parquet", "no", r"x\.parquet: does not parse as Parquet"),
        ("x.toml", "a = 1", r"of no known kind: \.jsonl, \.json, \.csv, \.tsv, \.parquet, \.txt \(each also \.gz\)"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_rows(save(tmp_path / name, content))


def test_odd_tables_are_one_line(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    texts = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 2, texts.buffers())
    for name, table, message in (
        ("utf8", pa.table({"a": bad}), r"utf8\.parquet row 2: cannot be read: .*utf-8"),
        ("twice", pa.Table.from_arrays([pa.array([1])] * 2, ["a", "a"]), r"twice\.parquet: .*2 times"),
        ("union", pa.table({"a": pa.array([[]], pa.list_(pa.null()))}), None),
    ):
        pa.parquet.write_table(table, tmp_path / f"{name}.parquet")
        path = str(tmp_path / f"{name}.parquet")
        if message is None:
            assert [row.fields for row in read_rows(path)] == [{"a": []}]
            continue
        for read in (lambda path=path: list(read_rows(path)), lambda path=path: read_rows(path)[-1]):
            with pytest.raises(UserError, match=message) as caught:
                read()
            assert "\n" not in str(caught.value)


def test_a_flipped_byte_of_a_checked_page_is_found(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    pa.parquet.write_table(
        pa.table({"a": ["needle"]}), path, compression="none", use_dictionary=False, write_page_checksum=True
    )
    path.write_bytes(path.read_bytes().replace(b"needle", b"noodle"))
    with pytest.raises(UserError, match=r"x\.parquet: does not parse as Parquet: .*CRC checksum"):
        read_rows(str(path))


@pytest.mark.parametrize("text", [True, False])
def test_standard_input_is_read_as_a_file_is(monkeypatch, text):
    def put(content):
        stream = io.StringIO(content.decode()) if text else io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr("sys.stdin", stream)

    put(b'\xef\xbb\xbf{"a": 1}\r\n\n"b"')
    assert list(parse_json_lines(read_stdin())) == [Row({"a": 1}, "stdin:1"), Row({"text": "b"}, "stdin:3")]
    put(b'{}\n{"a": "\\ud800"}\n')
    with pytest.raises(UserError, match=r"stdin:2: a text holds \\ud800"):
        list(parse_json_lines(read_stdin()))
    if not text:
        put(b'{}\n{"a": "caf\xe9"}\n')
        with pytest.raises(UserError, match="stdin:2: not UTF-8 text"):
            list(parse_json_lines(read_stdin()))


def test_not_really_gzip(tmp_path):
    (tmp_path / "x.jsonl.gz").write_text("plain")
    with pytest.raises(UserError, match=r"x\.jsonl\.gz.* cannot be read"):
        read_rows(str(tmp_path / "x.jsonl.gz"))


def test_missing_file_names_the_nearest(tmp_path, monkeypatch):
    save(tmp_path / "polite.json", "[]")
    with pytest.raises(UserError, match=r"no data file '.*polit\.json' \(did you mean 'polite\.json'\?\)"):
        read_rows(str(tmp_path / "polit.json"))
    with pytest.raises(UserError, match="holds no similar name"):
        read_rows(str(tmp_path / "zzzzzzzz.csv"))
    with pytest.raises(UserError, match="its folder does not exist; the nearest that does is"):
        read_rows(str(tmp_path / "a" / "b" / "polite.json"))
    with pytest.raises(UserError, match=r"is a folder: name one file in it \(polite\.json\)"):
        read_rows(str(tmp_path))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no data file 'data/train'"):  # not looked up on the hub
        read_rows("data/train")


@pytest.mark.parametrize("name", ["~nobody-here/rows.jsonl", "~nobody-here.jsonl"])
def test_a_home_that_is_unknown_is_a_missing_file(name):
    with pytest.raises(UserError, match="nobody-here"):
        list(read_rows(name))


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, lit_rlhf.data; lit_rlhf.data.read_rows;"
        "print([name for name in ('datasets', 'transformers', 'lightning', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
