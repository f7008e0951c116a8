"""BIO tags: the entities that a sentence's tags make."""

from collections.abc import Sequence


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The type, first and last place of every entity in a sentence's BIO tags.

    An I that follows no entity of its type begins one, as in CoNLL's own script and in seqeval's default mode.

    >>> entities(["B-PER", "I-PER", "I-LOC", "O", "I-LOC", "B-LOC"])
    [('PER', 0, 1), ('LOC', 2, 2), ('LOC', 4, 4), ('LOC', 5, 5)]

    Source: Nakayama, seqeval, `seqeval.metrics.sequence_labeling.get_entities`.
    """
    found: list[tuple[str, int, int]] = []
    open_type = None
    for n, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix == "O":
            open_type = None
        elif prefix == "I" and kind == open_type:
            found[-1] = (*found[-1][:2], n)
        else:
            found.append((kind, n, n))
            open_type = kind
    return found
