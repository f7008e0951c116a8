"""`make_train_step`: gradients of the adapters alone, accumulated, clipped, guarded, in one trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx

from jlora.training.step import TrainState, make_train_step
from jlora.transform.adapt import adapt
from jlora.tree.paths import flatten, map_with_path
from jlora.tree.splitting import join, split
from jlora.tree.wrapping import wrap

CONTAINERS = {"dict": dict, "FrozenDict": core.freeze, "State": nnx.State}


def network(params, x):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x


forward = adapt(network)


def loss_fn(params, batch, key):
    return jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), float)


def make_batch(rows=16):
    return {"x": draw(2, rows, 8), "y": draw(3, rows, 5)}


def wrapped(kind="dict", seed=0, **options):
    layer = lambda n, m: {"kernel": draw(n, n, m) / n**0.5, "bias": jnp.full(m, -0.0)}
    params = CONTAINERS[kind]({"first": layer(8, 12), "second": layer(12, 5)})
    params = wrap(params, rank=2, key=jax.random.key(seed), **options)
    turn = lambda path, leaf: draw(seed, *leaf.shape) / 4 if path.endswith("_lora_b") else leaf
    return map_with_path(turn, params)


def start(tx, params=None, train=()):
    adapters, base = split(wrapped() if params is None else params, train)
    return TrainState.create(adapters, tx, jax.random.key(7)), base


def raw(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_frozen_leaves_are_bit_identical_after_ten_steps_and_adapters_learn(kind):
    tx = optax.adamw(1e-2, weight_decay=0.1)
    state, base = start(tx, wrapped(kind))
    before, adapters = raw(base), raw(state.adapters)
    step = make_train_step(loss_fn, tx)
    losses = []
    for _ in range(10):
        state, metrics = step(state, base, make_batch())
        losses.append(float(metrics["loss"]))
    assert raw(base) == before
    assert all(new != old for new, old in zip(raw(state.adapters), adapters, strict=True))
    assert losses[-1] < losses[0]
    assert type(join(state.adapters, base)) is type(wrapped(kind))


def test_optimizer_state_has_no_array_of_a_frozen_leafs_size():
    state, _ = start(optax.adam(1e-2), train=["second/bias"])
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(state.adapters)} | {()}


def test_the_state_is_donated_and_base_and_the_callers_adapters_are_not():
    adapters, base = split(wrapped())
    tx = optax.adam(1e-2)
    state = TrainState.create(adapters, tx, key := jax.random.key(7))
    after, metrics = make_train_step(loss_fn, tx)(state, base, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.adapters, state.opt_state)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((adapters, base, key)))
    make_train_step(loss_fn, tx)(after, base, make_batch())
    assert int(metrics["skipped"]) == 0, "metrics outlive the state they came with"


def numpy_step(params, batch, rate):
    """One full-batch SGD step on the adapters in float64 NumPy, and the gradient's norm."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    x, y = (np.asarray(batch[name], np.float64) for name in ("x", "y"))
    full = {
        n: p[f"{n}/kernel"] + p[f"{n}/kernel_lora_scaling"] * p[f"{n}/kernel_lora_a"] @ p[f"{n}/kernel_lora_b"]
        for n in ("first", "second")
    }
    h = np.tanh(x @ full["first"] + p["first/bias"])
    z = np.tanh(h @ full["second"] + p["second/bias"])
    dz = 2 * (z - y) / y.size * (1 - z**2)
    dh = dz @ full["second"].T * (1 - h**2)
    grads = {}
    for name, dw in (("first", x.T @ dh), ("second", h.T @ dz)):
        a, b, s = (p[f"{name}/kernel_lora_{leaf}"] for leaf in ("a", "b", "scaling"))
        grads[f"{name}/kernel_lora_a"], grads[f"{name}/kernel_lora_b"] = s * dw @ b.T, s * a.T @ dw
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {path: p[path] - rate * grad for path, grad in grads.items()}, norm, np.mean((z - y) ** 2)


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_accumulated_steps_equal_the_full_batch_in_float64_numpy(accumulate):
    with jax.enable_x64(True):
        params, batch = wrapped(alpha=3), make_batch()
        expected, norm, loss = numpy_step(params, batch, 0.5)
        tx = optax.sgd(0.5)
        state, base = start(tx, params)
        state, metrics = make_train_step(loss_fn, tx, accumulate=accumulate)(state, base, batch)
        actual = flatten(state.adapters)
        assert actual.keys() == expected.keys()
        for path, leaf in actual.items():
            assert leaf.dtype == jnp.float64
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-12, atol=1e-14, err_msg=path)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-12)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-12)


