"""Files to records: every format gives the same ones, and whatever can't be used is told of in one error."""

import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from jlora.data.readers import Chat, Labelled, Tagged, Text, read_corpus, read_records

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"

CLASSES = {
    "train": [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}],
    "validation": [{"text": "three", "label": "a"}],
    "test": [{"text": "four", "label": "b"}],
}
ANSWERS = [{"label": "a", "answer": "A."}, {"label": "b", "answer": "B."}]


@pytest.fixture
def write(tmp_path):
    """Writes {name: bytes, text, or objects for JSON lines}, and gives their paths."""

    def write(**contents):
        paths = {}
        for name, content in contents.items():
            path = tmp_path / (name.replace("__", ".") if "__" in name else f"{name}.jsonl")
            if isinstance(content, list):
                content = "\n".join(map(json.dumps, content))
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            paths[name.split("__")[0]] = path
        return paths

    return write


def problem(read, *arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        read(*arguments, **options)
    first = arguments[0]
    folder = next(iter(first.values())).parent if isinstance(first, dict) else Path(first).parent
    return str(caught.value).replace(f"{folder}/", "")


def bare(records):
    return [record._replace(at="") for record in records]


FORMATS = {
    ".jsonl": b'\xef\xbb\xbf{"q": " b, \\"c\\"? ", "label": "x"}\n\n{"label": 2, "q": "a\\nd", "more": null}\r\n',
    ".json": b'\xef\xbb\xbf[{"q": " b, \\"c\\"? ", "label": "x"}, {"label": 2, "q": "a\\nd"}]',
    ".csv": b'\xef\xbb\xbflabel, q ,more\r\nx," b, ""c""? ",\r\n\r\n2,"a\nd",z\r\n',
    ".tsv": b'q\tlabel\n" b, ""c""? "\tx\n"a\nd"\t2\n',
}


@pytest.mark.parametrize("suffix", [*FORMATS, ".parquet"])
def test_every_format_gives_the_same_records_under_the_users_names(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    if suffix == ".parquet":
        columns = {"more": [[1], []], "label": ["x", "2"], "q": [' b, "c"? ', "a\nd"]}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        path.write_bytes(FORMATS[suffix])
    records = read_records(path, "sequence_classification", fields={"text": "q"})
    assert bare(records) == [Labelled('b, "c"?', "x"), Labelled("a\nd", "2")]
    places = {".jsonl": [":1", ":3"], ".csv": [":2", ":4"], ".tsv": [":2", ":3"]}.get(suffix, ["[0]", "[1]"])
    assert [record.at for record in records] == [f"{path}{place}" for place in places]


def test_a_json_file_of_lines_is_read_as_json_lines(write):
    paths = write(a__json='{"text": "one"}\n{"text": "two"}\n')
    assert bare(read_records(paths["a"], "causal_lm")) == [Text("one"), Text("two")]


def test_a_cell_may_be_as_long_as_a_book(write):
    limit = csv.field_size_limit()
    long = "word " * 50_000
    assert bare(read_records(write(a__csv=f"text\n{long}\n")["a"], "causal_lm")) == [Text(long)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "rows",
    [
        [('"one', "a"), ("two", "b"), ("three", "a")],
        [('"one', "a"), ('two"', "b"), ("three", "a")],
        [('"one', "a"), ('"two', "b"), ("three", "a")],
        [("one", "a"), ('say "two"', "b"), ('"three" is', "a")],
        [('"one', '"'), ('"', "b"), ("three", "a")],
    ],
)
def test_a_stray_quotation_mark_in_unquoted_tabs_joins_no_rows(write, rows):
    path = write(a__tsv="text\tlabel\n" + "".join("\t".join(row) + "\n" for row in rows))["a"]
    assert bare(read_records(path, "sequence_classification")) == [Labelled(*row) for row in rows]
    # A row of a wrong length is told as it is, and hides in no other.
    path.write_text(path.read_text() + "short\n")
    assert problem(read_records, path, "sequence_classification").splitlines()[1:-1] == [
        "  a.tsv:5  1 cell, the header has 2"
    ]


def test_tables_between_semicolons_or_tabs_are_read_whatever_their_suffix(write):
    expected = [Labelled("one, two", "a"), Labelled("3;4", "b")]
    for name, content in {
        "a__csv": 'text;label\none, two;a\n"3;4";b\n',
        "b__csv": "text\tlabel\none, two\ta\n3;4\tb\n",
        "c__tsv": '\ntext,label\n"one, two",a\n3;4,b\n',
    }.items():
        (path,) = write(**{name: content}).values()
        assert bare(read_records(path, "sequence_classification")) == expected


def test_quoted_cells_between_tabs_go_over_lines_and_hold_tabs(write, tmp_path):
    rows = [('a "b"', "x"), ("c\n\nd\te", "y"), ("f", "z\nz")]
    with open(tmp_path / "a.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("text", "label"), *rows])
    assert bare(read_records(tmp_path / "a.tsv", "sequence_classification")) == [Labelled(*row) for row in rows]
    # With one column the length of a row says nothing.
    assert bare(read_records(write(b__tsv='text\n"a\nb"\nc\n')["b"], "causal_lm")) == [Text("a\nb"), Text("c")]


def test_a_gzip_file_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    block = gzip.compress(b'{"text": "' + bytes(1 << 24))
    path.write_bytes(block * 64)  # 1 GiB in 1 MB
    tracemalloc.start()
    try:
        text = problem(read_records, path, "causal_lm")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n  bomb.jsonl.gz  the gzip data become more than 200 times as large\nFix: " in text
    assert most < 1 << 27


@pytest.mark.parametrize("suffix", [*FORMATS, ".txt", ".conll"])
def test_files_compressed_by_gzip_are_read_as_they_are_without(tmp_path, suffix):
    content = FORMATS.get(suffix, b"a O\nb B-X\n")
    task, fields = ("sequence_classification", {"text": "q"}) if suffix in FORMATS else ("token_classification", {})
    (tmp_path / f"a{suffix}").write_bytes(content)
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(content))
    plain, compressed = (read_records(tmp_path / name, task, fields=fields) for name in (f"a{suffix}", f"b{suffix}.gz"))
    assert bare(plain) == bare(compressed)
    assert compressed[0].at.startswith(f"{tmp_path}/b{suffix}.gz")


def test_a_damaged_file_is_one_error_with_its_name_and_line(tmp_path):
    lines = b"".join(b'{"text": "%d %s"}\n' % (n, os.urandom(20).hex().encode()) for n in range(50_000))
    whole = gzip.compress(lines)
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.jsonl.gz").write_bytes(flipped)
    (tmp_path / "none.csv.gz").write_bytes(b"text\none\n")
    (tmp_path / "wide.csv").write_bytes("text\none\n".encode("utf-16"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "long.jsonl").write_text('{"text": ' + "1" * 5000 + "}\n")
    (tmp_path / "zeros.jsonl").write_bytes(b'{"text": "a"}\n' + bytes(100))
    (tmp_path / "zero.csv").write_bytes(b"text\na\n\0\n")
    (tmp_path / "half.jsonl").write_text(r'{"text": "a\ud800"}')
    (tmp_path / "zero.jsonl").write_text(r'{"text": "a\u0000"}')
    reasons = {}
    for path in sorted(tmp_path.glob("*.*")):
        _, reasons[path.name], fix = problem(read_records, path, "causal_lm").splitlines()
        assert fix == "Fix: correct or delete them."
    where = {name: reason.strip().partition("  ")[0].removeprefix(name) for name, reason in reasons.items()}
    assert 0.4 * 50_000 < int(where.pop("cut.jsonl.gz").removeprefix(":")) < 0.6 * 50_000
    assert where == {
        "flipped.jsonl.gz": ":50001",
        "none.csv.gz": ":1",
        "wide.csv": ":1",
        "deep.json": ":1",
        "long.jsonl": ":1",
        "zeros.jsonl": ":2",
        "zero.csv": ":3",
        "half.jsonl": ":1",
        "zero.jsonl": ":1",
    }
    assert all(
        "the gzip data are damaged: " in reasons[f"{name}.gz"] for name in ("cut.jsonl", "flipped.jsonl", "none.csv")
    )
    assert "UTF-16, expected UTF-8" in reasons["wide.csv"]
    assert "nested too deep" in reasons["deep.json"]
    assert "'text' has a NUL character at 2: the file is damaged" in reasons["zero.jsonl"]
    assert "'text' has half of a surrogate pair at character 2" in reasons["half.jsonl"]


def test_a_parquet_file_with_any_byte_damaged_is_read_or_is_one_error(tmp_path):
    rows = {"text": [f"word {n}" for n in range(40)], "label": [str(n % 3) for n in range(40)]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path, write_page_checksum=True)
    whole, expected = path.read_bytes(), bare(read_records(path, "sequence_classification"))
    wrong = 0
    for damaged in [whole[:n] for n in range(0, len(whole), 50)] + [
        whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :] for n in range(len(whole))
    ]:
        path.write_bytes(damaged)
        try:
            found = bare(read_records(path, "sequence_classification"))
        except ValueError as error:
            assert str(path) in str(error).splitlines()[1]
            assert str(error).endswith("Fix: correct or delete them.") or "Fix: set data." in str(error)
            wrong += 1
        else:
            assert found == expected
    assert wrong > 0.5 * len(whole)


def test_a_compressed_file_with_any_byte_damaged_is_read_or_is_one_error(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"text": "word %d"}\n' % n for n in range(40)), mtime=0)
    path.write_bytes(whole)
    expected = bare(read_records(path, "causal_lm"))
    wrong = 0
    damages = [whole[:n] + bytes([whole[n] ^ 0x55]) + whole[n + 1 :] for n in range(len(whole))]
    for damaged in [whole[:n] for n in range(1, len(whole))] + damages:
        path.write_bytes(damaged)
        try:
            assert bare(read_records(path, "causal_lm")) == expected
        except ValueError as error:
            assert str(error).splitlines()[1].startswith(f"  {path}:")
            wrong += 1
    # Time, system and a few flags of the header are the only bytes that do not matter.
    assert wrong > 2 * len(whole) - 16


def test_a_folder_gives_the_files_that_say_the_split_or_all_of_them(tmp_path):
    def lines(name, *texts):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

    def read(folder, split="train"):
        return [record.text for record in read_records(tmp_path / folder, "causal_lm", split=split)]

    lines("one/b.jsonl", "b")
    lines("one/a.jsonl.gz", "a")
    lines("one/deep/c.jsonl", "c")
    lines("one/.cache/d.jsonl", "d")
    (tmp_path / "one/README.md").write_text("x")
    assert read("one") == ["a", "b", "c"]
    lines("two/train-0.jsonl", "a")
    lines("two/train-1.jsonl", "b")
    lines("two/test.jsonl", "c")
    assert (read("two"), read("two", "test")) == (["a", "b"], ["c"])
    formats = read_corpus({"train": tmp_path / "two", "test": tmp_path / "two"}, "causal_lm").formats
    assert formats == {"train": "2 files, texts ('text')", "test": "texts ('text')"}
    (tmp_path / "one/e.csv").write_text("text\ne\n")
    for folder, split, reason in [
        ("two", "validation", "the folder has files of 'test', 'train' only, and none of validation"),
        ("one", "train", f"the folder has files of several kinds, .csv .jsonl: write {tmp_path}/one/*.csv"),
    ]:
        with pytest.raises(FileNotFoundError) as caught:
            read(folder, split)
        assert str(caught.value).splitlines()[1] == f"  {tmp_path}/{folder}  {reason}"


def test_class_numbers_get_the_names_that_a_parquet_file_has_for_them(tmp_path):
    features = {
        "tokens": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        "tags": {"feature": {"names": ["O", "B-X", "I-X"], "_type": "ClassLabel"}, "_type": "List"},
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    rows = [{"tokens": ["a", "b"], "tags": [1, 2], "text": "t", "label": 1}]
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    assert bare(read_records(path, "token_classification")) == [Tagged(("a", "b"), ("B-X", "I-X"))]
    assert bare(read_records(path, "sequence_classification")) == [Labelled("t", "yes")]


def test_a_corpus_holds_what_the_files_say(write):
    paths = write(**CLASSES, answers=ANSWERS)
    answers = paths.pop("answers")
    corpus = read_corpus(paths, "sequence_classification", answers=answers)
    assert {name: bare(split) for name, split in corpus.splits.items()} == {
        "train": [Labelled("one", "a"), Labelled("two", "b")],
        "validation": [Labelled("three", "a")],
        "test": [Labelled("four", "b")],
    }
    assert corpus.labels == ("a", "b")
    assert corpus.answers == {"a": "A.", "b": "B."}
    assert read_corpus({"train": paths["train"]}, "sequence_classification").answers == {}


def test_every_malformed_line_of_all_files_is_listed_with_its_reason(write):
    train = b"\n".join(
        [
            b'{"text": "fine", "label": "a"}',
            b'{"text": "no end", "label": "a"',
            b'["text", "label"]',
            b'{"text": "no label", "lable": "a"}',
            b'{"text": "  ", "label": "a"}',
            b'{"text": "\xff", "label": true}',
            b"{}",
        ]
    )
    paths = write(train=train, validation__csv='text,label\nx,a,b\n"open,a\n', test=[{"text": 4, "label": "a"}])
    assert problem(read_corpus, paths, "sequence_classification") == (
        "data: 9 lines can't be used.\n"
        "  train.jsonl:2  no JSON: Expecting ',' delimiter at column 32\n"
        "  train.jsonl:3  expected an object with 'text' and 'label', found list\n"
        "  train.jsonl:4  no field 'label'  nearest: 'lable'\n"
        "  train.jsonl:5  'text' is '  ', expected a text\n"
        "  train.jsonl:6  no UTF-8 at byte 11\n"
        "  train.jsonl:7  no field 'text'\n"
        "  validation.csv:2  3 cells, the header has 2\n"
        "  validation.csv:3  unexpected end of data\n"
        "  test.jsonl:1  'text' is 4, expected a text\n"
        "Fix: correct or delete them."
    )


def test_files_that_are_damaged_as_a_whole_are_told_of_once(write, tmp_path):
    paths = write(
        a__csv="txt,label\none,a\ntwo,b\n",
        b__csv="text,text,label\n",
        c__json='{"text": "x", "label": "y"}',
        d__json='[{"text": "x",\n "label": }]',
        e__csv=b"\xef\xbb\xbftext,label\none,\xff\n",
        f__parquet=b"PAR1",
        g="",
        h__csv="text,label\n",
        i__json="[]",
    )
    pyarrow.parquet.write_table(pyarrow.table({"txt": ["x"], "label": ["y"]}), tmp_path / "j.parquet")
    lines = problem(read_corpus, paths | {"j": tmp_path / "j.parquet"}, "sequence_classification").splitlines()
    assert lines[0] == "data: 10 lines can't be used."
    assert lines[6].startswith("  f.parquet  ")
    assert lines[1:6] + lines[7:] == [
        "  a.csv:1  no field 'text'  nearest: 'txt'  columns: 'txt', 'label'",
        "  b.csv:1  1 column stands in the header twice: 'text'",
        "  c.json  expected a list of objects, found dict",
        "  d.json:2  no JSON: Expecting value at column 11",
        "  e.csv:2  no UTF-8 at byte 5",
        "  g.jsonl  the file is empty",
        "  h.csv  the file is empty",
        "  i.json  the file is empty",
        "  j.parquet  no field 'text'  nearest: 'txt'  columns: 'txt', 'label'",
        "Fix: correct or delete them.",
    ]


def test_of_many_malformed_lines_the_first_ten_are_shown_and_all_are_counted(write):
    text = problem(read_corpus, write(train=b"oops\n" * 37), "causal_lm")
    assert "data: 37 lines can't be used." in text
    assert "train.jsonl:10  " in text
    assert "train.jsonl:11  " not in text
    assert "  and 27 more\n" in text


def test_sources_without_files_are_listed_together(tmp_path, write):
    (tmp_path / "empty").mkdir()
    sources = {
        "train": tmp_path / "no.jsonl",
        "validation": f"{tmp_path}/*.csv",
        "test": tmp_path / "empty",
        "more": "hub:alone",
        "last": write(here=[])["here"],
    }
    with pytest.raises(FileNotFoundError) as caught:
        read_corpus(sources, "causal_lm")
    assert str(caught.value).replace(str(tmp_path), "T") == (
        "data: 4 sources can't be found.\n"
        "  T/no.jsonl  no such file\n"
        "  T/*.csv  matches no file\n"
        "  T/empty  the folder has no .jsonl .json .csv .tsv .parquet .txt file\n"
        "  hub:alone  write hub:owner/name/file\n"
        "Fix: correct [data] in the config."
    )


def test_a_glob_reads_its_files_in_order(tmp_path, write):
    write(part_2=[{"text": "b"}], part_1=[{"text": "a"}])
    assert [record.text for record in read_records(f"{tmp_path}/part_*.jsonl", "causal_lm")] == ["a", "b"]


def test_a_suffix_that_the_task_is_not_read_from_is_an_error(write):
    text = problem(read_corpus, write(train__txt="one\n", test__xml="<a/>"), "sequence_classification")
    assert "2 files have a suffix that the task isn't read from.\n  train.txt  readable: .jsonl .json .csv" in text


def test_fields_that_a_task_does_not_have_are_errors_with_the_nearest(write):
    path = write(train=CLASSES["train"])["train"]
    assert problem(read_records, path, "sequence_classification", fields={"txt": "q", "tags": "t"}) == (
        "data: 2 fields are none of sequence_classification's.\n"
        "  'txt'  nearest: 'text'\n"
        "  'tags'  nearest: 'text'\n"
        "Fix: it reads 'text' and 'label'."
    )
    both = {"messages": "m", "question": "q"}
    assert "fields of two formats are named" in problem(read_records, path, "instruction", fields=both)
    assert problem(read_records, path, "instruction") == (
        "data: 1 line can't be used.\n"
        "  train.jsonl:1  no field 'messages' or 'conversations' or 'question' and 'answer' or 'instruction' and "
        "'output' or 'prompt' and 'completion', but 'text', 'label'\n"
        'Fix: set data.question = "..." and data.answer = "...".'
    )
    assert "causal_lm has no format 'alpaca'." in problem(read_records, path, "causal_lm", format="alpaca")


def test_columns_under_other_names_are_one_error_that_says_what_to_set(write):
    def fix(task, **contents):
        paths = write(**contents)
        return problem(read_corpus, paths, task).splitlines()[1:]

    banking = "text,category\nWhere is my card?,card_arrival\nI lost it,lost_card\n"
    assert fix("sequence_classification", train__csv=banking) == [
        "  train.csv:1  no field 'label'  nearest: 'category'  columns: 'text', 'category'",
        'Fix: set data.label = "category".',
    ]
    # Every line of the file lacks it: the name is wrong, not the lines.
    rows = [{"id": n, "sentence": "x", "intent": "y"} for n in range(3)]
    assert fix("sequence_classification", train=rows) == [
        "  train.jsonl:1  no field 'text'  nearest: 'intent'  columns: 'id', 'sentence', 'intent'",
        'Fix: set data.text = "sentence" and data.label = "intent".',
    ]
    assert fix("instruction", train=[{"question": "q", "reply": "a"}]) == [
        "  train.jsonl:1  no field 'answer'  nearest: 'reply'  columns: 'question', 'reply'",
        'Fix: set data.answer = "reply".',
    ]
    assert fix("sequence_classification", train__csv="text\nx\n")[-1] == "Fix: add or rename the columns in the files."
    assert fix("instruction", train=[{"query": "q", "response": "a"}])[-1] == (
        'Fix: set data.question = "query" and data.answer = "response".'
    )
    assert fix("instruction", train=[{"chat": []}])[-1] == 'Fix: set data.messages = "chat".'
    assert fix("causal_lm", train=[{"content": "x"}], test=[{"body": "y"}])[-1] == (
        "Fix: give the columns the same names in all files."
    )
    # A line among others that have the column is a wrong line.
    assert fix("causal_lm", train=[{"text": "x"}, {"txt": "y"}]) == [
        "  train.jsonl:2  no field 'text'  nearest: 'txt'",
        "Fix: correct or delete them.",
    ]


def test_a_label_that_train_lacks_is_an_error_with_the_nearest_one(write):
    changed = {
        "train": [{"text": "x", "label": "refund"}, {"text": "y", "label": "b"}],
        "test": [{"text": "z", "label": "refunds"}],
    }
    assert problem(read_corpus, write(**changed), "sequence_classification") == (
        "data: 1 record has a label that train lacks.\n"
        "  test.jsonl:1  'refunds'  nearest: 'refund'\n"
        "Fix: correct the label, or train on records of it."
    )
    tagged = {
        "train": [{"tokens": ["a", "b"], "tags": ["O", "B-X"]}],
        "test": [{"tokens": ["c", "d"], "tags": ["I-X", "I-X"]}],
    }
    assert "  test.jsonl:1  'I-X'  nearest: 'B-X'\n" in problem(read_corpus, write(**tagged), "token_classification")
    # A model that is asked brings its own labels: one split alone needn't hold them all.
    test = {"test": write(test=CLASSES["test"])["test"]}
    assert read_corpus(test, "sequence_classification", labels=["b", "a"]).labels == ("b", "a")
    text = problem(read_corpus, test, "sequence_classification", labels=["a", "c"])
    assert "1 record has a label that the model lacks.\n  test.jsonl:1  'b'" in text


def test_one_label_alone_is_an_error(write):
    assert "train has one label only, 'a'" in problem(
        read_corpus, write(train=CLASSES["train"][:1]), "sequence_classification"
    )


def test_a_text_in_two_splits_is_an_error_whatever_its_case_and_spaces(write):
    paths = write(train=CLASSES["train"], test=[{"text": "ONE ", "label": "a"}, {"text": "four", "label": "b"}])
    text = problem(read_corpus, paths, "sequence_classification")
    assert "1 text stands in two splits.\n  test.jsonl:1  'ONE' is in train.jsonl:1\n" in text
    assert len(read_corpus(paths, "sequence_classification", allow_overlap=True).splits["test"]) == 2
    assert "1 text stands in two splits." in problem(read_corpus, paths, "causal_lm")
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    paths = write(train=[chat], test=[{"question": "a", "answer": "b"}])
    assert "1 text stands in two splits." in problem(read_corpus, paths, "instruction")


def test_a_sentence_in_two_splits_gives_away_nothing_without_an_entity(write):
    plain = {"tokens": ["Results", "."], "tags": ["O", "O"]}
    telling = {"tokens": ["Gout", "."], "tags": ["B-X", "O"]}
    paths = write(train=[plain, telling], test=[plain])
    assert len(read_corpus(paths, "token_classification").splits["test"]) == 1
    paths = write(train=[plain, telling], test=[plain, telling])
    assert "1 text stands in two splits.\n  test.jsonl:2  'Gout .'" in problem(
        read_corpus, paths, "token_classification"
    )


def test_answers_and_labels_must_go_together(write):
    answers = [{"label": "a", "answer": "A."}, {"label": "a", "answer": "again"}, {"label": "bb", "answer": "?"}]
    paths = write(**CLASSES, answers=answers)
    answers = paths.pop("answers")
    assert problem(read_corpus, paths, "sequence_classification", answers=answers) == (
        "data: the answers don't match the labels.\n"
        "  answers.jsonl  no answer for 'b'\n"
        "  answers.jsonl:2  a second answer for 'a'\n"
        "  answers.jsonl:3  'bb' is no label  nearest: 'b'\n"
        "Fix: give every label one answer."
    )
    assert "causal_lm has no labels to answer for." in problem(read_corpus, paths, "causal_lm", answers=answers)


SENTENCES = [Tagged(("EU", "rejects", "a b"), ("B-ORG", "O", "I-LOC")), Tagged(("Bonn",), ("I",))]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a__tsv", "EU\tB-ORG\nrejects\tO\na b\tI-LOC\n\n\nBonn\tI\n", ["EU", "rejects", "a b"]),
        ("a__txt", "EU\tNNP\tB-ORG\r\nrejects\tVB\tO\r\na b\tNN\tI-LOC\r\n \r\nBonn\tNNP\tI", ["EU", "rejects", "a b"]),
        (
            "a__conll",
            "-DOCSTART- -X- -X- O\n\nEU NNP I-NP B-ORG\nrejects VB I-VP O\nab NN I-NP I-LOC\n-DOCSTART- O\nBonn I",
            ["EU", "rejects", "ab"],
        ),
    ],
)
def test_a_token_and_its_tag_a_line_make_sentences(write, name, content, words):
    records = read_records(write(**{name: content})["a"], "token_classification")
    assert bare(records) == [SENTENCES[0]._replace(tokens=tuple(words)), SENTENCES[1]]


def test_tags_that_are_not_bio_and_lines_without_one_are_listed(write):
    paths = write(
        train__tsv="a\tO\nb\tE-X\n\nlonely\n\nc\tO\n",
        validation=[{"tokens": ["a", "b"], "tags": ["O"]}, {"tokens": "a b", "tags": ["O"]}],
        test__conll="a B-\n\n \tO\n",
    )
    assert problem(read_corpus, paths, "token_classification").splitlines()[1:-1] == [
        "  train.tsv:2  tag 'E-X' is no O, B-TYPE or I-TYPE",
        "  train.tsv:4  'lonely' has no tag",
        "  validation.jsonl:1  2 tokens and 1 tag",
        "  validation.jsonl:2  'tokens' is 'a b', expected a list of texts",
        "  test.conll:1  tag 'B-' is no O, B-TYPE or I-TYPE",
        "  test.conll:3  'token' is ' ', expected a text",
    ]


def test_a_plain_text_is_cut_by_paragraph_line_or_not_at_all(write):
    path = write(a__txt="\n  One,\nmore.\n \n\nTwo.\n")["a"]
    assert read_records(path, "causal_lm") == [Text("  One,\nmore.", f"{path}:2"), Text("Two.", f"{path}:6")]
    lines = read_records(path, "causal_lm", unit="line")
    assert [record.text for record in lines] == ["  One,", "more.", "Two."]
    assert bare(read_records(path, "causal_lm", unit="file")) == [Text("\n  One,\nmore.\n \n\nTwo.\n")]


def test_a_text_in_lines_is_one_text_and_its_spaces_stay(write):
    path = write(a=[{"lines": ["one,", "  two"]}, {"lines": " three\n"}])["a"]
    assert bare(read_records(path, "causal_lm", fields={"text": "lines"})) == [Text("one,\n  two"), Text(" three\n")]


TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]


