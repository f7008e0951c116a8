"""A grid of adapters trained together over one base: every rank, learning rate and seed in one compiled step.

All members are filled up with zeros to the largest rank. That changes nothing of what they learn, and gives them one
shape: one program serves them all, and the base is its argument once. Inside it they take turns, or go side by side
under vmap, or some of each (`at_once`). Which of it is faster depends on the device: a CPU multiplies one matrix after
the other faster than a batch of them, and while members take turns their activations share one place in memory; an
accelerator that one member leaves idle wants them all at once.
"""

import inspect
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Key

from jlora.errors import JloraTypeError, JloraValueError, count, nearest
from jlora.runs.plan import peak, read_memory, readable, size_of
from jlora.runs.recommend import Recommendation, Trial, recommend
from jlora.training.step import Batch, LossFn, TrainState, make_train_step
from jlora.tree.layouts import SCALING, A
from jlora.tree.paths import Tree, TreePath, flatten, partition
from jlora.tree.splitting import join, split
from jlora.tree.wrapping import read_layouts, with_ranks

Status = Literal["finished", "stopped early", "diverged"]
Metrics = Mapping[str, float]


class Member(NamedTuple):
    """One run of a sweep.

    Attributes:
        rank: of its adapters, where a kernel has room for it.
        learning_rate: what its optimizer is made with.
        seed: of its adapters, its data's order and its dropout.
    """

    rank: int
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"rank {self.rank}, learning rate {self.learning_rate:g}, seed {self.seed}"


class Judged(NamedTuple):
    """A member was evaluated.

    Attributes:
        member: which.
        step: steps taken.
        metrics: what `evaluate` gave.
        best: whether none before was better.
        params: its wrapped tree now, at its own ranks; None where it is not the best.
    """

    member: Member
    step: int
    metrics: dict[str, float]
    best: bool
    params: Tree


class Progressed(NamedTuple):
    """All members went on.

    Attributes:
        step: steps taken.
        steps: steps there are.
        group: which group trains, from 1, and of how many.
        losses: every member's last loss; those that no longer train are not in it.
        seconds: wall time since the last such event, without evaluations.
    """

    step: int
    steps: int
    group: tuple[int, int]
    losses: dict[Member, float]
    seconds: float


@dataclass(kw_only=True)
class Outcome:
    """What one member came to.

    Attributes:
        member: which.
        status: "finished" all steps, "stopped early" for want of progress, or "diverged".
        losses: training loss of every step.
        evaluations: what it was judged by, in order.
        params: the wrapped tree at its best evaluation, at its own ranks; None where it never had one.
        ranks: of every kernel.
        trainable: parameters it trains.
        adapter_bytes: of what it trains, with the scalings.
        optimizer_bytes: of a run's optimizer state at these ranks.
    """

    member: Member
    ranks: dict[TreePath, int]
    trainable: int
    adapter_bytes: int
    optimizer_bytes: int
    status: Status = "finished"
    losses: list[float] = field(default_factory=list)
    evaluations: list[Judged] = field(default_factory=list)
    params: Tree = None

    @property
    def best(self) -> Judged | None:
        """Its best evaluation."""
        return next((judged for judged in reversed(self.evaluations) if judged.best), None)