def test_gradients_are_accumulated_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wrapped())
    params["first"]["kernel_lora_a"] *= 0
    linear = lambda params, batch, key: (params["first"]["kernel_lora_a"] * batch.mean(0)).sum()
    rows = jnp.full((32, 8, 2), 2**-8, jnp.bfloat16).at[0].set(1)  # in bfloat16, 1 + 2**-8 is 1
    state, base = start(optax.sgd(1.0), params)
    state, _ = make_train_step(linear, optax.sgd(1.0), accumulate=32)(state, base, rows)
    expected = -jnp.asarray((1 + 31 * 2**-8) / 32, jnp.bfloat16)
    assert bool((state.adapters["first"]["kernel_lora_a"] == expected).all())


def test_clipping_equals_optax_over_the_adapters():
    params, batch = wrapped(), make_batch()
    adapters, base = split(params)
    oracle = optax.chain(optax.clip_by_global_norm(0.01), optax.adam(1e-2))
    grads = jax.jit(jax.grad(lambda adapters: loss_fn(join(adapters, base), batch, None)))(adapters)
    assert optax.tree.norm(grads) > 0.02
    expected = optax.apply_updates(adapters, oracle.update(grads, oracle.init(adapters), adapters)[0])
    state, base = start(optax.adam(1e-2), params)
    state, metrics = make_train_step(loss_fn, optax.adam(1e-2), clip=0.01)(state, base, batch)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    for actual, leaf in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(actual, leaf, rtol=1e-5, atol=1e-7)


def nan_loss(params, batch, key):
    return loss_fn(params, batch, key) * batch["factor"].mean()


def nan_gradient(params, batch, key):
    # The root's slope is infinite at 0, its value is not.
    return loss_fn(params, batch, key) + jnp.sqrt(jnp.sum(params["first"]["kernel_lora_b"] ** 2 * batch["factor"][0]))


