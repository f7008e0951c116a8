"""Sweeps: members equal runs of their own, share one base, leave each other alone, and end in a recommendation."""

import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.runs.sweep import Judged, Member, Progressed
from jlora.tree.paths import flatten

RNG = np.random.default_rng(0)
IN, MIDDLE, OUT, ROWS = 64, 96, 64, 16


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(0, shape[0] ** -0.5, shape).astype(np.float32)


BASE = jax.tree.map(
    jnp.asarray,
    {"up": {"kernel": draw(IN, MIDDLE)}, "down": {"kernel": draw(MIDDLE, OUT), "bias": np.zeros(OUT, np.float32)}},
)
X = RNG.normal(size=(320, IN)).astype(np.float32)
Y = np.tanh(X @ (draw(IN, MIDDLE) + BASE["up"]["kernel"])) @ BASE["down"]["kernel"]
TRAINED = ["down/bias"]


def model(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] + params["down"]["bias"]


adapted = jlora.adapt(model, dropout=0.1)
settled = jax.jit(lambda params: jnp.mean((adapted(params, X[256:]) - Y[256:]) ** 2))


def loss_fn(params, batch, key):
    x, y = batch
    return jnp.mean((adapted(params, x, lora_key=key) - y) ** 2)


def batches(seed):
    rng = np.random.default_rng(seed)
    while True:
        rows = rng.integers(0, 256, ROWS)
        yield X[rows], np.asarray(Y)[rows]


def start(member: Member):
    return jlora.wrap(BASE, member.rank, key=jax.random.key(member.seed))


def evaluate(params):
    return {"loss": float(settled(params))}


def optimizer(rate):
    return optax.adamw(rate, weight_decay=0.1)


OPTIONS = {"optimizer": optimizer, "train": TRAINED, "clip": 0.1, "accumulate": 2}


def sweep(steps=50, evaluate=evaluate, start=start, batches=batches, **options):
    return jlora.sweep(loss_fn, start, batches, evaluate, steps=steps, **{**OPTIONS, **options})


@functools.cache
def alone(member: Member, steps: int = 50):
    """The losses and the tree that a run of its own ends with."""
    adapters, base = jlora.split(start(member), TRAINED)
    tx = optimizer(member.learning_rate)
    state = jlora.TrainState.create(adapters, tx, jax.random.key(member.seed))
    step = jlora.make_train_step(loss_fn, tx, accumulate=2, clip=0.1)
    losses = []
    for batch in itertools.islice(batches(member.seed), steps):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    return losses, jlora.join(state.adapters, base)


@pytest.mark.parametrize("at_once", [1, 4])
def test_every_member_equals_a_run_of_its_own(at_once):
    padded = []

    def looking(params):
        padded.append(flatten(params))
        return evaluate(params)

    options = {"ranks": (4, 8, 16, 32, 64), "learning_rates": (3e-3,), "seeds": (0, 1)}
    result = sweep(evaluate=looking, at_once=at_once, evaluate_every=50, **options)
    assert result.resources.at_once == at_once
    for outcome, last in zip(result.outcomes, padded[-10:], strict=True):
        losses, params = alone(outcome.member)
        np.testing.assert_allclose(outcome.losses, losses, rtol=0, atol=1e-5)
        assert losses[-1] < 0.9 * losses[0]
        found, expected = flatten(outcome.params), flatten(params)
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            assert found[path].shape == leaf.shape
            np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-4)
        rank = outcome.member.rank
        for stem in ("up/kernel", "down/kernel"):
            assert last[f"{stem}_lora_a"].shape[1] == last[f"{stem}_lora_b"].shape[0] == 64
            assert not last[f"{stem}_lora_a"][:, rank:].any() and not last[f"{stem}_lora_b"][rank:].any()
            assert last[f"{stem}_lora_b"][:rank].any()


def test_the_base_is_held_once_however_many_members_share_it():
    few, many = (sweep(steps=2, ranks=ranks, at_once=1).resources for ranks in ((8,), (8, 4, 2, 1)))
    base = sum(leaf.nbytes for path, leaf in flatten(BASE).items() if path not in TRAINED)
    assert few.base_bytes == many.base_bytes == base
    batch = sum(leaf.nbytes for leaf in next(batches(0)))
    # What is left grows with the members alone: adapters, moments, counters.
    assert many.argument_bytes - base - batch == pytest.approx(4 * (few.argument_bytes - base - batch), rel=0.01)
    # Taking turns, they need the room of one: its activations once, and each one's state going in and coming out.
    assert many.temporary_bytes < 4 * few.temporary_bytes