class Resources(NamedTuple):
    """What a sweep took.

    Attributes:
        base_bytes: of the base, which all members share.
        argument_bytes: of all that a step is called with, base included, by the compiler's count.
        temporary_bytes: what a step needs beside these, by the compiler's count.
        groups: how many groups of members were trained one after the other.
        at_once: how many members a step computes side by side.
        compile_seconds: wall time of tracing and compiling the step for its largest batch.
        step_seconds: median wall time of a step of all members of a group.
    """

    base_bytes: int
    argument_bytes: int
    temporary_bytes: int
    groups: int
    at_once: int
    compile_seconds: float
    step_seconds: float


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """A sweep's evidence; `str()` is a table with the recommendation under it.

    Attributes:
        metric: what decides.
        maximize: whether more of it is better.
        before: what `evaluate` gave before training, by seed.
        outcomes: one for every member.
        resources: what it took.
        recommendation: the smallest rank that will do, and why.
    """

    metric: str
    maximize: bool
    before: dict[int, dict[str, float]]
    outcomes: tuple[Outcome, ...]
    resources: Resources
    recommendation: Recommendation

    @property
    def chosen(self) -> Outcome:
        """The best member of the recommended rank and learning rate."""
        wanted = self.recommendation
        found = [
            outcome
            for outcome in self.outcomes
            if (outcome.member.rank, outcome.member.learning_rate) == (wanted.rank, wanted.learning_rate)
            and outcome.best is not None
        ]
        return max(found, key=lambda outcome: _worth(outcome.best.metrics, self.metric, self.maximize))  # type: ignore

    def as_dict(self) -> dict[str, Any]:
        """All of it but the parameters, for JSON, with None for what is not finite."""
        return {
            "metric": self.metric,
            "maximize": self.maximize,
            "before": {str(seed): _finite(metrics) for seed, metrics in self.before.items()},
            "members": [_plain(outcome, self.metric) for outcome in self.outcomes],
            "resources": self.resources._asdict(),
            "recommendation": self.recommendation.as_dict(),
        }

    def __str__(self) -> str:
        head = ("rank", "lr", "seed", f"best {self.metric}", "step", "parameters", "adapter", "optimizer", "status")
        rows = [head, *(_cells(outcome, self.metric) for outcome in self.outcomes)]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, str(self.recommendation)])


def _plain(outcome: Outcome, metric: str) -> dict[str, Any]:
    best = outcome.best
    return {
        **outcome.member._asdict(),
        "status": outcome.status,
        "best_step": None if best is None else best.step,
        f"best_{metric}": None if best is None else _finite(best.metrics)[metric],
        "trainable": outcome.trainable,
        "adapter_bytes": outcome.adapter_bytes,
        "optimizer_bytes": outcome.optimizer_bytes,
        "losses": [loss if math.isfinite(loss) else None for loss in outcome.losses],
        "evaluations": [{"step": judged.step, **_finite(judged.metrics)} for judged in outcome.evaluations],
    }