def test_chats_are_messages_or_a_question_and_its_answer(write):
    named = TURNS[2] | {"name": "x"}
    path = write(a=[{"messages": [*TURNS[:2], named]}, {"question": " q ", "answer": "a"}])["a"]
    assert bare(read_records(path, "instruction")) == [Chat((*TURNS[:2], named)), Chat(tuple(TURNS[1:]))]
    path = write(a__csv="ask,say\nq,a\n")["a"]
    records = read_records(path, "instruction", fields={"question": "ask", "answer": "say"})
    assert bare(records) == [Chat(tuple(TURNS[1:]))]


@pytest.mark.parametrize(
    "format, record, turns",
    [
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, TURNS[1:]),
        ("alpaca", {"instruction": "q", "output": "a", "system": "s", "id": 3}, TURNS),
        (
            "alpaca",
            {"instruction": " q ", "input": "more\n", "output": "a"},
            [{"role": "user", "content": "q\n\nmore"}, TURNS[2]],
        ),
        ("alpaca", {"instruction": "", "input": "q", "output": "a", "history": []}, TURNS[1:]),
        (
            "alpaca",
            {"instruction": "r", "output": "b", "history": [["q", "a"]]},
            [*TURNS[1:], {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}],
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "a", "weight": None},
                ]
            },
            TURNS,
        ),
        ("sharegpt", {"conversations": TURNS[1:], "system": "s"}, TURNS),
        ("messages", {"messages": TURNS, "prompt": "q", "completion": "a"}, TURNS),
        ("prompt_completion", {"prompt": "q", "completion": " a"}, TURNS[1:]),
        (
            "prompt_completion",
            {"prompt": [*TURNS, TURNS[1]], "completion": [TURNS[2]]},
            [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[1:]],
        ),
    ],
)
def test_formats_that_people_have_are_recognized_by_their_columns(write, format, record, turns):
    path = write(train=[record])["train"]
    corpus = read_corpus({"train": path}, "instruction")
    assert bare(corpus.splits["train"]) == [Chat(tuple(turns))]
    columns = [name for name in record if name != "id"][: 1 if format == "messages" else None]
    assert corpus.formats["train"].startswith(f"{format} (")
    assert all(repr(name) in corpus.formats["train"] for name in columns)
    assert read_corpus({"train": path}, "instruction", format=format).formats == corpus.formats


