"""A validation split taken from the training records."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jlora.data.readers import Corpus, Labelled, Record, labels_of, normalized_text
from jlora.errors import JloraValueError, count


class _Group(NamedTuple):
    """Records of one text, which stay together.

    Attributes:
        places: where they are in the split.
        labels: how many of them have each label or tag.
        stratum: the class they count for; empty where the task has no classes of texts.
    """

    places: Sequence[int]
    labels: Counter[str]
    stratum: str


def hold_out(corpus: Corpus, fraction: float, seed: int) -> Corpus:
    """The corpus with a fraction of its training records as its validation split.

    Records of the same text (whatever its case and spaces) go to one side. Each class of texts gives the same fraction,
    as near as whole records allow, and every label or tag stays in training. A seed draws the same records each time.

    Args:
        corpus: with a train split.
        fraction: of the training records, above 0.
        seed: of the draw.

    Raises:
        ValueError: the records can't be divided.
    """
    records = corpus.splits["train"]
    wanted = max(1, round(fraction * len(records)))
    groups = _groups(records)
    order = [groups[n] for n in np.random.default_rng(seed).permutation(len(groups))]
    chosen = set(_choose(order, wanted)) if wanted < len(records) else set()
    if not chosen:
        problem = f"{count(len(records), 'record')} can't be divided between training and validation."
        reason = [] if wanted >= len(records) else ["every one is of a text or a label that training would lack"]
        fix = "add records, lower data.holdout, or set data.validation: a file, or false to train without."
        raise JloraValueError("data", problem, reason, fix)
    train, validation = ([record for n, record in enumerate(records) if (n in chosen) == out] for out in (False, True))
    return corpus._replace(splits={**corpus.splits, "train": train, "validation": validation})


def _groups(records: Sequence[Record]) -> list[_Group]:
    """The records by their texts, in the order of the first of each."""
    places: dict[str, list[int]] = {}
    for n, record in enumerate(records):
        places.setdefault(normalized_text(record), []).append(n)
    groups = []
    for found in places.values():
        labels = Counter(label for n in found for label in set(labels_of(records[n])))
        first = records[found[0]]
        groups.append(_Group(found, labels, first.label if isinstance(first, Labelled) else ""))
    return groups


def _choose(groups: Sequence[_Group], wanted: int) -> Iterable[int]:
    """The places of about `wanted` records, by groups in the order given, that leave every label behind."""
    left: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for group in groups:
        left.update(group.labels)
        sizes[group.stratum] += len(group.places)
    quotas = _quotas(sizes, wanted)
    places: list[int] = []
    rest = []
    for group in groups:
        size = len(group.places)
        if size <= quotas[group.stratum] and _leaves_all(left, group):
            quotas[group.stratum] -= size
            left -= group.labels
            places += group.places
        else:
            rest.append(group)
    # What a class could not give, because its texts stand too often or it has one alone, others give.
    for group in rest:
        if len(group.places) <= wanted - len(places) and _leaves_all(left, group):
            left -= group.labels
            places += group.places
    return places


def _leaves_all(left: Counter[str], group: _Group) -> bool:
    """Whether every label of a group stays in training without it."""
    return all(left[label] > number for label, number in group.labels.items())


def _quotas(sizes: Counter[str], wanted: int) -> Counter[str]:
    """How many records of each class make `wanted`: in proportion, rounded by the largest remainders."""
    total = sum(sizes.values())
    quotas = Counter({name: size * wanted // total for name, size in sizes.items()})
    # Python's sort is stable: of equal remainders, the class that was drawn first.
    by_remainder = sorted(sizes, key=lambda name: -(sizes[name] * wanted % total))
    quotas.update(by_remainder[: wanted - sum(quotas.values())])
    return quotas