def _finite(metrics: Metrics) -> dict[str, float | None]:
    """Metrics as JSON can hold them: it has no word for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _cells(outcome: Outcome, metric: str) -> tuple[str, ...]:
    member, best = outcome.member, outcome.best
    return (
        str(member.rank),
        f"{member.learning_rate:g}",
        str(member.seed),
        "-" if best is None else f"{best.metrics[metric]:.4f}",
        "-" if best is None else str(best.step),
        f"{outcome.trainable:,}",
        readable(outcome.adapter_bytes),
        readable(outcome.optimizer_bytes),
        outcome.status,
    )


def sweep(
    loss_fn: LossFn,
    start: Callable[[Member], Tree],
    batches: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[Tree], Metrics],
    *,
    steps: int,
    metric: str = "loss",
    maximize: bool = False,
    ranks: Sequence[int] = (4, 8, 16, 32, 64),
    learning_rates: Sequence[float] = (1e-3,),
    seeds: Sequence[int] = (0,),
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.adamw,
    key: Callable[[int], Key[Array, ""]] = jax.random.key,
    train: Any = (),
    accumulate: int = 1,
    clip: float | None = None,
    evaluate_every: int | None = None,
    fetch_every: int = 10,
    patience: int | None = None,
    max_skipped: int = 20,
    tolerance: float | None = None,
    noise: Callable[[float], float] | None = None,
    at_once: int | None = None,
    memory: int | str | None = None,
    example: Batch | None = None,
    tell: Callable[[Judged | Progressed], None] = lambda event: None,
) -> SweepResult:
    """Trains every combination of rank, learning rate and seed, all in one step over one base.

    Each member trains as a separate run would: the same initial adapter, the same batches, key and optimizer.

    ::

        def start(member):
            return jlora.wrap(params, member.rank, key=jax.random.key(member.seed))

        result = jlora.sweep(loss_fn, start, batches, evaluate, steps=300, ranks=(4, 8, 16, 32))
        print(result)
        params = result.chosen.params

    Args:
        loss_fn: `loss_fn(params, batch, key)`, as for `make_train_step`.
        start: a member's wrapped tree before its first step. All members have to share the arrays that do not train,
            and the kernels that are adapted.
        batches: the batches of a seed, at least `steps` of them; in every step those of all seeds have the same shapes.
        evaluate: measures a wrapped tree on validation data; must give finite numbers for an adapter of zeros.
        steps: steps of every member.
        metric: of those that `evaluate` gives, what decides.
        maximize: whether more of it is better.
        ranks: ranks to try.
        learning_rates: learning rates to try.
        seeds: seeds to try each of them with.
        optimizer: makes an optimizer from a learning rate, which is traced.
        key: a run's PRNG key, from its seed.
        train: leaves trained in full beside the adapters, as in `split`.
        accumulate: micro-batches a batch is cut into.
        clip: largest global norm of a member's gradient.
        evaluate_every: steps to an evaluation; None for ten in all.
        fetch_every: steps after which losses are read from the device.
        patience: evaluations without a better one, after which a member stops; None for never.
        max_skipped: steps with a loss or gradient that is not finite, after which a member has diverged.
        tolerance: how much worse than the best a smaller rank may be; None for one standard error of the best.
        noise: standard error of the metric on so many validation rows, from its value; used where there is one seed.
        at_once: members computed side by side; None for one on a CPU, elsewhere as many as fit.
        memory: what there is, in bytes or as "24GB"; None for what the device says it has. What does not fit at once is
            trained in groups, one after the other.
        example: a batch of the largest shape there is, to count memory for; None takes the first.
        tell: called with what happens.

    Raises:
        TypeError: arguments that are not functions, or do not take what they are called with, all of them listed; a
            result of one that is of the wrong kind.
        ValueError: options out of range, all of them listed; a metric that `evaluate` does not give, or that is not
            finite before training; members that do not share a base; no room for one member; too few batches.
    """
    _check_functions(
        loss_fn=(loss_fn, "params", "batch", "key"),
        start=(start, "member"),
        batches=(batches, "seed"),
        evaluate=(evaluate, "params"),
        optimizer=(optimizer, "learning_rate"),
        key=(key, "seed"),
        tell=(tell, "event"),
    )
    members = _grid(ranks, learning_rates, seeds)
    _check(
        tolerance,
        steps=steps,
        evaluate_every=evaluate_every,
        fetch_every=fetch_every,
        patience=patience,
        max_skipped=max_skipped,
        at_once=at_once,
        accumulate=accumulate,
    )
    every = evaluate_every or max(steps // 10, 1)
    shared = Field(loss_fn, members, start, optimizer, key, train, accumulate, clip)
    before = {member.seed: _measured(evaluate(shared.params(member)), metric) for member in shared.firsts()}
    streams = {seed: _Stream(batches(seed), seed) for seed in seeds}
    first = {seed: stream.look() for seed, stream in streams.items()}
    largest = {seed: first[seed] if example is None else example for seed in seeds}
    began = time.perf_counter()
    groups, side, found = _groups(shared, largest, _limit(memory), at_once)
    compile_seconds = time.perf_counter() - began
    outcomes: dict[Member, Outcome] = {}
    seconds: list[float] = []
    for number, group in enumerate(groups, 1):
        own = streams if number == 1 else {seed: _Stream(batches(seed), seed) for seed in seeds}
        runner = _Runner(shared, group, side, own, (metric, maximize), tell, (number, len(groups)))
        outcomes |= runner.run(evaluate, steps, every, fetch_every, patience, max_skipped)
        seconds += runner.seconds
    resources = Resources(
        base_bytes=sum(size_of(leaf) for leaf in jax.tree.leaves(shared.base)),
        argument_bytes=found.argument_size_in_bytes,
        temporary_bytes=found.temp_size_in_bytes,
        groups=len(groups),
        at_once=side,
        compile_seconds=compile_seconds,
        step_seconds=statistics.median(seconds),
    )
    ordered = tuple(outcomes[member] for member in members)
    trials = [_trial(outcome, metric) for outcome in ordered]
    advice = recommend(trials, metric=metric, maximize=maximize, tolerance=tolerance, noise=noise)
    return SweepResult(
        metric=metric,
        maximize=maximize,
        before=before,
        outcomes=ordered,
        resources=resources,
        recommendation=advice,
    )


def _trial(outcome: Outcome, metric: str) -> Trial:
    best = outcome.best
    lost = best is None or outcome.status == "diverged" or not math.isfinite(best.metrics[metric])
    return Trial(
        rank=outcome.member.rank,
        learning_rate=outcome.member.learning_rate,
        seed=outcome.member.seed,
        value=None if lost else best.metrics[metric],  # type: ignore[union-attr]
        losses=outcome.losses,
        validation=[judged.metrics["loss"] for judged in outcome.evaluations if "loss" in judged.metrics],
    )


def _check_functions(**functions: Any) -> None:
    """Raises where an argument is not a function that can be called as the sweep calls it.

    Args:
        functions: for each argument what was given, then the names of what it is called with.

    Raises:
        TypeError: all such arguments are listed.
    """
    wrong = []
    for name, (function, *arguments) in functions.items():
        expected = f"expected: a function {name}({', '.join(arguments)})"
        if not callable(function):
            wrong.append(f"{name} is of type {type(function).__name__}  {expected}")
        elif not _takes(function, arguments):
            wrong.append(f"{name} takes {inspect.signature(function)}  {expected}")
    if wrong:
        raise JloraTypeError("sweep", f"{count(len(wrong), 'argument')} of the wrong kind.", wrong, "correct it.")


def _takes(function: Callable[..., Any], arguments: Sequence[str]) -> bool:
    """Whether a function can be called with these positional arguments; True where that is unknown."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function without a signature
        return True
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _check_result(name: str, value: Any, kind: type, expected: str) -> None:
    """Raises where a function gave a result of another kind.

    Raises:
        TypeError: says what it gave, and what is expected.
    """
    if not isinstance(value, kind):
        problem = f"{name} returned a value of type {type(value).__name__}."
        raise JloraTypeError("sweep", problem, [], f"make it return {expected}.")


