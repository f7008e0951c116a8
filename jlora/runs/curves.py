"""What the curves of a run say of its rank."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Rise(NamedTuple):
    """A validation loss that went up again.

    Attributes:
        place: of its lowest point, from 0.
        low: the loss there.
        last: the loss at the end.
        of: how many evaluations there were.
    """

    place: int
    low: float
    last: float
    of: int


def stalled(losses: Sequence[float]) -> float | None:
    """The training loss at which a run stalled: the sign of too low a rank, or rate.

    Its mean over the last quarter of the steps is within 1 % of that over the quarter before, and above a fifth of the
    first one. None where it is not so, or there are fewer than eight losses.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    quarter = len(finite) // 4
    if quarter < 2:
        return None
    before, after = (sum(part) / quarter for part in (finite[-2 * quarter : -quarter], finite[-quarter:]))
    return after if after > 0.2 * finite[0] and after > 0.99 * before else None


def rising(losses: Sequence[float]) -> Rise | None:
    """How a validation loss rose early: the sign of too high a rank, or rate, or of too few data.

    Its lowest point came in the first half of the evaluations, and the last is a tenth above it; what is no number
    counts as infinite. None where it is not so, or there are fewer than three.
    """
    if len(losses) < 3:
        return None
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    low, last = min(known), known[-1]
    place = known.index(low)
    return Rise(place, low, last, len(known)) if place < len(known) / 2 and last > low + 0.1 * abs(low) else None
