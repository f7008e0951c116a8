"""`jlora predict`: answers from a saved run."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jlora.core.errors import complain
from jlora.core.paths import Tree
from jlora.core.tree import merge
from jlora.interop.chat import stop_tokens
from jlora.recipes.batches import Row, make_rows, prompt_ids, tokenise
from jlora.recipes.generate import generate
from jlora.recipes.metrics import entities
from jlora.recipes.readers import Tagged
from jlora.recipes.runs import Run, load_run
from jlora.recipes.tasks import Entities, Language, log_softmax, pad_token

NEW_TOKENS = 256


def predict(folder: Path, questions: Sequence[str], *, top: int, as_json: bool, model: str | None) -> None:
    """Prints what a run says to every question.

    Args:
        folder: what `jlora train` wrote.
        questions: what to ask; empty for the lines of the standard input.
        top: classes to show for each.
        as_json: print one JSON object a question.
        model: where the base model is, if not where it was.

    Raises:
        ValueError: no question, a blank one, `top` out of range, a run that is damaged.
        FileNotFoundError: no run in `folder`.
    """
    asked = list(questions) or [line.strip() for line in sys.stdin if line.strip()]
    wrong = [] if asked else ["no question was given"]
    wrong += [f"question {n} is blank" for n, text in enumerate(asked, 1) if not text.strip()]
    wrong += [f"--top {top}  expected: a whole number from 1"] if top < 1 else []
    if wrong:
        fix = 'ask as in: jlora predict FOLDER "where is my parcel?" --top 3.'
        raise ValueError(complain("predict", "nothing can be answered.", wrong, fix))
    run = load_run(folder, model=model)
    # Folded into the base, the adapter costs nothing.
    params = merge(run.params)
    for text in answers(run, params, asked, top=top, as_json=as_json):
        print(text)


def answers(run: Run, params: Tree, questions: Sequence[str], *, top: int = 1, as_json: bool = False) -> Iterator[str]:
    """What a run says to every question, as text or as a line of JSON.

    Args:
        run: the run.
        params: its merged parameters.
        questions: what is asked.
        top: classes to show for each.
        as_json: one JSON object a question.
    """
    if isinstance(run.task, Language):
        found: Any = continuations(run, params, questions)
        texts = (f"{question}\n  {answer.strip()}" for question, answer in zip(questions, found, strict=True))
        objects = [{"question": question, "answer": answer} for question, answer in zip(questions, found, strict=True)]
    elif isinstance(run.task, Entities):
        found = tagged(run, params, questions)
        texts = ("\n".join([question, *(f"  {kind}: {words}" for kind, words in entity)]) for question, entity in found)
        objects = [
            {"question": question, "entities": [{"type": kind, "text": words} for kind, words in entity]}
            for question, entity in found
        ]
    else:
        chances = probabilities(run, params, questions)
        texts = (answer_text(question, chance, run, top) for question, chance in zip(questions, chances, strict=True))
        objects = [
            {"question": question, "entries": ranked(chance, run, top)}
            for question, chance in zip(questions, chances, strict=True)
        ]
    yield from (json.dumps(item, ensure_ascii=False) for item in objects) if as_json else texts


def probabilities(run: Run, params: Tree, questions: Sequence[str]) -> Float[np.ndarray, "texts labels"]:
    """The probability of every class for every text."""
    ids, _ = tokenise(run.task.loaded.tokenizer, questions, run.config.data.max_length)
    one = np.ones((), np.float32)
    rows = [Row(np.array(tokens, np.int32), np.zeros((), np.int32), one) for tokens in ids]
    return np.exp(log_softmax(run.task.score(params, rows, merged=True).outputs))


def tagged(run: Run, params: Tree, questions: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The entities of every sentence, with their words."""
    words = [tuple(question.split()) for question in questions]
    labels = run.task.labels
    records = [Tagged(tokens, (labels[0],) * len(tokens)) for tokens in words]
    rows = make_rows(run.task.loaded.tokenizer, records, max_length=run.config.data.max_length, labels=labels).rows
    tags = run.task.score(params, rows, merged=True).outputs
    return [
        (question, [(kind, " ".join(tokens[first : last + 1])) for kind, first, last in entities(said)])
        for question, tokens, said in zip(questions, words, tags, strict=True)
    ]


def continuations(run: Run, params: Tree, questions: Sequence[str]) -> list[str]:
    """What a language model goes on with, or answers."""
    loaded, chat = run.task.loaded, run.config.data.task == "instruction"
    if chat:
        prompts = [prompt_ids(loaded.tokenizer, [{"role": "user", "content": question}]) for question in questions]
    else:
        end = loaded.tokenizer.eos_token_id
        encoded = loaded.tokenizer(list(questions))["input_ids"]
        prompts = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in encoded]
    stops = stop_tokens(loaded, chat=chat)
    new = generate(
        loaded.model,
        params,
        prompts,
        max_new_tokens=NEW_TOKENS,
        stop_tokens=stops,
        pad_token=pad_token(loaded.tokenizer),
    )
    ended = [list(itertools.takewhile(lambda token: token not in stops, ids)) for ids in np.asarray(new).tolist()]
    return [loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in ended]


def ranked(chances: Float[np.ndarray, " labels"], run: Run, top: int) -> list[dict[str, Any]]:
    """The best classes, best first."""
    best = np.argsort(-chances, kind="stable")[:top]
    entries = [{"label": run.task.labels[n], "probability": round(float(chances[n]), 6)} for n in best]
    return [entry | ({"answer": run.answers[entry["label"]]} if run.answers else {}) for entry in entries]


def answer_text(question: str, chances: Float[np.ndarray, " labels"], run: Run, top: int = 1) -> str:
    """A question and its best classes as lines of text."""
    lines = [question]
    for entry in ranked(chances, run, top):
        lines.append(f"  {entry['probability']:.3f}  {entry['label']}")
        if "answer" in entry:
            lines.append(f"         {entry['answer']}")
    return "\n".join(lines)