def _grid(ranks: Sequence[int], rates: Sequence[float], seeds: Sequence[int]) -> list[Member]:
    """Every combination, ranks first.

    Raises:
        ValueError: values out of range or given twice, all of them listed.
    """
    for name, values in {"ranks": ranks, "learning_rates": rates, "seeds": seeds}.items():
        if isinstance(values, str) or not isinstance(values, Collection):
            problem = f"{name} is {values!r}, not a sequence."
            raise JloraTypeError("sweep", problem, [], f"pass {name} as a list or tuple of numbers.")
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    real = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    wrong = [f"rank {rank!r}  expected: a whole number from 1" for rank in ranks if not (whole(rank) and rank > 0)]
    wrong += [
        f"learning rate {rate!r}  expected: a number above 0"
        for rate in rates
        if not (real(rate) and math.isfinite(rate) and rate > 0)
    ]
    wrong += [f"seed {seed!r}  expected: a whole number from 0" for seed in seeds if not (whole(seed) and seed >= 0)]
    for name, values in {"ranks": ranks, "learning rates": rates, "seeds": seeds}.items():
        wrong += [] if len(values) else [f"no {name}"]
        wrong += [
            f"{value!r} stands twice in {name}" for value in dict.fromkeys(values) if list(values).count(value) > 1
        ]
    if wrong:
        raise JloraValueError("sweep", "the grid can't be tried.", wrong, "correct it.")
    return [Member(*values) for values in itertools.product(ranks, rates, seeds)]


def _check(tolerance: float | None, **options: int | None) -> None:
    wrong = [
        f"{name} = {value!r}  expected: a whole number from 1"
        for name, value in options.items()
        if value is not None and not (isinstance(value, int) and value > 0)
    ]
    if tolerance is not None and not tolerance >= 0:
        wrong.append(f"tolerance = {tolerance!r}  expected: a number from 0")
    if wrong:
        raise JloraValueError("sweep", "options are out of range.", wrong, "correct them.")


def _measured(metrics: Metrics, metric: str) -> dict[str, float]:
    """What `evaluate` gave, as floats.

    Raises:
        ValueError: the metric isn't there, or isn't finite.
    """
    _check_result("evaluate", metrics, Mapping, 'a dict of metrics, as {"loss": 0.5}')
    found = {name: float(value) for name, value in metrics.items()}
    if metric not in found:
        offenders = [f"{metric!r}  there are: {', '.join(found)}; nearest: {nearest(metric, found, 1)[0]}"]
        raise JloraValueError("sweep", "evaluate gives no such metric.", offenders, "name one that it gives.")
    if not math.isfinite(found[metric]):
        problem = f"the {metric} is {found[metric]} before training."
        raise JloraValueError("sweep", problem, [], "look at the validation data: are there any?")
    return found