def test_the_format_can_be_chosen_and_an_input_has_any_name(write):
    both = {"messages": TURNS, "prompt": "other", "completion": "one"}
    path = write(a=[both])["a"]
    (chat,) = read_records(path, "instruction", format="prompt_completion")
    assert [message["content"] for message in chat.messages] == ["other", "one"]
    dolly = {"instruction": "q", "context": "c", "response": "a"}
    path = write(a=[dolly])["a"]
    (chat,) = read_records(path, "instruction", fields={"answer": "response", "input": "context"})
    assert [message["content"] for message in chat.messages] == ["q\n\nc", "a"]
    # Columns of other formats are like any others.
    path = write(a=[{"messages": TURNS, "input": 3, "history": 4}])["a"]
    assert bare(read_records(path, "instruction")) == [Chat(tuple(TURNS))]


def test_a_list_of_text_parts_is_the_text_that_transformers_writes(write):
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    records = [
        {"conversations": [{"from": "human", "value": parts}, {"from": "gpt", "value": parts[1:]}]},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[1:]}]},
        {"prompt": [{"role": "user", "content": parts}], "completion": "two"},
    ]
    # As the templates of models that see images write it.
    template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"
    )
    expected, _ = render_jinja_template(conversations=[records[1]["messages"]], chat_template=template)
    assert expected == ["user: one, two;assistant: two;"]
    for record in records:
        (chat,) = read_records(write(a=[record])["a"], "instruction")
        found, _ = render_jinja_template(conversations=[list(chat.messages)], chat_template=template)
        assert found == expected
    image = {"type": "image_url", "image_url": {"url": "a.png"}}
    wrong = [[*parts, image], ["one"], [{"type": "text"}], [{"type": "text", "text": " "}]]
    path = write(a=[{"messages": [{"role": "user", "content": content}, *TURNS[2:]]} for content in wrong])["a"]
    expected = "expected {'type': 'text', 'text': ...}"
    assert problem(read_records, path, "instruction").splitlines()[1:-1] == [
        f"  a.jsonl:1  'messages[0].content[2]' is {image}, {expected}",
        f"  a.jsonl:2  'messages[0].content[0]' is 'one', {expected}",
        f"  a.jsonl:3  'messages[0].content[0]' is {{'type': 'text'}}, {expected}",
        "  a.jsonl:4  'messages[0].content' is ' ', expected a text",
    ]


CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"x": 1, "y": [2]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}


def test_calls_of_tools_and_weights_are_read(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [
        TURNS[1],
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "3!", "reasoning_content": "so", "weight": 0},
    ]
    expected = (TURNS[1], {"role": "assistant", "tool_calls": [CALL]}, *calls[2:])
    written = json.loads(json.dumps(calls))
    function = written[1]["tool_calls"][0]["function"]
    function["arguments"] = json.dumps(function["arguments"])
    # A string of JSON, as OpenAI's files have it, is the same.
    path = write(a=[{"messages": calls, "tools": [TOOL]}, {"messages": written, "tools": json.dumps([TOOL])}])["a"]
    assert bare(read_records(path, "instruction")) == [Chat(expected, "", (TOOL,))] * 2
    # Parquet gives every call the arguments of all: what one lacks is null in it.
    other = {"type": "function", "id": "2", "function": {"name": "neg", "arguments": {"z": 1}}}
    chats = [[TURNS[1], {"role": "assistant", "tool_calls": [call]}] for call in (CALL, other)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": chat} for chat in chats]), "b.parquet")
    assert bare(read_records("b.parquet", "instruction")) == [Chat(tuple(chat)) for chat in chats]
    blank = {"tool_calls": [], "name": "", "reasoning_content": " ", "tool_call_id": None}
    path = write(a=[{"messages": [turn | blank for turn in TURNS]}])["a"]
    assert bare(read_records(path, "instruction")) == [Chat(tuple(TURNS))]
    path = write(a=[{"messages": [TURNS[1] | {"weight": 0}, TURNS[2] | {"weight": 1}], "tools": None}])["a"]
    assert bare(read_records(path, "instruction")) == [Chat(tuple(TURNS[1:]))]


def test_what_a_message_can_not_say_is_refused_by_name(write):
    user, answer = TURNS[1:]
    rows = [
        [user, answer | {"train": False, "audio": {}}],
        [user, answer | {"weight": 0.5}],
        [user | {"weight": 1}, answer],
        [user, answer | {"weight": 0}],
        [user | {"tool_calls": [CALL]}, answer],
        [user, answer | {"tool_calls": [{"function": "add"}]}],
        [user, answer | {"tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}],
    ]
    known = "'content', 'name', 'reasoning_content', 'role', 'tool_call_id', 'tool_calls', 'weight'"
    expected = [
        f"'messages[1]' has 'train', 'audio', which can't be trained on; known: {known}",
        "'messages[1]' has weight 0.5, expected 0 or 1",
        "'messages[0]' has weight 1, expected 0: only the assistant's messages count in the loss",
        "'messages' has no message of the assistant to learn from",
        "'messages[0]' has 'tool_calls', but role 'user'",
        "'messages[1].tool_calls[0]' is {'function': 'add'}, "
        'expected {"type": "function", "function": {"name": ..., "arguments": {...}}}',
        "'messages[1].tool_calls[0].function.arguments' is '{', expected JSON",
    ]
    more = [
        {"messages": TURNS, "tools": {"a": 1}},
        {"messages": TURNS, "system": "s"},
        {"prompt": [user], "completion": "a", "input": "x"},
        {"instruction": "q", "output": "a", "history": [["q"]]},
    ]
    path = write(a=[{"messages": messages} for messages in rows] + more)["a"]
    assert problem(read_records, path, "instruction").splitlines()[1:-1] == [
        *(f"  a.jsonl:{n}  {line}" for n, line in enumerate(expected, 1)),
        "  a.jsonl:8  'tools' is {'a': 1}, expected a list of JSON schemas",
        "  a.jsonl:9  'system' and the first message are two system messages",
        "  a.jsonl:10  'input' can't follow 'prompt', a list of messages",
        "  and 1 more",
    ]


def test_chats_without_an_answer_or_with_strange_messages_are_listed(write):
    user = {"role": "user", "content": "q"}
    rows = [[], [user], [user, {"role": "asistant", "content": "a"}], [user, "a"], [user, user | {"content": None}]]
    path = write(a=[{"messages": messages} for messages in rows])["a"]
    assert problem(read_records, path, "instruction").splitlines()[1:-1] == [
        "  a.jsonl:1  'messages' is [], expected a list of messages",
        "  a.jsonl:2  'messages' has no message of the assistant to learn from",
        "  a.jsonl:3  'messages[1]' has role 'asistant'  nearest: 'assistant'",
        "  a.jsonl:4  'messages[1]' is 'a', expected an object with 'role' and 'content'",
        "  a.jsonl:5  'messages[1].content' is None, expected a text",
    ]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as serves one data set's files."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.split("?")[0]
        self.asked.append(path)
        file = path.removeprefix(f"/datasets/owner/name/resolve/{COMMIT}/")
        if path.startswith("/api/datasets/owner/name/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/api/datasets/owner/name/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(name.encode()).hexdigest()}
                for name, content in self.files.items()
            ]
            body = json.dumps(entries).encode()
        elif file in self.files:
            body = self.files[file]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


FROM_THE_HUB = """
import json, sys
from jlora.data.readers import read_corpus
for line in sys.stdin:
    try:
        corpus = read_corpus(json.loads(line), "causal_lm")
        print(json.dumps({name: [record.text for record in split] for name, split in corpus.splits.items()}))
    except FileNotFoundError as error:
        print(json.dumps(str(error)))
"""


def test_a_data_set_is_fetched_from_the_hub_and_its_splits_are_found_by_name(tmp_path):
    def lines(*texts):
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()

    files = {
        "data/train-00000-of-00002.jsonl": lines("a"),
        "data/train-00001-of-00002.jsonl": lines("b"),
        "data/dev.jsonl": lines("c"),
        "en/test/0000.jsonl": lines("d"),
        "de/test/0000.jsonl": lines("e"),
        "extra.txt": b"f\n",
        "train.py": b"raise SystemExit('run')",
        "dataset_infos.json": b"{}",
    }
    handler = type("Served", (Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    asked = [
        {"train": "hub:owner/name", "validation": "hub:owner/name", "test": "hub:owner/name/en"},
        {"test": "hub:owner/name/extra.txt@main", "validation": "hub:owner/name/data/train"},
        {"test": "hub:owner/name", "validation": "hub:owner/name/en", "train": "hub:owner/other"},
        {"extra": "hub:owner/name/extra.txt"},
    ]
    try:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", FROM_THE_HUB],
            input="\n".join(map(json.dumps, asked)),
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert result.returncode == 0, result.stderr
    good, named, lost, extra = map(json.loads, result.stdout.splitlines())
    assert good == {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
    assert extra == {"extra": ["f"]}
    assert isinstance(named, str)
    assert "hub:owner/name/extra.txt@main  no " in named
    assert "data: 3 sources can't be found." in lost
    assert "several sets of files fit, 'de/test/*.jsonl', 'en/test/*.jsonl': write hub:owner/name/" in lost
    assert "file of it has validation or valid or val or dev or devel in its name or its folder's" in lost
    assert "hub:owner/other  the hub did not give it: " in lost
    assert not any(path.endswith((".py", "infos.json")) for path in handler.asked)


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")


@needs_data
def test_real_data_are_read():
    folder = DATA / "ncbi-disease"
    sources = {name: folder / f"{name}.tsv" for name in ("train", "devel", "test")}
    corpus = read_corpus(sources, "token_classification", allow_overlap=True)
    assert {name: len(split) for name, split in corpus.splits.items()} == {"train": 5432, "devel": 923, "test": 940}
    assert corpus.labels == ("B-Disease", "I-Disease", "O")
    begun = sum(tag == "B-Disease" for split in corpus.splits.values() for record in split for tag in record.tags)
    assert begun == 6892
    banking = read_records(DATA / "banking77/train.csv", "sequence_classification", fields={"label": "category"})
    assert (len(banking), len({record.label for record in banking})) == (10003, 77)
    sonnets = read_records(DATA / "sonnets/shakespeare.txt", "causal_lm")
    assert len(sonnets) == 154
    poems = read_records(DATA / "chinese-poetry/tang300.json", "causal_lm", fields={"text": "paragraphs"})
    assert poems[0].text.startswith("西陸蟬聲唱")
    assert poems[0].text.count("\n") == 3
