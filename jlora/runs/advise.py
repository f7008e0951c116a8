"""A rank to start with, before any run: rules of thumb, held against the model's shapes and the memory there is.

The bands are the habits of the field: 4 to 16 for simple tasks, 16 to 64 for medium ones, 64 to 256 for complex ones;
few data take the low end and many the high one. `jlora.sweep` measures what this guesses.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from jlora.errors import JloraValueError, nearest
from jlora.hf.load import LoadedModel
from jlora.runs.plan import Planner, Settings, check, describe, load_shapes, read_memory, readable
from jlora.tasks.tasks import TASKS
from jlora.tree.layouts import max_rank
from jlora.tree.paths import flatten
from jlora.tree.wrapping import read_layouts, wrap

Difficulty = Literal["simple", "medium", "complex"]
FEW = 1_000  # examples below which an adapter learns them by heart


class Band(NamedTuple):
    """The ranks of a difficulty.

    Attributes:
        ranks: low, middle and high.
        few: examples below which the low one is the start.
        many: examples from which the high one is.
    """

    ranks: tuple[int, int, int]
    few: int
    many: int


BANDS: dict[str, Band] = {
    "simple": Band((4, 8, 16), few=100, many=5_000),
    "medium": Band((16, 32, 64), few=5_000, many=50_000),
    "complex": Band((64, 128, 256), few=50_000, many=500_000),
}
# How hard a task is unless it is told, and why.
KINDS: dict[str, tuple[Difficulty, str]] = {
    "sequence_classification": ("simple", "one label a text asks for little that the base does not know"),
    "instruction": ("simple", "answers in one manner, as of one desk, ask for little that the base does not know"),
    "token_classification": ("medium", "every word is judged, by terms that the base may not know"),
    "causal_lm": ("medium", "a manner of writing changes what the base does at every word"),
}


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A rank to start with; `str()` gives the reasons too.

    Attributes:
        rank: where to start.
        low: lowest rank worth trying.
        high: highest.
        alpha: to start with.
        dropout: to start with.
        reasons: why, sentence by sentence.
        step_bytes: what a step at `rank` takes; None where memory was not told.
    """

    rank: int
    low: int
    high: int
    alpha: float
    dropout: float
    reasons: tuple[str, ...]
    step_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        first = (
            f"Start at rank {self.rank}, alpha {self.alpha:g}, dropout {self.dropout:g}; try {self.low} to {self.high}."
        )
        return "\n".join([first, *self.reasons])


def advise(
    task: str,
    *,
    examples: int,
    difficulty: Difficulty | None = None,
    model: str | Path | LoadedModel | None = None,
    targets: str | Sequence[str] | None = None,
    memory: int | str | None = None,
    **settings: Any,
) -> Advice:
    """Says which rank to begin with, in which range to look, and why.

    Args:
        task: "sequence_classification", "token_classification", "causal_lm" or "instruction".
        examples: to train on.
        difficulty: "simple", "medium" or "complex"; None for what the task most often is.
        model: a folder in Hugging Face form, a name on the hub, or what `load_model` gave: no rank is advised that its
            kernels have no room for. Of a folder or name config.json alone is read.
        targets: the kernels that are adapted: a regular expression for their paths, or names of modules; None for all
            but the head.
        memory: what there is, in bytes or as "24GB": no rank is advised whose step `jlora.plan` finds too large for it.
        settings: of the step, as `jlora.plan` takes them: batch_size, sequence, dtype and others.

    Raises:
        ValueError: an unknown task or difficulty, no examples, targets or memory without a model, settings without
            memory, targets that match nothing, or a model of which no step fits.

    Examples:
        >>> advice = jlora.advise("token_classification", examples=5432)
        >>> advice.rank, advice.low, advice.high
        (32, 16, 64)
    """
    _check(task, examples, difficulty, model, {"targets": targets, "memory": memory}, settings)
    kind, why = KINDS[task]
    level = difficulty or kind
    band = BANDS[level]
    place = 0 if examples < band.few else 1 if examples < band.many else 2
    rank, low, high = band.ranks[place], band.ranks[0], band.ranks[-1]
    cause = "as you say" if difficulty else f"{task}: {why}"
    amount = ("few", "a middling number", "many")[place]
    reasons = [
        f"A {level} task ({cause}): {low} to {high}.",
        f"{examples:,} examples are {amount} for it: {rank}.",
    ]
    size = None
    if model is not None:
        loaded = load_shapes(model, settings.pop("untie", False), settings.pop("vocab_size", None))
        most = _room(loaded, targets)
        if most < high:
            low, rank, high = (min(value, _power(most)) for value in (low, rank, high))
            reasons.append(f"The smallest kernel has room for rank {most}: no more than {high}.")
        if memory is not None:
            names = targets if targets is None or isinstance(targets, str) else tuple(targets)
            wanted = Settings(task=task, targets=names, **settings)  # type: ignore[arg-type]
            rank, high, size, said = _fit(loaded, read_memory(memory), rank, high, wanted)
            low = min(low, rank)
            reasons += said
    few = examples < FEW
    reasons += [
        "So few examples are soon known by heart: dropout, and an eye on the validation loss."
        if few
        else "Dropout is for later, should the validation loss rise early.",
        "Training loss that stalls asks for a higher rank, validation loss that rises early for a lower one; these are "
        "rules of thumb, and `jlora sweep` measures.",
    ]
    return Advice(
        rank=rank,
        low=low,
        high=high,
        alpha=2.0 * rank,
        dropout=0.05 if few else 0.0,
        reasons=tuple(reasons),
        step_bytes=size,
    )