def _worth(metrics: Metrics, metric: str, maximize: bool) -> tuple[float, float]:
    """What is compared: the metric, then the loss where there is one; the higher the better."""
    value, loss = metrics[metric] * (1 if maximize else -1), -metrics.get("loss", 0.0)
    return tuple(-math.inf if math.isnan(number) else number for number in (value, loss))  # type: ignore[return-value]


def _limit(memory: int | str | None) -> int:
    """Bytes there are."""
    if memory is not None:
        return read_memory(memory)
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Stream:
    """The batches of one seed, the first of which can be looked at before."""

    def __init__(self, batches: Iterable[Batch], seed: int):
        _check_result("batches", batches, Iterable, "an iterable of batches")
        self.rest, self.seed = iter(batches), seed

    def look(self) -> Batch:
        first = next(self)
        self.rest = itertools.chain([first], self.rest)
        return first

    def __next__(self) -> Batch:
        try:
            return next(self.rest)
        except StopIteration:
            problem = f"the batches of seed {self.seed} came to an end before the last step."
            raise JloraValueError("sweep", problem, [], "give as many as there are steps.") from None


class _Each(NamedTuple):
    """What differs from member to member beside its state, stacked."""

    active: Any
    rate: Any
    place: Any
    scalings: Tree


class Field:
    """The members of a sweep over their base, and the program that trains some of them."""

    def __init__(
        self,
        loss_fn: LossFn,
        members: Sequence[Member],
        start: Callable[[Member], Tree],
        optimizer: Callable[[Any], optax.GradientTransformation],
        key: Callable[[int], Key[Array, ""]],
        train: Any,
        accumulate: int,
        clip: float | None,
    ):
        self.members, self.optimizer, self.key, self.train = members, optimizer, key, train
        self.seeds = list(dict.fromkeys(member.seed for member in members))
        _check_result(
            "optimizer",
            optimizer(members[0].learning_rate),
            optax.GradientTransformation,
            "an optimizer of optax, as optax.adamw does",
        )
        trees = {member: start(member) for member in members}
        for tree in trees.values():
            read_layouts("sweep", tree)
        self.ranks = {
            member: {path[: -len(A)]: leaf.shape[-1] for path, leaf in flatten(tree).items() if path.endswith(A)}
            for member, tree in trees.items()
        }
        _check_kernels(self.ranks)
        widest = {path: max(ranks[path] for ranks in self.ranks.values()) for path in self.ranks[members[0]]}
        self.halves: dict[Member, tuple[Tree, Tree]] = {}
        bases = {}
        for member, tree in trees.items():
            adapters, frozen = split(with_ranks(tree, widest), train)
            scalings, bases[member] = partition(frozen, lambda path, _: path.endswith(SCALING))
            self.halves[member] = adapters, scalings
        _check_shared(bases)
        self.base = bases[members[0]]

        def one(base: Tree, batches: Batch, state: TrainState, each: _Each) -> tuple[TrainState, dict[str, Array]]:
            step = make_train_step(loss_fn, optimizer(each.rate), accumulate=accumulate, clip=clip)
            batch = jax.tree.map(lambda leaf: leaf[each.place], batches)
            state, metrics = step(state, join(each.scalings, base), batch)
            return state, {name: metrics[name] for name in ("loss", "skipped")}

        def all_of(states: TrainState, base: Tree, batches: Batch, each: _Each, side: int) -> Any:
            def turn(member: tuple[TrainState, _Each]) -> Any:
                state, own = member
                told = jax.eval_shape(one, base, batches, state, own)[1]
                rest = lambda state: (state, jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), told))
                # Taking turns, a member that no longer trains costs nothing.
                return jax.lax.cond(own.active, lambda state: one(base, batches, state, own), rest, state)

            return jax.lax.map(turn, (states, each), batch_size=None if side == 1 else side)

        self.program = jax.jit(all_of, donate_argnums=0, static_argnums=4)

    def firsts(self) -> list[Member]:
        """The first member of every seed."""
        return [next(member for member in self.members if member.seed == seed) for seed in self.seeds]

    def params(self, member: Member, adapters: Tree = None) -> Tree:
        """A member's wrapped tree at the common rank: with these adapters, or those it begins with."""
        own, scalings = self.halves[member]
        return join(own if adapters is None else adapters, join(scalings, self.base))

    def state(self, member: Member) -> TrainState:
        """A member's state before its first step."""
        adapters, key = self.halves[member][0], self.key(member.seed)
        return TrainState.create(adapters, self.optimizer(member.learning_rate), key)

    def each(self, group: Sequence[Member], active: Sequence[bool]) -> _Each:
        """What differs between the members of a group."""
        return _Each(
            active=jnp.asarray(active),
            rate=jnp.asarray([member.learning_rate for member in group], jnp.float32),
            place=jnp.asarray([self.seeds.index(member.seed) for member in group]),
            scalings=_stack([self.halves[member][1] for member in group]),
        )

    def states(self, group: Sequence[Member]) -> TrainState:
        """Their states before the first step, stacked."""
        return _stack([self.state(member) for member in group])

    def together(self, batches: Mapping[int, Batch]) -> Batch:
        """The batches of all seeds, stacked."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *(batches[seed] for seed in self.seeds))

    def compiled(self, group: Sequence[Member], batches: Mapping[int, Batch], side: int) -> Any:
        """What the compiler says of a step of a group."""
        states = jax.eval_shape(lambda: self.states(group))
        each = self.each(group, [True] * len(group))
        return self.program.lower(states, self.base, self.together(batches), each, side).compile().memory_analysis()

    def outcome(self, member: Member) -> Outcome:
        """What is known of a member before it has trained."""
        ranks = self.ranks[member]
        adapters, scalings = jax.eval_shape(
            lambda: (split(self.narrowed(member), self.train)[0], self.halves[member][1])
        )
        state = jax.eval_shape(self.optimizer(member.learning_rate).init, adapters)
        total = lambda tree: sum(size_of(leaf) for leaf in jax.tree.leaves(tree))
        trainable = sum(leaf.size for leaf in jax.tree.leaves(adapters))
        return Outcome(
            member=member,
            ranks=ranks,
            trainable=trainable,
            adapter_bytes=total(adapters) + total(scalings),
            optimizer_bytes=total(state),
        )

    def narrowed(self, member: Member, adapters: Tree = None) -> Tree:
        """A member's wrapped tree at its own ranks."""
        return with_ranks(self.params(member, adapters), self.ranks[member])


