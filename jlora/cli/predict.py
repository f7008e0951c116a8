"""`jlora predict`: answers from a saved run."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jlora.core.errors import complain
from jlora.core.tree import merge
from jlora.recipes.classify import Run, forward_of, load_run, probabilities


def predict(folder: Path, questions: Sequence[str], *, top: int, as_json: bool, model: str | None) -> None:
    """Prints the best entries for every question.

    Args:
        folder: what `jlora train` wrote.
        questions: what to ask; empty for the lines of the standard input.
        top: entries to show for each.
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
    plain = forward_of(run.loaded)[1]
    # Folded into the base, the adapter costs nothing; a batch no larger than needed saves the rest.
    size = min(len(asked), run.config.optimisation.batch_size)
    chances = probabilities(run, plain, merge(run.params), asked, batch_size=size)
    for question, chance in zip(asked, chances, strict=True):
        if as_json:
            entries = ranked(chance, run, top)
            print(json.dumps({"question": question, "entries": entries}, ensure_ascii=False))
        else:
            print(answer_text(question, chance, run, top))


def ranked(chances: Float[np.ndarray, " labels"], run: Run, top: int) -> list[dict[str, Any]]:
    """The best entries, best first."""
    best = np.argsort(-chances, kind="stable")[:top]
    entries = [{"label": run.labels[n], "probability": round(float(chances[n]), 6)} for n in best]
    return [entry | ({"answer": run.answers[entry["label"]]} if run.answers else {}) for entry in entries]


def answer_text(question: str, chances: Float[np.ndarray, " labels"], run: Run, top: int = 1) -> str:
    """A question and its best entries as lines of text."""
    lines = [question]
    for entry in ranked(chances, run, top):
        lines.append(f"  {entry['probability']:.3f}  {entry['label']}")
        if "answer" in entry:
            lines.append(f"         {entry['answer']}")
    return "\n".join(lines)
