"""Questions from disk to batches: malformed files are told of line by line, and every question is seen once."""

import json

import numpy as np
import pytest

from jlora.recipes.data import (
    Example,
    Row,
    bucket,
    load_corpus,
    ordered_batches,
    to_rows,
    training_batches,
)


@pytest.fixture
def files(tmp_path):
    """Writes the files of a job, changed as told, and gives load_corpus's arguments."""

    def write(**changed):
        contents = {
            "train": [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}],
            "validation": [{"text": "three", "label": "a"}],
            "test": [{"text": "four", "label": "b"}],
            "answers": [{"label": "a", "answer": "A."}, {"label": "b", "answer": "B."}],
        } | changed
        for name, content in contents.items():
            raw = content if isinstance(content, bytes) else "\n".join(map(json.dumps, content)).encode()
            (tmp_path / f"{name}.jsonl").write_bytes(raw)
        return {name: tmp_path / f"{name}.jsonl" for name in contents}

    return write


def problem(arguments) -> str:
    with pytest.raises(ValueError) as caught:
        load_corpus(**arguments)
    folder = str(arguments["train"].parent)
    return str(caught.value).replace(folder + "/", "")


def test_a_corpus_holds_what_the_files_say(files):
    corpus = load_corpus(
        **files(train=b'\xef\xbb\xbf{"text": " b? ", "label": "b"}\n\n{"label": "a", "text": "a?"}\r\n')
    )
    assert corpus.train == [Example("b?", "b"), Example("a?", "a")]
    assert corpus.labels == ("a", "b")
    assert corpus.answers == {"a": "A.", "b": "B."}
    without = files()
    del without["answers"]
    assert load_corpus(**without).answers == {}


def test_every_malformed_line_is_listed_with_its_file_number_and_reason(files):
    train = b"\n".join(
        [
            b'{"text": "fine", "label": "a"}',
            b'{"text": "no end", "label": "a"',
            b'["text", "label"]',
            b'{"text": "no label", "lable": "a"}',
            b'{"text": "  ", "label": "a"}',
            b'{"text": "\xff", "label": "a"}',
            b"{}",
        ]
    )
    assert problem(files(train=train, test=[{"text": 4, "label": "a"}])) == (
        "data: 7 lines can't be used.\n"
        "  train.jsonl:2  no JSON: Expecting ',' delimiter at column 32\n"
        "  train.jsonl:3  expected an object with 'text' and 'label', found list\n"
        "  train.jsonl:4  no field 'label'  nearest: 'lable'\n"
        "  train.jsonl:5  'text' is '  ', expected a text\n"
        "  train.jsonl:6  no UTF-8 at byte 11\n"
        "  train.jsonl:7  no field 'text'\n"
        "  test.jsonl:1  'text' is 4, expected a text\n"
        "Fix: correct or delete them."
    )


def test_of_many_malformed_lines_the_first_ten_are_shown_and_all_are_counted(files):
    text = problem(files(train=b"oops\n" * 37))
    assert "data: 37 lines can't be used." in text
    assert "train.jsonl:10  " in text
    assert "train.jsonl:11  " not in text
    assert "  and 27 more\n" in text


def test_empty_files_and_missing_ones_are_errors(files):
    assert "validation.jsonl  the file is empty\n" in problem(files(validation=b"\n \n"))
    arguments = files()
    arguments["test"].unlink()
    arguments["answers"].unlink()
    with pytest.raises(FileNotFoundError, match=r"2 files do not exist\.\n  .*test\.jsonl\n  .*answers\.jsonl\nFix: "):
        load_corpus(**arguments)


def test_a_label_that_train_lacks_is_an_error_with_the_nearest_one(files):
    text = problem(
        files(
            train=[{"text": "x", "label": "refund"}, {"text": "y", "label": "b"}],
            test=[{"text": "z", "label": "refunds"}],
            validation=[{"text": "w", "label": "b"}],
        )
    )
    assert text == (
        "data: 1 line has a label that train.jsonl lacks.\n"
        "  test.jsonl:1  'refunds'  nearest: 'refund'\n"
        "Fix: correct the label, or add questions of it to train."
    )


