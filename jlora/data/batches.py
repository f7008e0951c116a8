"""Records to tokenised rows, rows to batches of few static shapes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import grain
import numpy as np
from jaxtyping import Float, Int

from jlora.data.readers import Chat, Labelled, Message, Record, Tagged, Text, is_learned, shown
from jlora.data.tags import entities
from jlora.errors import JloraValueError, count
from jlora.hf.chat import ChatError, render_chat

SHORTEST_BUCKET = 16
USER = "user"
# Keys of a message that some templates leave out; those of a tool's answer only link it to its call.
UNCOMMON_KEYS = frozenset({"tool_calls", "reasoning_content", "name"})
TOOL = "tool"


class Row(NamedTuple):
    """What the model reads at once, and what it should say.

    Attributes:
        ids: tokens.
        targets: the class of the text, or one of each token: its tag, or the token that follows.
        weights: 1 where a target counts, 0 where it doesn't, or the weight of a class; of the targets' shape.
        segments: of a packed row, which text a token is of, from 1.
        beyond: of a tagged sentence, the classes of the words that `max_length` cut off.
    """

    ids: Int[np.ndarray, " time"]
    targets: Int[np.ndarray, "*time"]
    weights: Float[np.ndarray, "*time"]
    segments: Int[np.ndarray, " time"] | None = None
    beyond: Int[np.ndarray, " words"] | None = None


class Rows(NamedTuple):
    """The rows of some records.

    Attributes:
        rows: in the records' order. Texts and chats may make several, or none where there is nothing to learn.
        cut: what `max_length` cut off: words of tagged sentences, else the number of texts or chats that lost tokens.
        dropped: what `max_length` left nothing to learn of: the number of chats whose prompt alone fills it, or of
            entities that reach beyond it.
    """

    rows: list[Row]
    cut: int
    dropped: int = 0


class Batch(TypedDict):
    """Arrays of one static shape; what only fills it up has weight 0.

    Labels and weights are (rows,) for classes of texts, (rows, time) otherwise.
    """

    input_ids: Int[np.ndarray, "rows time"]
    attention_mask: Int[np.ndarray, "rows time"]
    labels: Int[np.ndarray, "rows *time"]
    weights: Float[np.ndarray, "rows *time"]
    segment_ids: NotRequired[Int[np.ndarray, "rows time"]]


def make_rows(tokenizer: Any, records: Sequence[Record], *, max_length: int, labels: Sequence[str] = ()) -> Rows:
    """Tokenises records of one kind.

    - A labelled text is cut to `max_length`; its target is the label's place in `labels`.
    - A tagged sentence is cut so too. A word's tag stands on its first piece, other pieces and special tokens weigh
      nothing: the tokens of weight 1 are the sentence's first words, in order. The classes of the words cut off are
      in `beyond`, so that their entities count as missed.
    - A text begins as the tokenizer begins one and ends in its end-of-sequence token, if it has one. Windows of
      `max_length` follow each other; a token's target is the next one of the text, in the next window if need be.
    - A chat is written by the tokenizer's template, which gets its tools and the calls of them, and the tokens of its
      answers weigh 1, but those of messages of weight 0. Where a template writes an answer otherwise once the chat
      goes on (without its thoughts, say), the answer gets a separate row, as it was last. Without a template it is a
      question, a line break, its answer and the end-of-sequence token. No token reaches from a prompt into its answer:
      a prompt's tokens are those that generation begins with.

    Args:
        tokenizer: of transformers.
        records: as `read_records` gives them.
        max_length: tokens of a row.
        labels: names of the classes.

    Raises:
        ValueError: a tokenizer that can't tell words or end an answer; a template that can't write a chat, or whose
            prompts aren't how it begins an answer. All records that suffer from it are listed.
    """
    if not records:
        return Rows([], 0)
    first = records[0]
    known: Any = records
    if isinstance(first, Labelled):
        return _class_rows(tokenizer, known, labels, max_length)
    if isinstance(first, Tagged):
        return _tag_rows(tokenizer, known, labels, max_length)
    return (_text_rows if isinstance(first, Text) else _chat_rows)(tokenizer, known, max_length)


def balance_classes(rows: Sequence[Row]) -> list[Row]:
    """Rows of texts whose weights give every class the same weight in all: rows / (classes * rows of the class).

    Source: scikit-learn, `class_weight="balanced"`.
    """
    classes = np.array([row.targets for row in rows])
    _, place, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    weights = (len(rows) / (len(sizes) * sizes)).astype(np.float32)
    return [row._replace(weights=row.weights * weights[n]) for row, n in zip(rows, place, strict=True)]


def check_targets(who: str, splits: Mapping[str, Sequence[Row]], max_length: int) -> None:
    """Checks that every split has a target that counts: without one its mean loss is undefined.

    Args:
        who: the command that reads the splits.
        splits: the rows of every split, by its name.
        max_length: the tokens of a row, for the error.

    Raises:
        ValueError: splits without a target; they are listed.
    """
    empty = [name for name, rows in splits.items() if not any(row.weights.any() for row in rows)]
    if empty:
        problem = f"{count(len(empty), 'split')} without a token to learn or to measure."
        offenders = [
            f"{name}  max_length = {max_length} cuts off every answer, or the texts are empty" for name in empty
        ]
        raise JloraValueError(who, problem, offenders, "raise data.max_length, or use other data.")


def tokenise(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of every text with the tokenizer's special tokens, and the places of the texts cut to `max_length`."""
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    long = [n for n, tokens in enumerate(ids) if len(tokens) > max_length]
    if long:
        cut = tokenizer([texts[n] for n in long], truncation=True, max_length=max_length)["input_ids"]
        for n, tokens in zip(long, cut, strict=True):
            ids[n] = tokens
    return ids, long


def prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """The tokens that the answer to a chat follows, as `make_rows` writes them.

    Raises:
        ValueError: the template can't write the chat, or there is none and the chat is not a single question.
    """
    try:
        _check_written(tokenizer, chat)
        return _encode(tokenizer, [_prompt(tokenizer, chat.messages, chat.tools)])[0]
    except ChatError as error:
        raise _no_chat([f"{chat.at}  {error}" if chat.at else str(error)]) from None


def _class_rows(tokenizer: Any, records: Sequence[Labelled], labels: Sequence[str], max_length: int) -> Rows:
    classes = {label: n for n, label in enumerate(labels)}
    ids, cut = tokenise(tokenizer, [record.text for record in records], max_length)
    one = np.ones((), np.float32)
    rows = [
        Row(np.array(tokens, np.int32), np.array(classes[record.label], np.int32), one)
        for tokens, record in zip(ids, records, strict=True)
    ]
    return Rows(rows, len(cut))


def _tag_rows(tokenizer: Any, records: Sequence[Tagged], labels: Sequence[str], max_length: int) -> Rows:
    classes = {label: n for n, label in enumerate(labels)}
    rows, cut, dropped = [], 0, 0
    for record, (ids, words) in zip(records, _pieces(tokenizer, records, max_length), strict=True):
        # -1 is no word: special tokens, and before the first one.
        numbers = np.array([-1 if word is None else word for word in words])
        first = (numbers >= 0) & (numbers != np.concatenate([[-1], numbers[:-1]]))
        tags = np.array([classes[tag] for tag in record.tags], np.int32)
        targets = np.where(first, tags[numbers], 0).astype(np.int32)
        read = int(first.sum())
        rows.append(Row(np.array(ids, np.int32), targets, first.astype(np.float32), beyond=tags[read:]))
        cut += len(record.tokens) - read
        dropped += sum(last >= read for _, _, last in entities(record.tags))
    return Rows(rows, cut, dropped)


