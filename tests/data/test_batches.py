"""Records to rows to batches: nothing lost, nothing twice, and a loss on what is to be learnt alone."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from letter_tokenizer import CHATML, letters
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jlora.data.batches import (
    Row,
    bucket,
    make_rows,
    ordered_batches,
    pack,
    prompt_ids,
    tokenise,
    training_batches,
)
from jlora.data.readers import Chat, Labelled, Message, Tagged, Text, read_records

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def pieces():
    """A BERT tokenizer of a few word pieces."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg", *(f"##{letter}" for letter in "abcdefg")]
    vocab = {token: n for n, token in enumerate(words)}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def learnt(tokenizer, row) -> str:
    """The targets that weigh 1, as text."""
    return tokenizer.decode(row.targets[row.weights == 1])


def chat(*turns, at="") -> Chat:
    return Chat(tuple(Message(role=role, content=content) for role, content in turns), at)


def test_a_text_is_cut_to_max_length_and_classed_by_its_labels_place(pieces):
    records = [Labelled("a b c d e", "y"), Labelled("g", "x")]
    rows, cut, _ = make_rows(pieces, records, max_length=5, labels=("x", "y"))
    expected = pieces([record.text for record in records], truncation=True, max_length=5)["input_ids"]
    assert [row.ids.tolist() for row in rows] == expected == tokenise(pieces, ["a b c d e", "g"], 5)[0]
    assert len(expected[0]) == 5
    assert [int(row.targets) for row in rows] == [1, 0]
    assert cut == 1


def test_a_tag_stands_on_the_first_piece_of_its_word_and_cut_words_are_counted(pieces):
    labels = ("B-X", "I-X", "O")
    record = Tagged(("abc", "d", "ef", "g"), ("B-X", "I-X", "O", "B-X"))
    rows, cut, _ = make_rows(pieces, [record, record], max_length=64, labels=labels)
    tokens = pieces.convert_ids_to_tokens(rows[1].ids)
    assert tokens == ["[CLS]", "a", "##b", "##c", "d", "e", "##f", "g", "[SEP]"]
    assert rows[1].weights.tolist() == [0, 1, 0, 0, 1, 1, 0, 1, 0]
    assert rows[1].targets[rows[1].weights == 1].tolist() == [0, 1, 2, 0]
    assert cut == 0
    assert rows[0].beyond.tolist() == []
    rows, cut, dropped = make_rows(pieces, [record], max_length=6, labels=labels)
    assert pieces.convert_ids_to_tokens(rows[0].ids) == ["[CLS]", "a", "##b", "##c", "d", "[SEP]"]
    assert rows[0].targets[rows[0].weights == 1].tolist() == [0, 1]
    assert (rows[0].beyond.tolist(), cut, dropped) == ([2, 0], 2, 1)
    # An entity that goes on beyond the end is dropped too.
    assert make_rows(pieces, [record], max_length=5, labels=labels)[1:] == (3, 2)


def test_a_word_that_the_tokenizer_sees_nothing_in_is_unknown_and_shifts_no_tag(pieces):
    record = Tagged(("a", "\x01", "b", "\x02"), ("O", "B-X", "I-X", "O"), "f:1")
    rows, cut, _ = make_rows(pieces, [record], max_length=64, labels=("B-X", "I-X", "O"))
    assert pieces.convert_ids_to_tokens(rows[0].ids) == ["[CLS]", "a", "[UNK]", "b", "[UNK]", "[SEP]"]
    assert rows[0].targets[rows[0].weights == 1].tolist() == [2, 0, 1, 2]
    assert cut == 0


def test_words_need_a_tokenizer_that_can_tell_them():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"data: Slow can't tell which word a piece is of\."):
        make_rows(Slow(), [Tagged(("a",), ("O",))], max_length=8, labels=("O",))


@pytest.mark.parametrize("length", [2, 3, 7, 64])
def test_every_token_of_a_text_is_predicted_once_from_the_one_before(length):
    tokenizer = letters()
    texts = ["hello world", "abcdef", "x"]
    rows, cut, _ = make_rows(tokenizer, [Text(text) for text in texts], max_length=length)
    pairs = [
        (int(token), int(target))
        for row in rows
        for token, target, weight in zip(row.ids, row.targets, row.weights, strict=True)
        if weight
    ]
    whole = [tokenizer(text + "</s>")["input_ids"] for text in texts]
    assert pairs == [pair for ids in whole for pair in pairwise(ids)]
    assert max(len(row.ids) for row in rows) <= length
    assert all(row.weights.any() for row in rows)
    assert cut == 0


def test_a_text_begins_and_ends_as_the_tokenizer_has_it():
    for begin, end, text in [(True, True, "<s>ab</s>"), (False, True, "ab</s>"), (True, False, "<s>ab")]:
        tokenizer = letters(begin=begin, end=end)
        (row,) = make_rows(tokenizer, [Text("ab")], max_length=16).rows
        assert tokenizer.decode(row.ids) == text