def test_one_label_alone_is_an_error(files):
    only = [{"text": "x", "label": "a"}]
    text = problem(files(train=only, validation=[{"text": "y", "label": "a"}], test=[{"text": "z", "label": "a"}]))
    assert "train.jsonl has one label only, 'a'" in text


def test_a_question_in_two_files_is_an_error_whatever_its_case_and_spaces(files):
    text = problem(files(test=[{"text": "ONE ", "label": "a"}, {"text": "four", "label": "b"}]))
    assert "1 question stands in two files.\n  test.jsonl:1  'ONE' is in train.jsonl:1\n" in text


def test_answers_and_labels_must_go_together(files):
    answers = [{"label": "a", "answer": "A."}, {"label": "a", "answer": "again"}, {"label": "bb", "answer": "?"}]
    assert problem(files(answers=answers)) == (
        "data: the answers don't match the labels.\n"
        "  answers.jsonl  no answer for 'b'\n"
        "  answers.jsonl:2  a second answer for 'a'\n"
        "  answers.jsonl:3  'bb' is no label in train  nearest: 'b'\n"
        "Fix: give every label one answer."
    )


def rows_of(lengths) -> list[Row]:
    return [Row([n + 1] * length, n % 3) for n, length in enumerate(lengths)]


LENGTHS = np.random.default_rng(0).integers(3, 60, 47).tolist()


def contents(batch) -> list[tuple[int, ...]]:
    """(token, length, label) of every row of weight 1."""
    real = batch["weights"] == 1
    return [
        (int(ids[0]), int(mask.sum()), int(label))
        for ids, mask, label in zip(
            batch["input_ids"][real], batch["attention_mask"][real], batch["labels"][real], strict=True
        )
    ]


def expected(rows) -> list[tuple[int, ...]]:
    return sorted((row.ids[0], len(row.ids), row.label) for row in rows)


def test_every_epoch_sees_every_question_once_in_an_order_of_its_own():
    rows = rows_of(LENGTHS)
    epoch = training_batches(rows, batch_size=8, max_length=64, pad_id=0, seed=3)
    batches = list(epoch.repeat(2))
    first, second = batches[: len(epoch)], batches[len(epoch) :]
    orders = [[item for batch in half for item in contents(batch)] for half in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == expected(rows)
    assert orders[0] != orders[1]
    again = list(training_batches(rows, batch_size=8, max_length=64, pad_id=0, seed=3).repeat(2))
    other = list(training_batches(rows, batch_size=8, max_length=64, pad_id=0, seed=4))
    assert [contents(batch) for batch in again] == [contents(batch) for batch in batches]
    assert [contents(batch) for batch in other] != [contents(batch) for batch in first]


def test_batches_have_one_shape_a_bucket_and_no_row_is_padded_further():
    rows = rows_of(LENGTHS)
    shapes = set()
    for batch in training_batches(rows, batch_size=8, max_length=64, pad_id=0, seed=0):
        shapes.add(batch["input_ids"].shape)
        lengths = batch["attention_mask"][batch["weights"] == 1].sum(-1)
        assert {bucket(int(n), 64) for n in lengths} == {batch["input_ids"].shape[1]}
    assert shapes == {(8, 16), (8, 32), (8, 64)}


def test_ordered_batches_hold_every_row_at_its_place():
    rows = rows_of(LENGTHS)
    found = {}
    for places, batch in ordered_batches(rows, batch_size=8, max_length=64, pad_id=9):
        assert batch["input_ids"].shape[0] == 8
        assert int(batch["weights"].sum()) == len(places)
        # Every row attends to something, the ones that fill up too.
        assert batch["attention_mask"].any(-1).all()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 9).all()
        found |= dict(zip(places, contents(batch), strict=True))
    assert [found[n] for n in range(len(rows))] == [(row.ids[0], len(row.ids), row.label) for row in rows]


def test_rows_are_cut_to_max_length_and_classed_by_their_labels_place():
    def tokenizer(texts, truncation, max_length):
        assert truncation
        return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}

    rows = to_rows(tokenizer, [Example("a bb ccc", "y"), Example("dddd", "x")], ("x", "y"), 2)
    assert rows == [Row([1, 2], 1), Row([4], 0)]