def _pieces(tokenizer: Any, records: Sequence[Tagged], max_length: int) -> list[tuple[list[int], list[int | None]]]:
    """The pieces of every sentence, and the word that each is of."""
    if not tokenizer.is_fast:
        problem = f"{type(tokenizer).__name__} can't tell which word a piece is of."
        raise JloraValueError("data", problem, [], "take a model with a tokenizer.json.")
    sentences = [list(record.tokens) for record in records]
    encoded = tokenizer(sentences, is_split_into_words=True, verbose=False)
    found = [(ids, encoded.word_ids(n)) for n, ids in enumerate(encoded["input_ids"])]
    again, lost = [], []
    for n, ((ids, words), sentence) in enumerate(zip(found, sentences, strict=True)):
        # A tokenizer may see nothing in a word (control characters): then it is unknown, or tags would shift.
        unseen = set(range(len(sentence))).difference(word for word in words if word is not None)
        lost += [f"{records[n].at}  {sentence[word]!r}" for word in sorted(unseen)]
        for word in unseen:
            sentence[word] = tokenizer.unk_token
        if unseen or len(ids) > max_length:
            again.append(n)
    if lost and tokenizer.unk_token is None:
        problem = f"the tokenizer sees nothing in {count(len(lost), 'word')}, and has no token for unknown ones."
        raise JloraValueError("data", problem, shown(lost), "delete them.")
    if again:
        options = {"is_split_into_words": True, "truncation": True, "max_length": max_length}
        encoded = tokenizer([sentences[n] for n in again], **options)
        for place, n in enumerate(again):
            found[n] = encoded["input_ids"][place], encoded.word_ids(place)
    return found


def _text_rows(tokenizer: Any, records: Sequence[Text], max_length: int) -> Rows:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for tokens in _begun(tokenizer, [record.text for record in records]):
        ids = np.array([*tokens, *end], np.int32)
        # A window of the last token alone would have nothing to say.
        for start in range(0, len(ids) - 1, max_length):
            rows.append(_next_tokens(ids[start:], np.ones(len(ids) - start - 1, np.float32), max_length))
    return Rows(rows, 0)


def _next_tokens(ids: Int[np.ndarray, " all"], weights: Float[np.ndarray, " all-1"], max_length: int) -> Row:
    """The first `max_length` tokens, each with the one that follows as its target."""
    follow = np.append(ids[1:], 0).astype(np.int32)
    return Row(ids[:max_length], follow[:max_length], np.append(weights, 0).astype(np.float32)[:max_length])