def test_the_loss_of_a_chat_is_on_its_answers_alone():
    tokenizer = letters(template=CHATML)
    record = chat(("system", "s"), ("user", "q"), ("assistant", "a1"), ("user", "r"), ("assistant", "b2"))
    (row,) = make_rows(tokenizer, [record], max_length=256).rows
    text = tokenizer.apply_chat_template(list(record.messages), tokenize=False)
    assert tokenizer.decode(row.ids) == text
    assert learnt(tokenizer, row) == "a1<|im_end|>\nb2<|im_end|>\n"
    before = prompt_ids(tokenizer, Chat(record.messages[:2]))
    assert (
        tokenizer.decode(before)
        == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row.weights[: len(before) - 1].sum() == 0
    assert row.weights[len(before) - 1] == 1


def test_an_answer_that_the_template_rewrites_later_gets_a_row_as_it_was_last():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = letters(template=template)
    record = chat(("user", "q"), ("assistant", "a1"), ("user", "r"), ("assistant", "b2"))
    rows = make_rows(tokenizer, [record, record], max_length=256).rows
    texts = [
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n<think></think>a1<|im_end|>\n",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n<think></think>b2<|im_end|>\n",
    ]
    assert [tokenizer.decode(row.ids) for row in rows] == texts * 2
    assert [learnt(tokenizer, row) for row in rows] == [f"<think></think>{a}<|im_end|>\n" for a in ("a1", "b2")] * 2


def test_without_a_template_a_question_and_its_answer_are_two_lines():
    tokenizer = letters()
    record = chat(("user", "why?"), ("assistant", "so."))
    (row,) = make_rows(tokenizer, [record], max_length=64).rows
    assert tokenizer.decode(row.ids) == "<s>why?\nso.</s>"
    assert learnt(tokenizer, row) == "so.</s>"
    assert tokenizer.decode(prompt_ids(tokenizer, Chat(record.messages[:1]))) == "<s>why?\n"


def test_chats_that_can_not_be_written_are_listed():
    pair = chat(("user", "q"), ("assistant", "yes"), at="f:1")
    more = chat(("system", "s"), ("user", "q"), ("assistant", "a"), at="f:2")

    def problem(tokenizer, *records):
        with pytest.raises(ValueError) as caught:
            make_rows(tokenizer, records, max_length=64)
        return str(caught.value).splitlines()[1:-1]

    assert problem(letters(), pair, more) == [
        "  f:2  the tokenizer has no chat template, and this is no single question and answer"
    ]
    assert problem(letters(end=False), pair) == [
        "  f:1  the tokenizer has neither a chat template nor a token that ends an answer"
    ]
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    assert problem(letters(template=strict), pair, more) == ["  f:2  the chat template says: no system role"]
    other = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert problem(letters(template=other), pair) == ["  f:1  the template does not begin an answer as its prompt ends"]
    with pytest.raises(ValueError, match="no chat template"):
        prompt_ids(letters(), Chat(more.messages[:2]))


SPACED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("metaspace", [False, True])
def test_an_answer_follows_the_tokens_of_a_prompt_that_ends_in_a_space(metaspace):
    # One token holds the space and the answer's first letter, in the chat as a whole.
    tokenizer = letters(template=SPACED, merges=[("\u2581" if metaspace else " ", "y")], metaspace=metaspace)
    record = chat(("user", "q"), ("assistant", "yes"), ("user", "r"), ("assistant", "yy"))
    rows = make_rows(tokenizer, [record], max_length=256).rows
    assert [learnt(tokenizer, row).strip() for row in rows] == ["yes</s>", "yy</s>"]
    for row, n in zip(rows, (1, 3), strict=True):
        text = tokenizer.apply_chat_template(record.messages[: n + 1], tokenize=False)
        assert tokenizer.decode(row.ids) == text
        # What transformers gives a model to answer is what stands before the answer.
        options = {"add_generation_prompt": True, "return_dict": False}
        prompt = tokenizer.apply_chat_template(record.messages[:n], **options)
        assert row.ids[: len(prompt)].tolist() == prompt == prompt_ids(tokenizer, Chat(record.messages[:n]))
        assert row.weights.nonzero()[0].tolist() == list(range(len(prompt) - 1, len(row.ids) - 1))
        assert tokenizer(text, add_special_tokens=False)["input_ids"][: len(prompt)] != prompt


def test_a_chat_too_long_is_cut_and_left_out_where_no_answer_is_left():
    tokenizer = letters()
    records = [chat(("user", "q"), ("assistant", "abcd")), chat(("user", "a long one"), ("assistant", "x"))]
    rows, cut, dropped = make_rows(tokenizer, records, max_length=5)
    (row,) = rows
    assert (tokenizer.decode(row.ids), learnt(tokenizer, row)) == ("<s>q\nab", "abc")
    assert (cut, dropped) == (1, 1)


TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}{{ '\n' }}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tools_and_their_calls_are_trained_on_as_transformers_writes_them(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    messages = [
        {"role": "user", "content": "1 + 1?", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "add", "tool_call_id": "1"},
        {"role": "assistant", "content": "two"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "tools": [tool]}))
    tokenizer = letters(template=TOOLS)
    (row,) = make_rows(tokenizer, read_records(tmp_path / "a.jsonl", "instruction"), max_length=512).rows
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert learnt(tokenizer, row) == 'add {"x": 1}<|im_end|>\ntwo<|im_end|>\n'