@pytest.mark.parametrize(("loss", "bad"), [(nan_loss, jnp.nan), (nan_loss, jnp.inf), (nan_gradient, 0.0)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(loss, bad, accumulate):
    tx = optax.adam(1e-2)
    step = make_train_step(loss, tx, accumulate=accumulate, clip=1.0)
    state, base = start(tx)
    good = make_batch() | {"factor": jnp.ones(16)}
    state, _ = step(state, base, good)
    before = raw((state.adapters, state.opt_state))
    state, metrics = step(state, base, good | {"factor": jnp.full(16, bad)})
    assert raw((state.adapters, state.opt_state)) == before
    assert (int(state.step), int(state.skipped), int(metrics["skipped"])) == (2, 1, 1)
    state, metrics = step(state, base, good)
    assert raw((state.adapters, state.opt_state)) != before
    assert (int(state.step), int(metrics["skipped"])) == (3, 1)


def test_a_state_that_was_donated_is_one_clear_error_and_a_copy_still_trains():
    tx = optax.adam(1e-2)
    step = make_train_step(loss_fn, tx)
    state, base = start(tx)
    copy = jax.tree.map(jnp.copy, state)
    after, _ = step(state, base, make_batch())
    for used in (state, after.replace(adapters=state.adapters), after.replace(opt_state=state.opt_state)):
        with pytest.raises(ValueError, match=r"^make_train_step: this state was passed to an earlier step") as error:
            step(used, base, make_batch())
        assert str(error.value).count("\n") == 1
        assert "\nFix: use the state that the step returned" in str(error.value)
    again, _ = step(copy, base, make_batch())
    assert raw(again.adapters) == raw(after.adapters)
    # Under another transformation the leaves of a state have no memory of their own.
    traced, _ = jax.jit(step)(again, base, make_batch())
    assert raw(step(after, base, make_batch())[0].adapters) == raw(traced.adapters)


def test_every_step_and_microbatch_has_a_separate_key():
    def drawing(params, batch, key):
        return loss_fn(params, batch, key), {"draw": jax.nn.one_hot(batch["row"][0], 4) * jax.random.uniform(key) * 4}

    tx = optax.sgd(0.0)
    step = make_train_step(drawing, tx, accumulate=4)
    state, base = start(tx)
    draws = []
    for _ in range(3):
        state, metrics = step(state, base, make_batch(4) | {"row": jnp.arange(4)})
        draws += np.asarray(metrics["draw"]).tolist()
    assert len(set(draws)) == 12
    again, base = start(tx)
    _, metrics = step(again, base, make_batch(4) | {"row": jnp.arange(4)})
    assert np.asarray(metrics["draw"]).tolist() == draws[:4], "the same run draws the same"


def test_one_trace_and_one_compile_over_100_steps_other_adapters_and_other_scalings():
    traces = []

    def counted(params, batch, key):
        traces.append(1)
        return loss_fn(params, batch, key), {"mean": batch["x"].mean()}

    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3)
    step = make_train_step(counted, tx, accumulate=2, clip=1.0)
    state, base = start(tx)
    state, _ = step(state, base, make_batch())
    first = len(traces)
    for _ in range(99):
        state, _ = step(state, base, make_batch())
    for params in (wrapped(seed=5), wrapped(seed=6, alpha=16)):
        state, base = start(tx, params)
        state, _ = step(state, base, make_batch())
    assert len(traces) == first
    assert step._cache_size() == 1


def test_aux_floats_are_averaged_and_counts_are_summed_over_microbatches():
    def counting(params, batch, key):
        return loss_fn(params, batch, key), {"x": batch["x"].mean(), "positive": (batch["x"] > 0).sum()}

    batch, tx = make_batch(), optax.sgd(0.1)
    results = []
    for accumulate in (1, 4):
        state, base = start(tx)
        _, metrics = make_train_step(counting, tx, accumulate=accumulate)(state, base, batch)
        results.append((metrics["x"], metrics["positive"]))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
    assert int(results[1][1]) == int((batch["x"] > 0).sum())


@pytest.mark.parametrize(
    "tx", [optax.contrib.schedule_free_adamw(1e-3), optax.chain(optax.sgd(1e-2), optax.contrib.reduce_on_plateau())]
)
def test_transforms_that_keep_parameters_or_need_the_loss_work(tx):
    state, base = start(tx)
    step = make_train_step(loss_fn, tx)
    losses = []
    for _ in range(20):
        state, metrics = step(state, base, make_batch())
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1


def test_xla_flops_are_two_thirds_of_full_fine_tunings():
    width, depth = 256, 8

    def deep(params, x):
        for n in range(depth):
            x = jnp.tanh(x @ params[f"layer_{n}"]["kernel"])
        return x

    base = {f"layer_{n}": {"kernel": jnp.full((width, width), 1e-3)} for n in range(depth)}
    rows = jnp.ones((256, width))
    tx = optax.sgd(0.1)
    adapted = adapt(deep)
    state, frozen = start(tx, wrap(base, rank=2))
    step = make_train_step(lambda params, x, key: jnp.mean(adapted(params, x) ** 2), tx)
    lora = step.lower(state, frozen, rows).compile().cost_analysis()["flops"]

    def fine_tune(params, x):
        grads = jax.grad(lambda params: jnp.mean(deep(params, x) ** 2))(params)
        return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

    full = jax.jit(fine_tune).lower(base, rows).compile().cost_analysis()["flops"]
    assert abs(lora / full / (2 / 3) - 1) < 0.06


def test_a_loss_that_never_reads_the_adapters_names_the_fix():
    forgot = lambda params, batch, key: jnp.mean((network(params, batch["x"]) - batch["y"]) ** 2)
    state, base = start(optax.sgd(0.1))
    with pytest.raises(
        ValueError, match=r"loss_fn never reads the adapters(.|\n)*Fix: call jlora\.adapt\(model\.apply\)"
    ):
        make_train_step(forgot, optax.sgd(0.1))(state, base, make_batch())
    with pytest.raises(ValueError, match="loss_fn never reads the adapters"):
        state, base = start(optax.sgd(0.1), train=["bias"])
        make_train_step(forgot, optax.sgd(0.1), accumulate=2)(state, base, make_batch())


def test_a_loss_that_reads_only_some_of_the_adapters_is_not_an_error():
    head = adapt(lambda params, x: jnp.tanh(x @ params["first"]["kernel"]))
    state, base = start(optax.sgd(0.1))
    half = lambda params, batch, key: jnp.mean(head(params, batch["x"]) ** 2)
    state, _ = make_train_step(half, optax.sgd(0.1))(state, base, make_batch())
    assert int(state.step) == 1


def test_a_batch_that_cannot_be_split_evenly_is_an_error_naming_its_leaves():
    state, base = start(optax.sgd(0.1))
    batch = make_batch() | {"temperature": jnp.ones(()), "fits": jnp.ones(9)}
    with pytest.raises(ValueError, match=r"accumulate=3") as error:
        make_train_step(loss_fn, optax.sgd(0.1), accumulate=3)(state, base, batch)
    assert all(text in str(error.value) for text in ("'x' [16, 8]", "'y' [16, 5]", "'temperature' []"))
    assert "fits" not in str(error.value)


def test_options_out_of_range_are_reported_together():
    with pytest.raises(ValueError, match="accumulate=0") as error:
        make_train_step(loss_fn, optax.sgd(0.1), accumulate=0, clip=-1.0)
    assert "clip=-1.0" in str(error.value)


@pytest.mark.parametrize(
    ("result", "kind", "words"),
    [
        (lambda loss: loss[None], TypeError, r"loss_fn returned float32\[1\], not a floating scalar"),
        (lambda loss: (loss, loss), TypeError, "loss_fn's aux is a"),
        (lambda loss: (loss, {"grad_norm": loss}), ValueError, "1 name of the step's metrics"),
    ],
)
def test_a_wrong_result_of_a_loss_is_reported(result, kind, words):
    state, base = start(optax.sgd(0.1))
    step = make_train_step(lambda *args: result(loss_fn(*args)), optax.sgd(0.1))
    with pytest.raises(kind, match=words):
        step(state, base, make_batch())