def _stack(trees: Sequence[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _check_kernels(ranks: Mapping[Member, Mapping[TreePath, int]]) -> None:
    every = dict.fromkeys(path for found in ranks.values() for path in found)
    wrong = [f"{path!r}  not in {member}" for path in every for member, found in ranks.items() if path not in found]
    if wrong:
        problem = f"the members adapt other kernels: {count(len(wrong), 'one is', 'are')} missing."
        raise JloraValueError("sweep", problem, wrong, "give all members the same targets.")


def _check_shared(bases: Mapping[Member, Tree]) -> None:
    """Refuses frozen arrays of a member's own: the base is held once."""
    base, *_ = map(flatten, bases.values())
    wrong = [
        f"{path!r}  of {member}"
        for member, found in ((member, flatten(tree)) for member, tree in bases.items())
        for path in {**base, **found}
        if found.get(path) is not base.get(path)
    ]
    if wrong:
        problem = f"{count(len(wrong), 'frozen leaf is', 'frozen leaves are')} not the same array for all members."
        fix = "wrap one base for all of them, and name in train= what is to differ."
        raise JloraValueError("sweep", problem, wrong[:20], fix)


def _groups(
    shared: Field, batches: Mapping[int, Batch], limit: int, at_once: int | None
) -> tuple[list[list[Member]], int, Any]:
    """The members in groups that fit into memory, how many of each go side by side, and the compiler's count.

    Raises:
        ValueError: not one member fits.
    """
    members = list(shared.members)
    size = len(members)
    side = min(at_once or (1 if jax.default_backend() == "cpu" else size), size)
    while True:
        found = shared.compiled(members[:size], batches, side)
        if peak(found) <= limit:
            return [members[n : n + size] for n in range(0, len(members), size)], side, found
        if size == side == 1:
            problem = f"a step of one member takes {readable(peak(found))}, there are {readable(limit)}."
            fix = "lower the batch size or the largest rank, accumulate, or take remat; jlora.plan says what would do."
            raise JloraValueError("sweep", problem, [], fix)
        # First fewer side by side, which costs time on an accelerator only; then fewer in all.
        size, side = (size, math.ceil(side / 2)) if side > 1 else (math.ceil(size / 2), 1)


class _Runner:
    """The training of one group."""

    def __init__(
        self,
        shared: Field,
        group: Sequence[Member],
        side: int,
        streams: Mapping[int, _Stream],
        rule: tuple[str, bool],
        tell: Callable[[Judged | Progressed], None],
        number: tuple[int, int],
    ):
        self.shared, self.group, self.side, self.streams, self.rule = shared, list(group), side, streams, rule
        self.tell, self.number = tell, number
        self.outcomes = {member: shared.outcome(member) for member in group}
        self.active = [True] * len(group)
        self.since = dict.fromkeys(group, 0)
        self.seconds: list[float] = []

    def run(
        self,
        evaluate: Callable[[Tree], Metrics],
        steps: int,
        every: int,
        fetch_every: int,
        patience: int | None,
        max_skipped: int,
    ) -> dict[Member, Outcome]:
        """Trains until all steps are taken, or no member is left."""
        states, each = self.shared.states(self.group), self.shared.each(self.group, self.active)
        pending: list[Any] = []
        mark = time.perf_counter()
        for n in range(1, steps + 1):
            batches = self.shared.together({seed: next(stream) for seed, stream in self.streams.items()})
            states, metrics = self.shared.program(states, self.shared.base, batches, each, self.side)
            pending.append(metrics)
            evaluates = n % every == 0 or n == steps
            if not evaluates and n % fetch_every:
                continue
            skipped = self.fetch(pending)
            seconds = time.perf_counter() - mark
            self.seconds.append(seconds / len(pending))
            losses = {m: self.outcomes[m].losses[-1] for m, on in zip(self.group, self.active, strict=True) if on}
            self.tell(Progressed(n, steps, self.number, losses, seconds))
            self.leave("diverged", [count >= max_skipped for count in skipped])
            if evaluates:
                self.judge(evaluate, n, states.adapters)
                late = [patience is not None and self.since[member] >= patience for member in self.group]
                self.leave("stopped early", [n < steps and slow for slow in late])
            if not any(self.active):
                break
            each, pending = each._replace(active=jnp.asarray(self.active)), []
            mark = time.perf_counter()
        return self.outcomes

    def fetch(self, pending: Sequence[Any]) -> list[int]:
        """Notes the losses of some steps, and gives the steps each member has skipped so far."""
        losses = np.stack([np.asarray(metrics["loss"], np.float64) for metrics in pending])
        for place, member in enumerate(self.group):
            if self.active[place]:
                self.outcomes[member].losses += losses[:, place].tolist()
        return np.asarray(pending[-1]["skipped"]).tolist()

    def judge(self, evaluate: Callable[[Tree], Metrics], step: int, adapters: Tree) -> None:
        """Evaluates every member that trains."""
        metric, maximize = self.rule
        for place, member in enumerate(self.group):
            if not self.active[place]:
                continue
            outcome = self.outcomes[member]
            own = jax.tree.map(lambda leaf, place=place: leaf[place], adapters)
            metrics = {name: float(value) for name, value in evaluate(self.shared.params(member, own)).items()}
            worth, before = _worth(metrics, metric, maximize), outcome.best
            best = before is None or worth > _worth(before.metrics, metric, maximize)
            self.since[member] = 0 if best else self.since[member] + 1
            judged = Judged(member, step, metrics, best, self.shared.narrowed(member, own) if best else None)
            outcome.params = judged.params if best else outcome.params
            self.tell(judged)
            outcome.evaluations.append(judged._replace(params=None))

    def leave(self, status: Status, gone: Sequence[bool]) -> None:
        """Takes members out of the training."""
        for place, (member, out) in enumerate(zip(self.group, gone, strict=True)):
            if out and self.active[place]:
                self.active[place] = False
                self.outcomes[member].status = status