def test_what_the_template_does_not_write_is_refused():
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    answer: Message = {"role": "assistant", "content": "a"}
    chats = [
        Chat(({"role": "user", "content": "q"}, answer | extra), f"f:{n}", tools)
        for n, (extra, tools) in enumerate(
            [
                ({"tool_calls": [call]}, ()),
                ({"reasoning_content": "so"}, ()),
                ({"name": "x"}, ()),
                ({}, (call,)),
                ({"tool_call_id": "1"}, ()),
            ]
        )
    ]
    for template in (CHATML, None):
        with pytest.raises(ValueError) as caught:
            make_rows(letters(template=template), chats, max_length=64)
        assert str(caught.value).splitlines()[1:-1] == [
            "  f:0  the chat template does not write 'tool_calls' of message 1",
            "  f:1  the chat template does not write 'reasoning_content' of message 1",
            "  f:2  the chat template does not write 'name' of message 1",
            "  f:3  the chat template does not write the tools",
        ]


def test_an_answer_of_weight_0_is_read_and_not_learned():
    tokenizer = letters(template=CHATML)
    turns = [{"role": role, "content": text} for role, text in [("user", "q"), ("assistant", "a1")] * 2]
    for answers, expected in [((0,), "a1<|im_end|>\n"), ((1,), "a1<|im_end|>\n"), ((0, 1), None)]:
        weighed = [turn | {"weight": 0} if n // 2 in answers and n % 2 else turn for n, turn in enumerate(turns)]
        rows = make_rows(tokenizer, [Chat(tuple(weighed))], max_length=256).rows
        assert [learnt(tokenizer, row) for row in rows] == ([] if expected is None else [expected])
        if expected:
            last = 3 if 0 in answers else 1
            text = tokenizer.apply_chat_template(turns[: last + 1], tokenize=False)
            assert tokenizer.decode(rows[0].ids) == text
            assert int(rows[0].weights.nonzero()[0][0]) == len(prompt_ids(tokenizer, Chat(tuple(turns[:last])))) - 1


def token_rows(lengths) -> list[Row]:
    """Rows whose every token is unlike all others."""
    starts = np.cumsum([1, *lengths[:-1]])
    return [
        Row(np.arange(s, s + n, dtype=np.int32), np.arange(s, s + n, dtype=np.int32) * 2, np.ones(n, np.float32))
        for s, n in zip(starts, lengths, strict=True)
    ]


@settings(max_examples=60)
@given(st.integers(2, 40).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), min_size=1))))
def test_packing_keeps_every_token_once_and_every_text_whole(case):
    most, lengths = case
    rows = token_rows(lengths)
    packed = pack(rows, most)
    texts = []
    for row in packed:
        assert len(row.ids) == len(row.targets) == len(row.weights) == len(row.segments) <= most
        numbers = np.unique(row.segments)
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        assert (np.diff(row.segments) >= 0).all()
        texts += [(row.ids[row.segments == n].tolist(), row.targets[row.segments == n].tolist()) for n in numbers]
    assert sorted(texts) == [(row.ids.tolist(), row.targets.tolist()) for row in rows]
    # Two rows that would go into one never stay apart.
    sizes = sorted(len(row.ids) for row in packed)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > most


def test_packed_batches_have_one_shape_and_a_mask_of_their_segments():
    packed = pack(token_rows([5, 9, 3, 20, 4, 4, 1]), 24)
    assert len(packed) == 2
    batches = list(training_batches(packed, batch_size=4, max_length=24, pad_id=0, seed=0))
    (batch,) = batches
    assert {value.shape for value in batch.values()} == {(4, 24)}
    assert (batch["attention_mask"] == (batch["segment_ids"] > 0)).all()
    assert batch["weights"].sum() == 46
    # The rows that fill up attend to one token, which weighs nothing.
    assert batch["attention_mask"].any(-1).all()
    assert ((batch["input_ids"] == 0) == (batch["weights"] == 0)).all()


