"""Which rank the evidence of a sweep speaks for, in words."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from jlora.errors import JloraValueError
from jlora.runs.curves import rising, stalled

SHARE = 0.01  # of the best value: the tolerance where nothing tells how far it can be trusted


class Trial(NamedTuple):
    """One run at one rank.

    Attributes:
        rank: of its adapters.
        learning_rate: of its optimizer.
        seed: of all that it drew.
        value: its best validation metric; None where it diverged.
        losses: training loss of every step.
        validation: validation loss of every evaluation.
    """

    rank: int
    learning_rate: float
    seed: int
    value: float | None
    losses: Sequence[float]
    validation: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one rank came to, at the learning rate that suited it best.

    Attributes:
        rank: the rank.
        learning_rate: the one with the best mean.
        mean: of the metric over the seeds.
        error: standard error of that mean; None where there is one seed.
        low: the least of the seeds' values.
        high: the greatest.
        stalled: training loss at which a run stalled, a sign of too low a rank; None where none did.
        rose: whether the validation loss rose early, a sign of too high a rank.
    """

    rank: int
    learning_rate: float
    mean: float
    error: float | None
    low: float
    high: float
    stalled: float | None
    rose: bool


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The smallest rank that will do; `str()` gives the reasons, one a line.

    Attributes:
        rank: the rank.
        learning_rate: the one that suited it best.
        tolerance: how much worse than the best it may be.
        grades: of every rank that did not diverge, from the smallest.
        reasons: why, sentence by sentence.
    """

    rank: int
    learning_rate: float
    tolerance: float
    grades: tuple[Grade, ...]
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([f"Recommended: rank {self.rank}, learning rate {self.learning_rate:g}.", *self.reasons])


def recommend(
    trials: Sequence[Trial],
    *,
    metric: str,
    maximize: bool,
    tolerance: float | None = None,
    noise: Callable[[float], float] | None = None,
) -> Recommendation:
    """The smallest rank whose validation metric is within a tolerance of the best.

    Args:
        trials: one for every rank, learning rate and seed.
        metric: its name, for the reasons.
        maximize: whether more of it is better.
        tolerance: how much worse than the best is good enough. None for one standard error of the best rank's mean
            over its seeds, the rule of Breiman et al. 1984, section 3.4.3; where there is one seed, `noise`.
        noise: standard error of one measurement, from its value; None for 1 % of the best.

    Raises:
        ValueError: every run diverged.
    """
    ranks = sorted({trial.rank for trial in trials})
    grades = [grade for rank in ranks if (grade := _grade([t for t in trials if t.rank == rank], maximize))]
    if not grades:
        fix = "lower the learning rates, or clip the gradient."
        raise JloraValueError("sweep", "every member diverged.", [], fix)
    sign = 1 if maximize else -1
    best = max(grades, key=lambda grade: (sign * grade.mean, -grade.rank))
    slack, whence = _slack(best, tolerance, noise)
    # 0.92 - 0.90 is above 0.02 in floating point.
    rounding = 1e-12 * abs(best.mean)
    enough = [grade for grade in grades if sign * (best.mean - grade.mean) <= slack + rounding]
    chosen = enough[0]
    reasons = [
        f"The best validation {metric} is {_number(best)}, at rank {best.rank}.",
        f"A smaller rank may be {slack:.3g} worse: {whence}.",
        f"Rank {chosen.rank} is the smallest that is near enough"
        + ("." if chosen is best else f", with {_number(chosen)}."),
        *_signs(grades, chosen, metric, sign),
        *_ends(chosen, best, ranks),
        *_lost(trials),
    ]
    return Recommendation(
        rank=chosen.rank,
        learning_rate=chosen.learning_rate,
        tolerance=slack,
        grades=tuple(grades),
        reasons=tuple(reasons),
    )


def _grade(trials: Sequence[Trial], maximize: bool) -> Grade | None:
    """A rank at its best learning rate; None where every learning rate lost a run."""
    sign = 1 if maximize else -1
    rates = dict.fromkeys(trial.learning_rate for trial in trials)
    whole: list[tuple[float, float, list[float]]] = []
    for rate in rates:
        own_values = [trial.value for trial in trials if trial.learning_rate == rate]
        known = [value for value in own_values if value is not None]
        if len(known) == len(own_values):
            whole.append((statistics.fmean(known), rate, known))
    if not whole:
        return None
    mean, rate, values = max(whole, key=lambda found: sign * found[0])
    own = [trial for trial in trials if trial.learning_rate == rate]
    stalls = [loss for trial in own if (loss := stalled(trial.losses)) is not None]
    return Grade(
        rank=trials[0].rank,
        learning_rate=rate,
        mean=mean,
        error=statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
        low=min(values),
        high=max(values),
        stalled=statistics.fmean(stalls) if len(stalls) == len(own) else None,
        rose=all(rising(trial.validation) for trial in own),
    )


def _slack(best: Grade, tolerance: float | None, noise: Callable[[float], float] | None) -> tuple[float, str]:
    """The tolerance, and where it is from."""
    if tolerance is not None:
        return tolerance, "as given"
    if best.error is not None:
        return best.error, "one standard error of its mean over the seeds"
    if noise is not None:
        return noise(best.mean), "one standard error of what is measured on so many validation rows"
    return SHARE * abs(best.mean), f"{SHARE:.0%} of it, since one seed tells no spread"


def _number(grade: Grade) -> str:
    return f"{grade.mean:.4g}" + ("" if grade.error is None else f" ± {grade.error:.2g}")


def _signs(grades: Sequence[Grade], chosen: Grade, metric: str, sign: int) -> list[str]:
    """What speaks against the others."""
    said = []
    for grade in grades:
        short = sign * (chosen.mean - grade.mean)
        if grade.rank < chosen.rank:
            why = "" if grade.stalled is None else f"; its training loss stalled at {grade.stalled:.3f}"
            said.append(f"Rank {grade.rank} is too small: its {metric} is {short:.3g} worse{why}.")
        elif grade.rose and grade is not chosen:
            said.append(f"Rank {grade.rank} is too large for these data: its validation loss rose early.")
    if chosen.stalled is not None and chosen.rank == max(grade.rank for grade in grades):
        said.append(f"Even its training loss stalled at {chosen.stalled:.3f}: a larger rank or rate may do better.")
    if chosen.rose:
        said.append("Its own validation loss rose early: more dropout, fewer epochs or a lower rate may do better.")
    return said


def _ends(chosen: Grade, best: Grade, ranks: Sequence[int]) -> list[str]:
    """What the grid's ends leave open."""
    said = []
    if best.rank == ranks[-1] and len(ranks) > 1:
        said.append(f"The best is the largest rank tried: {2 * best.rank} may be better still.")
    if chosen.rank == ranks[0] and chosen.rank > 1:
        said.append(f"It is the smallest rank tried: {max(chosen.rank // 2, 1)} may do as well.")
    return said


def _lost(trials: Sequence[Trial]) -> list[str]:
    lost = [f"rank {t.rank} at {t.learning_rate:g}, seed {t.seed}" for t in trials if t.value is None]
    return [f"Diverged, and left out with all seeds of its rank and rate: {'; '.join(lost)}."] if lost else []
