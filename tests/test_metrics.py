"""Entities as seqeval counts them; the expected values are what seqeval 1.2.2 gives in its default mode."""

import pytest

from jlora.recipes.metrics import entities, entity_scores


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