def class_rows(lengths) -> list[Row]:
    one = np.ones((), np.float32)
    return [Row(np.full(size, n + 1, np.int32), np.array(n % 3, np.int32), one) for n, size in enumerate(lengths)]


LENGTHS = np.random.default_rng(0).integers(3, 60, 47).tolist()
OPTIONS = {"batch_size": 8, "max_length": 64, "pad_id": 0}


def contents(batch) -> list[tuple[int, ...]]:
    """(token, length, label) of every row of weight 1."""
    real = batch["weights"] == 1
    ids, mask, labels = (batch[name][real] for name in ("input_ids", "attention_mask", "labels"))
    return [(int(i[0]), int(m.sum()), int(label)) for i, m, label in zip(ids, mask, labels, strict=True)]


def expected(rows) -> list[tuple[int, ...]]:
    return [(int(row.ids[0]), len(row.ids), int(row.targets)) for row in rows]


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a) for a, b in zip(left, right, strict=True)
    )


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own():
    rows = class_rows(LENGTHS)
    for seed in (3, 2**32 - 1):
        epoch = training_batches(rows, **OPTIONS, seed=seed)
        batches = list(epoch.repeat(2))
        first, second = batches[: len(epoch)], batches[len(epoch) :]
        orders = [[item for batch in half for item in contents(batch)] for half in (first, second)]
        assert sorted(orders[0]) == sorted(orders[1]) == expected(rows)
        assert orders[0] != orders[1]
        assert same(list(training_batches(rows, **OPTIONS, seed=seed).repeat(2)), batches)
        other = list(training_batches(rows, **OPTIONS, seed=5))
        assert [contents(batch) for batch in other] != [contents(batch) for batch in first]


def test_batches_have_one_shape_a_bucket_and_no_row_is_padded_further():
    shapes = set()
    for batch in training_batches(class_rows(LENGTHS), **OPTIONS, seed=0):
        shapes.add(batch["input_ids"].shape)
        lengths = batch["attention_mask"][batch["weights"] == 1].sum(-1)
        assert {bucket(int(n), 64) for n in lengths} == {batch["input_ids"].shape[1]}
        assert batch["labels"].shape == batch["weights"].shape == (8,)
        assert {name: value.dtype.name for name, value in batch.items()} == {
            "input_ids": "int32",
            "attention_mask": "int32",
            "labels": "int32",
            "weights": "float32",
        }
    assert shapes == {(8, 16), (8, 32), (8, 64)}


def test_labels_of_tokens_have_the_shape_of_the_tokens():
    for batch in training_batches(token_rows(LENGTHS), **OPTIONS, seed=0):
        assert len({value.shape for value in batch.values()}) == 1
        assert (batch["weights"] == (batch["input_ids"] > 0)).all()
        assert (batch["labels"] == 2 * batch["input_ids"]).all()


@pytest.mark.parametrize("taken", [0, 1, 9, 12])
def test_training_goes_on_anywhere_in_an_epoch_from_the_iterators_state(taken):
    def batches():
        return iter(training_batches(class_rows(LENGTHS), **OPTIONS, seed=1).repeat(3).to_iter_dataset())

    undisturbed = batches()
    for _ in range(taken):
        next(undisturbed)
    state = json.loads(json.dumps(undisturbed.get_state()))
    resumed = batches()
    resumed.set_state(state)
    assert same(list(resumed), list(undisturbed))


def test_ordered_batches_hold_every_row_at_its_place():
    rows = class_rows(LENGTHS)
    found = {}
    for places, batch in ordered_batches(rows, **OPTIONS | {"pad_id": 99}):
        assert batch["input_ids"].shape[0] == 8
        assert int(batch["weights"].sum()) == len(places)
        assert batch["attention_mask"].any(-1).all()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 99).all()
        found |= dict(zip(places, contents(batch), strict=True))
    assert [found[n] for n in range(len(rows))] == expected(rows)


def test_nothing_to_train_on_is_an_error():
    assert make_rows(letters(), [], max_length=8).rows == []
    with pytest.raises(ValueError, match=r"data: there is nothing to train on\."):
        training_batches([], **OPTIONS, seed=0)


@pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data")
def test_real_verse_is_packed_with_little_room_left():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "stories260K/hf")
    records = read_records(DATA / "sonnets/shakespeare.txt", "causal_lm")
    rows = make_rows(tokenizer, records, max_length=256).rows
    packed = pack(rows, 256)
    tokens = sum(len(row.ids) for row in rows)
    assert tokens == sum(len(row.ids) for row in packed)
    assert tokens / (len(packed) * 256) > 0.95
    assert int(rows[0].ids[0]) == tokenizer.bos_token_id
    assert sum(int((row.targets[row.weights == 1] == tokenizer.eos_token_id).sum()) for row in rows) == len(records)