def _begun(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Texts with what the tokenizer puts before them, without the end it may put behind."""
    found = tokenizer(list(texts), verbose=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in found]


def _chat_rows(tokenizer: Any, chats: Sequence[Chat], max_length: int) -> Rows:
    turns: list[tuple[int, str, str]] = []
    wrong = []
    for n, chat in enumerate(chats):
        try:
            turns += [(n, *texts) for texts in _turns(tokenizer, chat)]
        except ChatError as error:
            wrong.append(f"{chat.at}  {error}")
    prompts = _encode(tokenizer, [prompt for _, prompt, _ in turns])
    wholes = _encode(tokenizer, [whole for *_, whole in turns])
    end = [] if tokenizer.chat_template else [tokenizer.eos_token_id]
    found: list[tuple[int, list[int], Any]] = []
    # From the last answer on, since the chat up to it most often holds those before.
    for (n, *texts), prompt, whole in reversed(list(zip(turns, prompts, wholes, strict=True))):
        if whole[: len(prompt)] != prompt:
            if not texts[1].startswith(texts[0]):
                wrong.append(f"{chats[n].at}  the template does not begin an answer as its prompt ends")
                continue
            whole = prompt + _continue(tokenizer, texts[1][len(texts[0]) :])
        whole = whole + end
        if not found or found[-1][0] != n or found[-1][1][: len(whole)] != whole:
            found.append((n, whole, np.zeros(len(whole) - 1, np.float32)))
        found[-1][2][max(len(prompt) - 1, 0) : len(whole) - 1] = 1
    if wrong:
        raise _no_chat(wrong)
    made = [
        (n, len(ids) > max_length, _next_tokens(np.array(ids, np.int32), weights, max_length))
        for n, ids, weights in reversed(found)
    ]
    learned = {n for n, _, row in made if row.weights.any()}
    long = {n for n, is_long, _ in made if is_long}
    return Rows([row for *_, row in made if row.weights.any()], len(long & learned), len(long - learned))


def _no_chat(wrong: Sequence[str]) -> ValueError:
    problem = f"{count(len(wrong), 'chat')} can't be written for this tokenizer."
    fix = "change the chats, or take a tokenizer whose template can; without one, question and answer will do."
    return JloraValueError("data", problem, shown(wrong), fix)


def _turns(tokenizer: Any, chat: Chat) -> list[tuple[str, str]]:
    """The chat before and after every answer that is learned."""
    messages, tools = chat.messages, chat.tools
    _check_written(tokenizer, chat)
    answers = [n for n, message in enumerate(messages) if is_learned(message)]
    return [(_prompt(tokenizer, messages[:n], tools), _written(tokenizer, messages[: n + 1], tools)) for n in answers]


def _check_written(tokenizer: Any, chat: Chat) -> None:
    """Checks that the template writes the parts of a chat that not every template knows.

    Raises:
        ChatError: a part that leaves no trace in the text.
    """
    for n, message in enumerate(chat.messages):
        for key in sorted(UNCOMMON_KEYS.intersection(message)) if message["role"] != TOOL else ():
            without = {name: value for name, value in message.items() if name != key}
            before: Any = chat.messages[:n]
            if not _changes(tokenizer, ((*before, message), chat.tools), ((*before, without), chat.tools)):
                raise ChatError(f"the chat template does not write {key!r} of message {n}")
    if chat.tools and not _changes(tokenizer, (chat.messages, chat.tools), (chat.messages, ())):
        raise ChatError("the chat template does not write the tools")


def _changes(tokenizer: Any, chat: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    """Whether two chats, each with its tools, are written differently."""
    if not tokenizer.chat_template:
        return False
    text = _render(tokenizer, *chat, prompt=False)
    try:
        return text != _render(tokenizer, *other, prompt=False)
    except ChatError:
        # The template refuses the other one, so it reads what that lacks.
        return True


def _prompt(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
    """A chat up to where the next answer begins."""
    if tokenizer.chat_template:
        return _render(tokenizer, messages, tools, prompt=True)
    if [message["role"] for message in messages] != [USER]:
        raise ChatError("the tokenizer has no chat template, and this is no single question and answer")
    return messages[0]["content"] + "\n"


def _written(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> str:
    """A chat up to the end of an answer; without a template the last token is still to come."""
    if tokenizer.chat_template:
        return _render(tokenizer, messages, tools, prompt=False)
    if tokenizer.eos_token_id is None:
        raise ChatError("the tokenizer has neither a chat template nor a token that ends an answer")
    return _prompt(tokenizer, messages[:-1]) + messages[-1]["content"]


def _render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, prompt: bool) -> str:
    given = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    return render_chat(tokenizer, given, tools=tools or None, add_generation_prompt=prompt)


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of chats; a template writes its special tokens itself."""
    if not texts:
        return []
    if tokenizer.chat_template:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return _begun(tokenizer, texts)


def _continue(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that follows others, where no token may reach over the boundary.

    A prompt that ends in a space is such a case: one token may hold the space and the answer's first letters. What is
    generated follows the prompt's tokens, so an answer is trained as it follows them.
    """
    # Behind a line break a tokenizer adds no space, as some do at the beginning of a text.
    before, both = tokenizer(["\n", "\n" + text], add_special_tokens=False, verbose=False)["input_ids"]
    if before and both[: len(before)] == before:
        return both[len(before) :]
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def pack(rows: Sequence[Row], max_length: int) -> list[Row]:
    """Puts rows of texts or chats together into few of at most `max_length` tokens, each as a separate segment.

    The longest first, each goes where it leaves the least room (best-fit decreasing).
    """
    packed: list[list[int]] = []
    room: dict[int, list[int]] = {}
    # Bit n is set where a packed row has room for n tokens more: the least that is enough is one shift away.
    rooms = 0
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n].ids)):
        size = len(rows[n].ids)
        enough = rooms >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            place = room[left].pop()
            rooms ^= 0 if room[left] else 1 << left
        else:
            left, place = max_length, len(packed)
            packed.append([])
        packed[place].append(n)
        if left > size:
            room.setdefault(left - size, []).append(place)
            rooms |= 1 << (left - size)
    return [_together([rows[n] for n in sorted(places)]) for places in packed]


def _together(rows: Sequence[Row]) -> Row:
    ids, targets, weights = (np.concatenate(parts) for parts in zip(*(row[:3] for row in rows), strict=True))
    segments = np.repeat(np.arange(1, len(rows) + 1, dtype=np.int32), [len(row.ids) for row in rows])
    return Row(ids, targets, weights, segments)


def bucket(tokens: int, max_length: int) -> int:
    """The length a row is padded to: powers of two, so few shapes are compiled.

    >>> [bucket(n, 100) for n in (3, 16, 17, 70)]
    [16, 16, 32, 100]
    """
    length = SHORTEST_BUCKET
    while length < tokens:
        length *= 2
    return min(length, max_length)


def buckets(rows: Sequence[Row], max_length: int) -> dict[int, list[int]]:
    """The places of all rows by padded length, shortest first; packed rows have one length."""
    found: dict[int, list[int]] = {}
    for n, row in enumerate(rows):
        length = bucket(len(row.ids), max_length) if row.segments is None else max_length
        found.setdefault(length, []).append(n)
    return dict(sorted(found.items()))


def pad(rows: Sequence[Row], *, size: int, length: int, pad_id: int) -> Batch:
    """A batch of `size` rows and `length` tokens; at least one row is given, those added have weight 0."""
    tokens = np.ndim(rows[0].targets) > 0
    shape = (size, length) if tokens else (size,)
    segments = np.zeros((size, length), np.int32)
    batch = Batch(
        input_ids=np.full((size, length), pad_id, np.int32),
        attention_mask=segments,
        labels=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
    )
    for n, row in enumerate(rows):
        time = slice(len(row.ids))
        at = (n, time) if tokens else n
        batch["input_ids"][n, time] = row.ids
        segments[n, time] = 1 if row.segments is None else row.segments
        batch["labels"][at] = row.targets
        batch["weights"][at] = row.weights
    # A row without a single token to attend to is a softmax over nothing.
    segments[len(rows) :, 0] = 1
    if rows[0].segments is not None:
        batch["segment_ids"], batch["attention_mask"] = segments, np.minimum(segments, 1)
    return batch


def training_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int, pad_id: int, seed: int
) -> grain.MapDataset[Batch]:
    """One epoch; `.repeat(n)` gives n of them, each in a different order that the seed fixes.

    Rows of one padded length are shuffled and batched, then the batches of all lengths are shuffled. Any batch can be
    asked for by its place, so `iter(epoch.repeat(n).to_iter_dataset())` has a state (`get_state`, `set_state`) that
    goes on anywhere in an epoch.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise JloraValueError("data", "there is nothing to train on.", [], "take longer texts or max_length.")
    parts = []
    for length, places in buckets(rows, max_length).items():
        part: Any = grain.MapDataset.source([rows[n] for n in places]).seed(seed + length).shuffle()
        parts.append(part.batch(batch_size, drop_remainder=False, batch_fn=_Fill(batch_size, length, pad_id)))
    return grain.MapDataset.concatenate(parts).seed(seed).shuffle()


class _Fill(NamedTuple):
    """`pad` with all but the rows given; a tuple, so grain can send it to another process."""

    size: int
    length: int
    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> Batch:
        return pad(rows, size=self.size, length=self.length, pad_id=self.pad_id)


def ordered_batches(
    rows: Sequence[Row], *, batch_size: int, max_length: int, pad_id: int
) -> Iterator[tuple[list[int], Batch]]:
    """Every row once, with the places they had; the last batch of a length is filled up."""
    for length, places in buckets(rows, max_length).items():
        for start in range(0, len(places), batch_size):
            chosen = places[start : start + batch_size]
            yield chosen, pad([rows[n] for n in chosen], size=batch_size, length=length, pad_id=pad_id)
