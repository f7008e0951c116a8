"""Entities as seqeval 1.2.2 counts them in its default mode, and macro-F1 as scikit-learn defines it."""

import numpy as np
import pytest

from jlora.data.tags import entities
from jlora.tasks.metrics import entity_scores, macro_f1


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("O O O", []),
        ("B-PER I-PER O B-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("I-PER I-PER O I-LOC", [("PER", 0, 1), ("LOC", 3, 3)]),
        ("B-PER I-LOC I-LOC", [("PER", 0, 0), ("LOC", 1, 2)]),
        ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
        ("I-PER B-PER", [("PER", 0, 0), ("PER", 1, 1)]),
        ("O I-A O B-A I-A", [("A", 1, 1), ("A", 3, 4)]),
        ("B-A-B I-A-B I-A", [("A-B", 0, 1), ("A", 2, 2)]),
    ],
)
def test_entities_begin_and_end_as_in_seqeval(tags, expected):
    assert entities(tags.split()) == expected


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        # seqeval's own example: one of two entities has a wrong start.
        (["O O O B-M I-M I-M O", "B-P I-P O"], ["O O B-M I-M I-M I-M O", "B-P I-P O"], (0.5, 0.5, 0.5)),
        # B or I at the start is the same entity; a wrong type, an entity too many, an entity missed.
        (["B-A I-A O", "B-B O B-A"], ["I-A I-A O", "B-A B-C O"], (1 / 3, 1 / 3, 1 / 3)),
        # An entity doesn't go on into the next sentence.
        (["O B-A", "I-A O"], ["O B-A", "O O"], (1.0, 0.5, 2 / 3)),
        (["B-A"], ["O"], (0.0, 0.0, 0.0)),
        (["O"], ["B-A"], (0.0, 0.0, 0.0)),
        (["O"], ["O"], (0.0, 0.0, 0.0)),
    ],
)
def test_scores_count_whole_entities_over_all_sentences(gold, predicted, expected):
    scores = entity_scores([tags.split() for tags in gold], [tags.split() for tags in predicted])
    assert scores == pytest.approx(expected)


def test_sentences_that_do_not_match_are_an_error():
    with pytest.raises(ValueError, match="sentence 1 has 2 tags, predicted are 1"):
        entity_scores([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="1 tagged sentences don't match 2"):
        entity_scores([["O"], ["O"]], [["O"]])


def test_macro_f1_is_the_mean_of_each_classs_own():
    rng = np.random.default_rng(0)
    gold, predicted = rng.integers(0, 6, (2, 200))
    # A class that is never predicted, one that is only predicted, and one that is nowhere.
    predicted[predicted == 1] = 0
    gold[gold == 2] = 0
    gold[gold == 4], predicted[predicted == 4] = 5, 5
    scores = []
    for label in (0, 1, 2, 3, 5):
        right = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        precision, recall = (right / max(sum(side == label), 1) for side in (predicted, gold))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert macro_f1(gold, predicted) == pytest.approx(np.mean(scores), abs=1e-12)
    assert macro_f1(np.array([1, 1]), np.array([1, 1])) == 1.0
    # scikit-learn's documented example.
    assert macro_f1(np.array([0, 1, 2, 0, 1, 2]), np.array([0, 2, 1, 0, 0, 1])) == pytest.approx(0.26666, abs=1e-5)
