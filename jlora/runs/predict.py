"""Answers from a saved run."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from jlora.data.batches import Row, make_rows, prompt_ids, tokenise
from jlora.data.readers import Chat, ColumnError, Message, Tagged, read_prompt, shown
from jlora.data.tags import entities
from jlora.errors import JloraOSError, JloraValueError, count, quoted
from jlora.hf.chat import stop_tokens
from jlora.models.generate import generate
from jlora.runs.config import Data, Sampling, fields_of
from jlora.runs.folder import Run
from jlora.tasks.tasks import Entities, Language, log_softmax, pad_token
from jlora.tree.paths import Tree
from jlora.tree.wrapping import merge

Question = str | Chat


def check_sampling(run: Run, sampling: Sampling) -> None:
    """Checks that sampling settings are given only for a run that generates text.

    Raises:
        ValueError: the run classifies.
    """
    default = Sampling()
    given = [item.name for item in fields(sampling) if getattr(sampling, item.name) != getattr(default, item.name)]
    if given and not isinstance(run.task, Language):
        offenders = [f"--{name.replace('_', '-')} is for language models" for name in given]
        problem = f"the run's task is {run.config.data.task}: it generates no text."
        raise JloraValueError("predict", problem, offenders, "leave the options out.")


def read_questions(source: Path, data: Data) -> list[Question]:
    """The questions of a file of JSON lines: strings, or objects with the fields that the run was trained on.

    Raises:
        OSError: the file can't be read.
        ValueError: it is not UTF-8, or lines can't be used; they are listed.
    """
    fix = 'write one question per line, as in "where is my parcel?" or {"text": "where is my parcel?"}.'
    try:
        lines = source.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        problem = f"{source} is not UTF-8: byte {error.start}."
        raise JloraValueError("predict", problem, [], "convert it, as with iconv -t utf-8.") from None
    except OSError as error:
        problem = f"{source} can't be read: {error.strerror}."
        raise JloraOSError("predict", problem, [], "pass a file that you may read.") from None
    found: list[Question] = []
    wrong = []
    for n, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(question_of(json.loads(line), data, f"{source}:{n}"))
            except ValueError as error:
                wrong.append(f"{source}:{n}  {error}")
            except RecursionError:
                wrong.append(f"{source}:{n}  JSON that is nested too deeply")
    if wrong:
        problem = f"{count(len(wrong), 'line')} of {source} can't be used."
        raise JloraValueError("predict", problem, shown(wrong), fix)
    if not found:
        raise JloraValueError("predict", f"{source} holds no question.", [], fix)
    return found


def question_of(record: Any, data: Data, at: str = "") -> Question:
    """Returns the question of a line, which is a string or an object.

    Raises:
        ValueError: the line has no question.
    """
    if not isinstance(record, dict):
        return _text_of("the line", record)
    if data.task == "instruction":
        return _chat_question(record, data, at)
    names = (data.tokens, "text") if data.task == "token_classification" else (data.text,)
    names = (*dict.fromkeys((*names, "question")),)
    name = next((name for name in names if name in record), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(map(repr, names))}, but {quoted(record)}")
    value = record[name]
    if data.task == "token_classification" and isinstance(value, list):
        return " ".join(_text_of(f"{name}[{n}]", word) for n, word in enumerate(value))
    return _text_of(name, value)


def _chat_question(record: dict[str, Any], data: Data, at: str) -> Question:
    """The chat of an object; a single question is its text alone."""
    try:
        chat = read_prompt(record, fields_of(data), data.format, at)
    except ColumnError as error:
        # A file of questions need not have the format that the run was trained on.
        try:
            chat = read_prompt(record, {}, "auto", at)
        except ColumnError:
            raise error from None
    first = chat.messages[0]
    is_text = len(chat.messages) == 1 and not chat.tools and first == {"role": "user", "content": first.get("content")}
    return first["content"] if is_text else chat


def _text_of(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is {json.dumps(value)[:80]}, expected a text")
    return value


def predict(
    run: Run,
    questions: Sequence[Question],
    *,
    params: Tree | None = None,
    top: int = 1,
    sampling: Sampling | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers questions with a run; the answers are computed as they are read.

    Args:
        run: what `jlora.load_run` returns.
        questions: the texts; an instruction run also continues a `Chat`.
        params: the run's merged parameters; None to merge them here.
        top: number of classes to return for each text, most probable first.
        sampling: how a language model generates; None takes the most probable token each time.

    Returns:
        For each question a dict of "question" and "entries" (sequence classification: dicts of "label", "probability"
        and, if the run has answers, "answer"), "entities" (token classification: dicts of "type" and "text") or
        "answer" (language models), with a "note" if `max_length` cut the text. Values are those of JSON.

    Raises:
        ValueError: the sampling settings were given for a run that generates no text, or a token is not in the
            vocabulary.
    """
    sampling = Sampling() if sampling is None else sampling
    check_sampling(run, sampling)
    return answer_questions(run, merge(run.params) if params is None else params, questions, top, sampling)