def _check(
    task: str, examples: int, difficulty: Any, model: Any, of_model: dict[str, Any], settings: dict[str, Any]
) -> None:
    wrong = []
    if task not in TASKS:
        wrong.append(f"task = {task!r}  nearest: {nearest(task, TASKS, 1)[0]}; known: {', '.join(TASKS)}")
    if not isinstance(examples, int) or examples < 1:
        wrong.append(f"examples = {examples!r}  expected: a whole number from 1")
    if difficulty is not None and difficulty not in BANDS:
        wrong.append(f"difficulty = {difficulty!r}  known: {', '.join(get_args(Difficulty))}")
    for name, value in (of_model | settings).items():
        lack = "a model" if model is None else "memory" if name in settings and of_model["memory"] is None else None
        if value is not None and lack:
            wrong.append(f"{name} = {value!r}  is of no use without {lack}")
    if wrong:
        raise JloraValueError("advise", "nothing can be advised.", wrong, "correct them.")


def _room(loaded: LoadedModel, targets: str | Sequence[str] | None) -> int:
    """The highest rank that all targeted kernels have room for."""
    tree = wrap(loaded.params, 1, targets=targets or loaded.model.lora_targets, layout=loaded.model.lora_layout)
    leaves = flatten(tree)
    return min(max_rank(leaves[path].shape, layout) for path, layout in read_layouts("advise", tree).items())


def _power(number: int) -> int:
    """The largest power of two that is not above a number."""
    return 1 << (number.bit_length() - 1)


def _fit(loaded: LoadedModel, memory: int, rank: int, high: int, wanted: Settings) -> tuple[int, int, int, list[str]]:
    """The rank and the highest one that fit, the bytes of a step at the first, and what is to be said of it.

    Raises:
        ValueError: settings that can't be planned with; not even rank 1 fits.
    """
    check(wanted, loaded)
    planner = Planner(loaded, memory)
    at = lambda rank: replace(wanted, rank=rank)
    ranks = [high >> n for n in range(high.bit_length())]
    highest = next((tried for tried in ranks if planner.fits(at(tried))), None)
    if highest is None:
        remedies, least = planner.remedies(at(1))
        ways = [describe(remedy) for remedy in remedies]
        ways += [f"the least is {describe(least)}"] if least else []
        problem = f"no step fits in {readable(memory)}, not even at rank 1."
        raise JloraValueError("advise", problem, ways, "change what is listed, or take more memory.")
    start = min(rank, highest)
    said = [f"In {readable(memory)} no step above rank {highest} fits."] if highest < high else []
    if start < rank:
        ways = [describe(remedy) for remedy in planner.remedies(at(rank))[0] if "rank" not in remedy.changes]
        said += [f"Rank {rank} would fit with {', or '.join(ways)}."] if ways else []
    size = planner.total(at(start))
    said.append(f"A step at rank {start} takes {readable(size)} of {readable(memory)}.")
    return start, highest, size, said