def test_the_counts_are_those_of_the_shapes():
    (outcome,) = sweep(steps=1, ranks=(8,)).outcomes
    assert outcome.trainable == 8 * (IN + MIDDLE) + 8 * (MIDDLE + OUT) + OUT
    assert outcome.adapter_bytes == 4 * outcome.trainable + 2 * 4
    assert outcome.optimizer_bytes == 2 * 4 * outcome.trainable + 4


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_member_that_diverges_is_dropped_and_disturbs_no_other(at_once):
    options = {"ranks": (4,), "max_skipped": 3, "evaluate_every": 5, "fetch_every": 1, "at_once": at_once, "steps": 20}
    lost = optax.adamw  # rates that leave float32 at the first step
    result = sweep(learning_rates=(1e-3, 1e30, 3e-3), optimizer=lost, **options)
    first, gone, last = result.outcomes
    assert [first.status, gone.status, last.status] == ["finished", "diverged", "finished"]
    assert len(gone.losses) < 20 == len(first.losses) and gone.best is None
    calm = sweep(learning_rates=(1e-3, 3e-3), optimizer=lost, **options | {"at_once": min(at_once, 2)})
    for outcome, expected in zip((first, last), calm.outcomes, strict=True):
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-6)
        for found, leaf in zip(jax.tree.leaves(outcome.params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_allclose(found, leaf, rtol=0, atol=1e-6)
    assert any("Diverged" in reason for reason in result.recommendation.reasons)


def test_a_member_that_is_never_measured_finite_is_left_out_and_one_that_is_once_keeps_that():
    ends = {4: itertools.repeat(9.0), 8: iter([1.0, float("nan")]), 16: itertools.repeat(float("inf"))}

    def poor(params):
        rank = int((np.abs(np.asarray(params["up"]["kernel_lora_a"])).sum(0) > 0).sum())
        return {"loss": next(ends[rank])}

    result = sweep(ranks=(4, 8, 16), steps=2, evaluate_every=1, evaluate=poor)
    assert [grade.mean for grade in result.recommendation.grades] == [9.0, 1.0]
    assert result.chosen.member.rank == 8 and result.chosen.best.step == 1
    assert any("Diverged" in reason and "rank 16" in reason for reason in result.recommendation.reasons)
    members = json.loads(json.dumps(result.as_dict(), allow_nan=False))["members"]
    assert [[judged["loss"] for judged in m["evaluations"]] for m in members] == [[9.0, 9.0], [1.0, None], [None, None]]


def test_members_stop_early_each_for_itself():
    told = []

    def worse_at_rank_4(params):
        rank = int((np.abs(np.asarray(params["up"]["kernel_lora_a"])).sum(0) > 0).sum())
        told.append(rank)
        return {"loss": float(len(told)) if rank == 4 else -float(len(told))}

    result = sweep(ranks=(4, 8), steps=10, evaluate_every=1, evaluate=worse_at_rank_4, patience=2)
    slow, steady = result.outcomes
    # Its first evaluation is its best; two more, and it is out.
    assert (slow.status, len(slow.losses), len(slow.evaluations)) == ("stopped early", 3, 3)
    assert (steady.status, len(steady.losses), len(steady.evaluations)) == ("finished", 10, 10)


def test_what_does_not_fit_at_once_is_trained_in_groups_to_the_same_end():
    whole = sweep(steps=10, ranks=(4, 8, 16), at_once=1)
    room = whole.resources.argument_bytes + whole.resources.temporary_bytes
    groups = sweep(steps=10, ranks=(4, 8, 16), at_once=1, memory=room)
    assert (whole.resources.groups, groups.resources.groups) == (1, 2)
    for outcome, expected in zip(groups.outcomes, whole.outcomes, strict=True):
        assert outcome.losses == pytest.approx(expected.losses, rel=1e-6)
    with pytest.raises(ValueError, match=r"a step of one member takes .* MB, there are 0\.01 MB(.|\n)*Fix: lower"):
        sweep(ranks=(4, 8), memory=10_000)


def test_fewer_go_side_by_side_before_there_are_groups():
    whole = sweep(steps=1, ranks=(4, 8, 16, 32), at_once=4)
    room = whole.resources.argument_bytes + whole.resources.temporary_bytes
    less = sweep(steps=1, ranks=(4, 8, 16, 32), at_once=4, memory=room)
    assert less.resources.at_once < 4 and less.resources.groups == 1


def test_one_compile_serves_all_members_and_all_steps():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return loss_fn(params, batch, key)

    for ranks in ((4,), (4, 8, 16, 32)):
        traces.clear()
        jlora.sweep(counted, start, batches, evaluate, steps=20, ranks=ranks, **OPTIONS)
        few = len(traces) if len(ranks) == 1 else few
    assert len(traces) == few


def test_what_happens_is_told_and_the_best_is_handed_out():
    events = []
    result = sweep(steps=20, ranks=(4, 8), evaluate_every=5, fetch_every=5, tell=events.append)
    assert [event.step for event in events if isinstance(event, Progressed)] == [5, 10, 15, 20]
    judged = [event for event in events if isinstance(event, Judged)]
    assert len(judged) == 8 and all((event.params is not None) == event.best for event in judged)
    for outcome in result.outcomes:
        assert evaluate(outcome.params) == pytest.approx(outcome.best.metrics, rel=1e-5)
    table = str(result)
    assert "best loss" in table and result.recommendation.reasons[0] in table
    assert result.chosen.member.rank == result.recommendation.rank


def test_a_grid_that_can_not_be_tried_is_one_error():
    with pytest.raises(ValueError) as error:
        sweep(ranks=(4, 0, 4, True), learning_rates=(-1.0,), seeds=())
    for words in ("rank 0 ", "rank True", "4 stands twice in ranks", "learning rate -1.0", "no seeds", "Fix:"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match="options are out of range") as error:
        sweep(steps=0, evaluate_every=0, patience=1.5, tolerance=-0.1)
    for words in ("steps = 0 ", "evaluate_every = 0 ", "patience = 1.5 ", "tolerance = -0.1 ", "Fix:"):
        assert words in str(error.value)


def test_metrics_are_asked_for_before_training():
    def never(params, batch, key):
        raise AssertionError("training began")

    refuse = functools.partial(jlora.sweep, never, start, batches, steps=5, ranks=(4,))
    with pytest.raises(ValueError, match=r"no such metric(.|\n)*'accuracy'  there are: loss"):
        refuse(evaluate, metric="accuracy")
    with pytest.raises(ValueError, match=r"the loss is nan before training(.|\n)*are there any"):
        refuse(lambda params: {"loss": float("nan")})


def test_members_have_to_share_kernels_and_base():
    with pytest.raises(ValueError, match=r"adapt other kernels(.|\n)*'down/kernel'  not in rank 8"):
        sweep(start=lambda m: jlora.wrap(BASE, m.rank, targets=".*" if m.rank == 4 else "up/kernel"), ranks=(4, 8))
    copied = lambda m: jlora.wrap(jax.tree.map(jnp.copy, BASE), m.rank)
    with pytest.raises(ValueError, match=r"not the same array for all members(.|\n)*'up/kernel'  of rank 8"):
        sweep(start=copied, ranks=(4, 8))


def test_too_few_batches_are_an_error():
    with pytest.raises(ValueError, match="batches of seed 0 came to an end"):
        sweep(batches=lambda seed: itertools.islice(batches(seed), 3), ranks=(4,), steps=5)


WRONG = {
    "loss_fn": (
        lambda params, batch: 0.0,
        r"loss_fn takes \(params, batch\)  expected: a function loss_fn\(params, batch",
    ),
    "start": (BASE, r"start is of type dict  expected: a function start\(member\)"),
    "batches": ([X], r"batches is of type list  expected: a function batches\(seed\)"),
    "evaluate": (lambda: {}, r"evaluate takes \(\)  expected: a function evaluate\(params\)"),
    "optimizer": (optax.adamw(1e-3), "optimizer is of type GradientTransformation.*  expected: a function optimizer"),
    "key": (jax.random.key(0), r"key is of type .*  expected: a function key\(seed\)"),
    "tell": (3, r"tell is of type int  expected: a function tell\(event\)"),
}


def test_arguments_that_are_not_the_functions_a_sweep_calls_are_listed_at_once():
    options = {name: value for name, (value, _) in WRONG.items()}
    with pytest.raises(TypeError, match="sweep: 7 arguments of the wrong kind") as caught:
        jlora.sweep(steps=1, **options)
    for _, words in WRONG.values():
        assert re.search(words, str(caught.value)), words
    with pytest.raises(TypeError, match="sweep: ranks is 8, not a sequence"):
        sweep(steps=1, ranks=8)


def test_results_of_another_kind_are_refused():
    for options, words in (
        ({"start": lambda member: BASE}, "sweep: the tree has no adapter"),
        ({"start": lambda member: None}, "sweep: params is None, not a tree"),
        ({"evaluate": lambda params: 0.5}, "evaluate returned a value of type float(.|\n)*dict of metrics"),
        ({"batches": lambda seed: 3}, "batches returned a value of type int(.|\n)*iterable of batches"),
        ({"optimizer": lambda rate: rate}, "optimizer returned a value of type float(.|\n)*an optimizer of optax"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            sweep(steps=1, ranks=(4,), **options)
