"""Metrics: the F1 of classes, and of whole entities."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jlora.data.tags import entities
from jlora.errors import JloraValueError


class EntityScores(NamedTuple):
    """Shares of entities with the right type, start and end; 0 where there is nothing to share in.

    Attributes:
        precision: right ones among those predicted.
        recall: right ones among those there are.
        f1: their harmonic mean.
    """

    precision: float
    recall: float
    f1: float


def macro_f1(gold: Int[np.ndarray, " rows"], predicted: Int[np.ndarray, " rows"]) -> float:
    """The mean F1 of all classes that are in `gold` or `predicted`, each class weighing the same.

    Args:
        gold: the class of every row, from 0.
        predicted: the class predicted for it.

    >>> macro_f1(np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1]))
    0.26666666666666666

    Source: scikit-learn, `sklearn.metrics.f1_score(average="macro")`, whose example this is.
    """
    classes = int(max(gold.max(), predicted.max())) + 1
    right = np.bincount(gold[gold == predicted], minlength=classes)
    both = np.bincount(gold, minlength=classes) + np.bincount(predicted, minlength=classes)
    return float((2 * right[both > 0] / both[both > 0]).mean())


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> EntityScores:
    """Precision, recall and F1 over the entities of all sentences together (micro average).

    Args:
        gold: the BIO tags of every sentence.
        predicted: as many sentences of as many tags.

    Raises:
        ValueError: sentences or tags that are missing or too many.
    """
    wrong = [
        f"sentence {n} has {len(right)} tags, predicted are {len(said)}"
        for n, (right, said) in enumerate(zip(gold, predicted, strict=False))
        if len(right) != len(said)
    ]
    if len(gold) != len(predicted) or wrong:
        problem = f"{len(predicted)} tagged sentences don't match {len(gold)}."
        raise JloraValueError("entity_scores", problem, wrong[:10], "predict one tag for every token.")
    right, said = (set(_placed(sentences)) for sentences in (gold, predicted))
    precision = len(right & said) / len(said) if said else 0.0
    recall = len(right & said) / len(right) if right else 0.0
    total = precision + recall
    return EntityScores(precision, recall, 2 * precision * recall / total if total else 0.0)


def _placed(sentences: Sequence[Sequence[str]]) -> Iterator[tuple[int, str, int, int]]:
    return ((n, *entity) for n, tags in enumerate(sentences) for entity in entities(tags))