def answer_questions(
    run: Run, params: Tree, questions: Sequence[Question], top: int, sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Yields the answer to every question, computed with merged parameters."""
    if isinstance(run.task, Language):
        results: Iterable[Any] = ({"answer": text} for text in continuations(run, params, questions, sampling))
    elif isinstance(run.task, Entities):
        results = (
            {"entities": [{"type": kind, "text": words} for kind, words in sentence.entities]}
            | truncation(run, count(sentence.untagged, "word is", "words are") + " not tagged", sentence.untagged)
            for sentence in tagged(run, params, [str(question) for question in questions])
        )
    else:
        chances, cut = probabilities(run, params, [str(question) for question in questions])
        results = (
            {"entries": ranked(chance, run, top)} | truncation(run, "the rest of the text is not read", n in cut)
            for n, chance in enumerate(chances)
        )
    for question, result in zip(questions, results, strict=True):
        yield {"question": question if isinstance(question, str) else list(question.messages)} | result


def truncation(run: Run, what: str, happened: object) -> dict[str, str]:
    """The note of an answer to a text that `max_length` has cut, as JSON keeps it; empty for a text read whole."""
    return {"note": f"{what}, beyond data.max_length = {run.config.data.max_length} tokens"} if happened else {}


def probabilities(
    run: Run, params: Tree, questions: Sequence[str]
) -> tuple[Float[np.ndarray, "texts labels"], list[int]]:
    """The probability of every class for every text, and the places of the texts that were not read whole."""
    ids, cut = tokenise(run.task.loaded.tokenizer, questions, run.config.data.max_length)
    one = np.ones((), np.float32)
    rows = [Row(np.array(tokens, np.int32), np.zeros((), np.int32), one) for tokens in ids]
    run.task.check_vocabulary("predict", {"questions": rows})
    return np.exp(log_softmax(run.task.score(params, rows, merged=True).outputs)), cut


class Sentence(NamedTuple):
    """The entities of a sentence with their words, and how many words beyond `max_length` have no tag."""

    entities: list[tuple[str, str]]
    untagged: int


def tagged(run: Run, params: Tree, questions: Sequence[str]) -> list[Sentence]:
    """The entities of every sentence."""
    words = [tuple(question.split()) for question in questions]
    labels = run.task.labels
    records = [Tagged(tokens, (labels[0],) * len(tokens)) for tokens in words]
    rows = make_rows(run.task.loaded.tokenizer, records, max_length=run.config.data.max_length, labels=labels).rows
    run.task.check_vocabulary("predict", {"questions": rows})
    tags = run.task.score(params, rows, merged=True).outputs
    found = [
        [(kind, " ".join(tokens[first : last + 1])) for kind, first, last in entities(predicted)]
        for tokens, predicted in zip(words, tags, strict=True)
    ]
    beyond = [0 if row.beyond is None else len(row.beyond) for row in rows]
    return [Sentence(*pair) for pair in zip(found, beyond, strict=True)]


def continuations(run: Run, params: Tree, questions: Sequence[Question], sampling: Sampling) -> Iterator[str]:
    """Generates a language model's continuations or answers, batch by batch."""
    loaded, chat = run.task.loaded, run.config.data.task == "instruction"
    prompts = [prompt_of(loaded.tokenizer, question, chat) for question in questions]
    stops, size = stop_tokens(loaded, chat=chat), run.config.optimisation.batch_size
    for start in range(0, len(prompts), size):
        new = generate(
            loaded.model,
            params,
            prompts[start : start + size],
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stop_tokens=stops,
            pad_token=pad_token(loaded),
            key=jax.random.fold_in(jax.random.key(sampling.seed), start),
        )
        for ids in np.asarray(new).tolist():
            ended = list(itertools.takewhile(lambda token: token not in stops, ids))
            yield loaded.tokenizer.decode(ended, skip_special_tokens=True)


def prompt_of(tokenizer: Any, question: Question, chat: bool) -> list[int]:
    """The token ids of a prompt, or of a text to continue."""
    if chat:
        if isinstance(question, str):
            question = Chat((Message(role="user", content=question),))
        return prompt_ids(tokenizer, question)
    ids = list(tokenizer(question)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def ranked(chances: Float[np.ndarray, " labels"], run: Run, top: int) -> list[dict[str, Any]]:
    """The best classes, best first."""
    best = np.argsort(-chances, kind="stable")[:top]
    entries = [{"label": run.task.labels[n], "probability": round(float(chances[n]), 6)} for n in best]
    return [entry | ({"answer": run.answers[entry["label"]]} if run.answers else {}) for entry in entries]


def format_answer(prediction: Mapping[str, Any]) -> str:
    """Formats a prediction as lines of text: the question, and its answer, entities or best classes."""
    question = prediction["question"]
    lines = [question if isinstance(question, str) else question[-1]["content"]]
    lines += [f"  {prediction['answer'].strip()}"] if "answer" in prediction else []
    lines += [f"  {entity['type']}: {entity['text']}" for entity in prediction.get("entities", [])]
    for entry in prediction.get("entries", []):
        lines.append(f"  {entry['probability']:.3f}  {entry['label']}")
        if "answer" in entry:
            lines.append(f"         {entry['answer']}")
    lines += [f"  ({prediction['note']})"] if "note" in prediction else []
    return "\n".join(lines)
