"""A validation split taken from the training records: drawn by its seed, no text on both sides, no class lost."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jlora.data.holdout import hold_out
from jlora.data.readers import Chat, Corpus, Labelled, Message, Tagged, Text


def corpus(records) -> Corpus:
    return Corpus({"train": list(records)}, (), {})


def halves(records, fraction=0.25, seed=0):
    splits = hold_out(corpus(records), fraction, seed).splits
    return splits["train"], splits["validation"]


def test_records_held_out_are_the_same_each_time_and_none_is_lost():
    whole = corpus(Text(str(n)) for n in range(20))
    found = hold_out(whole, 0.25, 0)
    assert hold_out(whole, 0.25, 0) == found != hold_out(whole, 0.25, 1)
    assert len(found.splits["validation"]) == 5
    both = found.splits["train"] + found.splits["validation"]
    assert sorted(both) == sorted(whole.splits["train"])
    # Both halves keep the order of the file.
    for split in ("train", "validation"):
        assert found.splits[split] == [record for record in whole.splits["train"] if record in found.splits[split]]
    with pytest.raises(ValueError, match="1 record can't be divided"):
        hold_out(corpus([Text("a")]), 0.25, 0)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=80),
    st.floats(0.05, 0.9),
    st.integers(0, 5),
)
def test_no_text_is_on_both_sides_and_training_keeps_every_class(pairs, fraction, seed):
    records = [
        Labelled(f"Text {text}" if n % 2 else f"text  {text}", str(label)) for n, (text, label) in enumerate(pairs)
    ]
    try:
        train, validation = halves(records, fraction, seed)
    except ValueError as error:
        assert "can't be divided" in str(error)
        return
    keys = [{record.text.casefold().split()[1] for record in split} for split in (train, validation)]
    assert not keys[0] & keys[1]
    assert {record.label for record in train} == {record.label for record in records}
    assert 0 < len(validation) <= max(1, round(fraction * len(records)))
    assert Counter(train + validation) == Counter(records)


def test_every_class_gives_its_fraction():
    records = [
        Labelled(f"{label} {n}", label) for label, size in {"a": 100, "b": 30, "c": 5}.items() for n in range(size)
    ]
    for seed in range(5):
        _, validation = halves(records, 0.2, seed)
        assert Counter(record.label for record in validation) == {"a": 20, "b": 6, "c": 1}
    # 13.5 is rounded to 14: c's remainder, 0.519 of a record, is the largest.
    _, validation = halves(records, 0.1)
    assert Counter(record.label for record in validation) == {"a": 10, "b": 3, "c": 1}
    _, validation = halves([*records, Labelled("alone", "d")], 0.5)
    assert Counter(record.label for record in validation) == {"a": 50, "b": 15, "c": 3}


def test_a_text_that_stands_often_stays_whole_and_is_made_up_for():
    records = [Labelled("again", "a")] * 60 + [Labelled(f"{n}", "ab"[n % 2]) for n in range(40)]
    for seed in range(5):
        train, validation = halves(records, 0.2, seed)
        assert len(validation) == 20
        assert Labelled("again", "a") not in validation and train.count(Labelled("again", "a")) == 60


def test_tags_and_chats_are_divided_alike():
    sentences = [Tagged((f"w{n % 15}", "x"), ("B-RARE" if n % 15 == 3 else "B-X", "O")) for n in range(30)]
    plain = [Tagged(("only", "words"), ("O", "O"))] * 10
    for seed in range(10):
        train, validation = halves(sentences + plain, 0.3, seed)
        assert not {record.tokens for record in train} & {record.tokens for record in validation}
        assert {tag for record in train for tag in record.tags} == {"B-RARE", "B-X", "O"}
    messages = [Message(role="user", content=f"Q {n % 5}") for n in range(10)]
    chats = [Chat((message, Message(role="assistant", content="a"))) for message in messages]
    train, validation = halves(chats, 0.4)
    assert (len(train), len(validation)) == (6, 4)
    assert not {chat.messages[0]["content"] for chat in train} & {chat.messages[0]["content"] for chat in validation}
