"""`adapt` as a function transform: any signature, one trace, the base's bits at the start, and errors that say why."""

import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from jlora import adapt, attach, extract, infer_layout, join, merge, split, unwrap, wrap
from jlora.tree.paths import flatten, map_with_path


def randomised(params, seed=0):
    """A wrapped tree whose b is not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda path, w: jnp.asarray(rng.normal(size=w.shape), w.dtype) if path.endswith("_lora_b") else w
    return map_with_path(draw, params)


def layer(seed=0, inner=6, out=6, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed))
    return {
        "kernel": jax.random.normal(keys[0], (inner, out), dtype),
        "bias": jax.random.normal(keys[1], (out,), dtype),
    }


def dense(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"])


def wrapped(rank=2, **options):
    return randomised(wrap(layer(), rank, **options))


X = jax.random.normal(jax.random.key(9), (3, 6))


def close(one, other, tolerance=2e-6):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class Network(nn.Module):
    """Dense, attention, convolution, a tied embedding, and Dense layers stacked by scan."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids, train=False, *, scale=1.0):
        options = {"dtype": self.dtype, "param_dtype": self.dtype}
        embed = nn.Embed(11, 8, **options)
        x = embed(ids) * scale
        x = x + nn.MultiHeadDotProductAttention(2, **options)(nn.LayerNorm(**options)(x))
        x = nn.gelu(nn.Conv(8, (3,), feature_group_count=2, **options)(x))

        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(8, **options)(nn.relu(nn.Dense(16, **options)(x))), None

        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x = nn.Dropout(0.5, deterministic=not train)(scan()(x, None)[0])
        x = nn.BatchNorm(use_running_average=not train, **options)(x)
        return embed.attend(x)


IDS = jnp.array([[1, 5, 3, 0], [2, 10, 4, 4]])


@functools.cache
def network(dtype=jnp.float32):
    model = Network(dtype)
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    params, stats = variables["params"], variables["batch_stats"]
    fn = lambda params, ids: model.apply({"params": params, "batch_stats": stats}, ids)
    layout = infer_layout(fn, params, IDS)
    tree = jax.jit(lambda params: wrap(params, 2, layout=layout, targets=".*(kernel|embedding)"))(params)
    return model, fn, tree, stats


# Right after wrap.


# With LLVM's optimisations some CPUs sum a row in another order as soon as anything is fused into it: then two programs
# of the same arithmetic differ in the last bit, whatever the program adds to it being zero.
in_order = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.slow
@pytest.mark.parametrize("compile", [lambda f: f, in_order], ids=["unjitted", "jitted"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_outputs_right_after_wrap_are_the_bases_bits(dtype, compile):
    _, fn, tree, _ = network(dtype)
    assert sum(path.endswith("_lora_a") for path in flatten(tree)) == 8
    expected, found = compile(fn)(unwrap(tree), IDS), compile(adapt(fn))(tree, IDS)
    assert expected.dtype == found.dtype == dtype and bool(jnp.isfinite(expected).all())
    assert np.asarray(expected).tobytes() == np.asarray(found).tobytes()


@pytest.mark.slow
def test_a_merged_tree_compiles_to_the_bases_program():
    _, fn, tree, _ = network()

    def program(params):
        text = jax.jit(lambda params, ids: fn(params, ids)).lower(params, IDS).compile().as_text()
        return re.sub(r", metadata=\{[^}]*\}|, stack_frame_id=\d+", "", text)

    base, merged = (program(params) for params in (unwrap(tree), merge(randomised(tree))))
    assert base == merged and "dot" in base


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_kernel_keeps_its_dtype_and_meets_the_merged_one_to_its_precision(dtype):
    tree = randomised(wrap(layer(dtype=dtype), 2))
    x = X.astype(dtype)
    assert tree["kernel_lora_a"].dtype == jnp.float32
    product = lambda params, x: x @ params["kernel"]
    found = adapt(product)(tree, x)
    wide = lambda name: np.asarray(tree[name], np.float64)
    exact = np.asarray(x, np.float64) @ (wide("kernel") + wide("kernel_lora_a") @ wide("kernel_lora_b"))
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, atol=8 * float(jnp.finfo(dtype).eps) * 3)


# Signatures.


def test_flax_rngs_mutable_collections_and_static_flags_pass_through():
    model, _, tree, stats = network()
    tree = randomised(tree)
    call = lambda run, params: run(
        {"params": params, "batch_stats": stats}, IDS, True, scale=0.5, rngs={"dropout": jax.random.key(3)},
        mutable=["batch_stats"],
    )  # fmt: skip
    adapted = adapt(model.apply)
    found, state = call(adapted, tree)
    expected, true_state = call(model.apply, merge(tree))
    assert jax.tree.structure(state) == jax.tree.structure(true_state)
    close((found, state), (expected, true_state), 2e-4)
    evaluated = adapted({"params": tree, "batch_stats": stats}, IDS)
    close(evaluated, model.apply({"params": merge(tree), "batch_stats": stats}, IDS), 2e-4)
    assert float(jnp.abs(evaluated - found).max()) > 1e-2


def test_outputs_that_are_no_arrays_and_arguments_of_any_kind_pass_through():
    def fn(params, x, power, mode="plain", *, options=None, flag):
        y = dense(params, x) ** power
        return {"y": y, "mode": mode, "none": None, "count": 3, "options": options, "list": [flag, (y.shape, 2.5)]}

    found = adapt(fn)(wrapped(), np.asarray(X), 2, options=("a", None), flag=True)
    expected = fn(merge(wrapped()), X, 2, options=("a", None), flag=True)
    close(found.pop("y"), expected.pop("y"))
    assert found == expected and type(found["count"]) is int and found["list"][0] is True


def test_two_wrapped_trees_in_two_arguments_and_one_that_is_plain():
    fn = lambda one, x, *, other, third: dense(third, dense(other["inner"], dense(one, x)))
    trees = [randomised(wrap(layer(n), 2), n) for n in range(2)]
    found = adapt(fn)(trees[0], X, other={"inner": trees[1]}, third=layer(5))
    close(found, fn(merge(trees[0]), X, other={"inner": merge(trees[1])}, third=layer(5)))


def test_a_tree_without_adapters_passes_as_it_is():
    found = adapt(dense)(layer(), X)
    assert np.asarray(found).tobytes() == np.asarray(dense(layer(), X)).tobytes()


def test_a_frozen_dict_reaches_the_function_as_a_frozen_dict():
    def fn(params, x):
        assert isinstance(params, core.FrozenDict) and set(params["dense"]) == {"kernel", "bias"}
        return dense(params["dense"], x)

    tree = randomised(wrap(core.freeze({"dense": layer()}), 2))
    close(adapt(fn)(tree, X), fn(merge(tree), X))


def test_an_nnx_model_is_adapted_through_split_and_merge():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 6, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.first(x)))

    graph, state, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    fn = lambda state, x: nnx.merge(graph, state, rest)(x)
    tree = wrap(state, 2)
    assert isinstance(tree, nnx.State)
    assert np.asarray(adapt(fn)(tree, X)).tobytes() == np.asarray(fn(state, X)).tobytes()
    tree = randomised(tree)
    close(adapt(fn)(tree, X), fn(merge(tree), X))
    close(jax.jit(adapt(fn))(tree, X), fn(merge(tree), X))


def test_a_kernel_read_in_two_places_counts_in_both_and_gathers_both_gradients():
    fn = lambda params, x: jnp.tanh(x @ params["kernel"]) @ params["kernel"].T
    tree = wrapped()
    total = lambda run: lambda tree: jnp.sin(run(tree)).sum()
    adapted, merged = total(lambda t: adapt(fn)(t, X)), total(lambda t: fn(merge(t), X))
    close(jax.value_and_grad(adapted)(tree), jax.value_and_grad(merged)(tree), 1e-4)


def test_closures_over_an_outer_trace_are_read_anew_each_time():
    def outer(tree, shift):
        return adapt(lambda params, x: dense(params, x + shift))(tree, X)

    shifted = adapted_once = None
    adapted_once = adapt(lambda params, x: dense(params, x + shifted))
    for value in (0.0, 1.0):
        shift = jnp.float32(value)
        expected = dense(merge(wrapped()), X + shift)
        close(outer(wrapped(), shift), expected)
        close(jax.jit(outer)(wrapped(), shift), expected)

        def inside(value):
            nonlocal shifted
            shifted = value
            return adapted_once(wrapped(), X).sum()

        close(jax.jit(inside)(shift), expected.sum())
        slope = jax.grad(lambda s: dense(merge(wrapped()), X + s).sum())(shift)
        close(jax.grad(inside)(shift), slope, 1e-4)


# One trace.


def test_the_function_is_traced_once_for_each_structure_shape_and_static_value():
    calls = []

    def fn(params, x, mode="a"):
        calls.append(mode)
        return dense(params, x)

    adapted, tree = adapt(fn), wrapped()
    counted = []
    for params, x, mode in [
        (tree, X, "a"),
        (tree, X, "a"),
        (randomised(tree, 7), X + 1, "a"),  # another adapter
        (tree | {"kernel_lora_scaling": jnp.float32(3.0)}, X, "a"),  # another scaling
        (tree, X[:2], "a"),
        (tree, X[:2], "b"),
        (wrapped(3), X, "a"),
        (layer(), X, "a"),
        (tree, X, "a"),
    ]:
        close(adapted(params, x, mode), fn(merge(params) if "kernel_lora_a" in params else params, x, mode))
        calls.pop()
        counted.append(len(calls))
    assert counted == [1, 1, 1, 1, 2, 3, 4, 5, 5]
    for scaling in range(3):
        jax.jit(adapted, static_argnums=2)(tree | {"kernel_lora_scaling": jnp.float32(scaling)}, X, "a")
    assert len(calls) == 5


def test_equal_statics_of_other_kinds_have_traces_of_their_own():
    fn = adapt(lambda params, x, value: (dense(params, x), value))
    kinds = [type(fn(wrapped(), X, value)[1]) for value in (1, True, 1.0, 1)]
    assert kinds == [int, bool, float, int]


def test_a_static_that_cannot_be_hashed_still_works():
    fn = lambda params, x, box: dense(params, x) * box.value

    class Box:
        __hash__ = None

        def __init__(self, value):
            self.value = value

    adapted = adapt(fn)
    for value in (2.0, 3.0):
        close(adapted(wrapped(), X, Box(value)), fn(merge(wrapped()), X, Box(value)))


def test_an_unjitted_call_after_the_first_runs_none_of_the_functions_python():
    _, fn, tree, _ = network()
    runs = []

    def counted(params, ids):
        runs.append(1)
        return fn(params, ids)

    adapted = adapt(counted)
    for _ in range(3):
        adapted(tree, IDS)
    # What is left to an un-jitted call is dispatching; the base's own call runs the module's Python each time.
    assert len(runs) == 1


# Rules of others, kept.


@jax.custom_vjp
def seven(x):
    return x


seven.defvjp(lambda x: (x, None), lambda _, g: (7 * g,))


@jax.custom_jvp
def eleven(x):
    return x


eleven.defjvp(lambda primals, tangents: (primals[0], 11 * tangents[0]))


@pytest.mark.parametrize("rule, factor", [(seven, 7), (eleven, 11)], ids=["custom_vjp", "custom_jvp"])
@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "remat"])
def test_a_custom_rule_inside_keeps_its_gradient_however_wrong(rule, factor, around):
    fn = lambda params, x, rule: around(lambda params, x: rule(x @ params["kernel"]))(params, x)
    slope = lambda rule: jax.grad(lambda tree: adapt(fn)(tree, X, rule).sum())(wrapped())
    close(slope(rule), jax.tree.map(lambda g: factor * g, slope(lambda x: x)), 1e-5)


def equations(jaxpr):
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_remat_keeps_its_policy_and_prevent_cse(prevent_cse):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    def step(w, x):
        return jnp.sin(checkpoint_name(jnp.tanh(x @ w), "hidden") @ w)

    fn = lambda params, x: jax.checkpoint(step, policy=policy, prevent_cse=prevent_cse)(params["kernel"], x)
    tree = wrapped()
    found = [e.params for e in equations(jax.make_jaxpr(adapt(fn))(tree, X)) if "prevent_cse" in e.params]
    assert [p["policy"] for p in found] == [policy] and [p["prevent_cse"] for p in found] == [prevent_cse]
    total = lambda run: jax.grad(lambda tree: run(tree).sum())(tree)
    close(total(lambda t: adapt(fn)(t, X)), total(lambda t: fn(merge(t), X)), 1e-4)


def test_a_jitted_function_keeps_its_name_in_the_trace():
    @jax.jit
    def attention_core(params, x):
        return dense(params, x)

    names = {e.params.get("name") for e in equations(jax.make_jaxpr(adapt(attention_core))(wrapped(), X))}
    assert "attention_core" in names


# Dropout.

EYE = {  # x passes A and B unchanged, so what dropout did to it can be read off
    "kernel": jnp.zeros((64, 64)), "kernel_lora_a": jnp.eye(64), "kernel_lora_b": jnp.eye(64),
    "kernel_lora_scaling": jnp.float32(1.0),
}  # fmt: skip
ONES = jnp.ones((8, 64))
product = lambda params, x: x @ params["kernel"]


def test_without_a_key_nothing_is_dropped():
    close(adapt(product, dropout=0.5)(EYE, ONES), ONES)
    close(adapt(product)(EYE, ONES, lora_key=jax.random.key(0)), ONES)


def test_dropout_zeroes_its_share_of_the_adapters_input_and_keeps_the_mean():
    dropping = adapt(product, dropout=0.25)
    values = jax.vmap(lambda key: dropping(EYE, ONES, lora_key=key))(jax.random.split(jax.random.key(0), 50))
    assert np.allclose(np.unique(values), [0, 1 / 0.75])
    count = values.size
    assert abs(float((values == 0).mean()) - 0.25) < 5 * (0.25 * 0.75 / count) ** 0.5
    assert abs(float(values.mean()) - 1) < 5 * (0.25 / 0.75 / count) ** 0.5


def test_the_same_key_drops_the_same_and_another_key_another():
    dropping = adapt(product, dropout=0.5)
    draw = lambda seed: np.asarray(dropping(EYE, ONES, lora_key=jax.random.key(seed)))
    assert (draw(0) == draw(0)).all() and (draw(0) != draw(1)).any()
    assert (draw(0) == np.asarray(jax.jit(dropping)(EYE, ONES, lora_key=jax.random.key(0)))).all()


def test_only_the_adapters_path_drops():
    plain = EYE | {"kernel": jnp.full((64, 64), 0.5), "kernel_lora_b": jnp.zeros((64, 64))}
    found = adapt(product, dropout=0.5)(plain, ONES, lora_key=jax.random.key(0))
    assert (found == product(unwrap(plain), ONES)).all()


def distinct(values):
    values = [np.asarray(v).tobytes() for v in values]
    return len(set(values)) == len(values) > 1


def test_every_kernel_every_use_and_every_scan_step_drops_its_own():
    key = jax.random.key(0)
    run = lambda fn, params: adapt(fn, dropout=0.5)(params, ONES, lora_key=key)
    assert distinct(run(lambda p, x: [product(layer, x) for layer in p], [EYE, EYE]))
    assert distinct(run(lambda p, x: [product(p, x), product(p, x)], EYE))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), EYE)
    scan = lambda p, x: jax.lax.scan(lambda c, w: (c, c @ w), x, p["kernel"])[1]
    shared = lambda p, x: jax.lax.scan(lambda c, _: (c, product(p, c)), x, None, length=3)[1]
    twice = lambda p, x: [*scan(p, x), *scan(p, x)]
    assert distinct(run(scan, stack)) and distinct(run(shared, EYE)) and distinct(run(twice, stack))

    def loop(p, x):
        write = lambda n, out: jax.lax.dynamic_update_index_in_dim(out, product(p, x), n, 0)
        return jax.lax.fori_loop(0, jnp.int32(3), write, jnp.zeros((3, *x.shape)))

    assert distinct(run(loop, EYE))


def test_remat_recomputes_with_the_same_dropout():
    fn = lambda params, x: jnp.sin(product(params, x))
    slope = lambda fn: jax.grad(lambda p: adapt(fn, dropout=0.5)(p, ONES, lora_key=jax.random.key(0)).sum())(EYE)
    close(slope(jax.checkpoint(fn)), slope(fn), 1e-5)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_dropout_rate_outside_its_range_is_an_error(rate):
    with pytest.raises(ValueError, match=r"adapt: dropout is .*\nFix: pass a rate from 0"):
        adapt(dense, dropout=rate)


# Trees of adapters as data.


def test_vmap_over_stacked_adapters_on_one_base_is_the_loop_over_them():
    trees = [randomised(wrap(layer(), 2, alpha=alpha, key=jax.random.key(alpha)), alpha) for alpha in (1, 2, 5)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(extract, trees))
    expected = jnp.stack([adapt(dense)(tree, X) for tree in trees])
    close(jax.vmap(lambda adapter: adapt(dense)(attach(adapter, layer()), X))(stacked), expected)
    axes = map_with_path(lambda path, _: 0 if "_lora_" in path else None, trees[0])
    close(jax.vmap(adapt(dense), in_axes=(axes, None))(layer() | stacked, X), expected)


def test_an_adapter_padded_with_zeros_trains_as_the_smaller_one():
    small = wrap(layer(), 2)
    pad = {"_lora_a": ((0, 0), (0, 3)), "_lora_b": ((0, 3), (0, 0))}
    widen = lambda path, w: next((jnp.pad(w, width) for end, width in pad.items() if path.endswith(end)), w)
    large = map_with_path(widen, small)
    tx, target = optax.adam(1e-2), jnp.cos(X)

    def train(tree):
        adapters, base = split(tree)

        def step(carry, _):
            adapters, state = carry
            loss = lambda adapters: ((adapt(dense)(join(adapters, base), X) - target) ** 2).mean()
            updates, state = tx.update(jax.grad(loss)(adapters), state)
            return (optax.apply_updates(adapters, updates), state), loss(adapters)

        (adapters, _), losses = jax.jit(lambda: jax.lax.scan(step, (adapters, tx.init(adapters)), length=30))()
        return adapters, losses

    (small, losses), (large, wide_losses) = train(small), train(large)
    assert losses[-1] < 0.9 * losses[0]
    close(wide_losses, losses, 1e-5)
    close(map_with_path(widen, small), large, 1e-4)
    assert not large["kernel_lora_a"][:, 2:].any() and not large["kernel_lora_b"][2:].any()


# Errors.


def line_of(text):
    with open(__file__) as file:
        return next(n for n, line in enumerate(file, 1) if text in line)


def odd(params, x):
    ordered = jnp.sort(params["first"]["kernel"])  # marked: sort
    grown = params["second"]["kernel"] + 1.0  # marked: add
    return x @ ordered @ jax.jit(jnp.sin)(grown)


def test_every_use_without_a_low_rank_form_is_listed_with_primitive_kernel_and_line():
    tree = randomised(wrap({"first": layer(1), "second": layer(2)}, 2))
    with pytest.raises(ValueError) as error:
        adapt(odd)(tree, X)
    first, *uses, fix = str(error.value).splitlines()
    assert first == "adapt: 2 uses of an adapted kernel with no low-rank form."
    assert re.fullmatch(rf"  'first/kernel' in `sort`  at .*test_adapt\.py:{line_of('marked: sort')} \(odd\)", uses[0])
    assert re.fullmatch(rf"  'second/kernel' in `add`  at .*test_adapt\.py:{line_of('marked: add')} \(odd\)", uses[1])
    assert len(uses) == 2 and "materialize=True" in fix and "wrap's targets" in fix
    close(adapt(odd, materialize=True)(tree, X), odd(merge(tree), X), 1e-5)


@pytest.mark.parametrize(
    "fn, primitive",
    [
        (lambda p, x: x @ jax.nn.relu(p["kernel"]), "custom_jvp_call"),
        (lambda p, x: x @ seven(p["kernel"]), "custom_vjp_call"),
        (lambda p, x: x @ (p["kernel"] * x[0]), "mul"),
        (lambda p, x: x @ (2.0 / p["kernel"]), "div"),
        (lambda p, x: x @ (p["kernel"] @ p["kernel"]), "dot_general"),
        (lambda p, x: x @ p["kernel"].reshape(4, 9).T.reshape(6, 6), "reshape"),
        (lambda p, x: x @ jnp.concatenate([p["kernel"], p["kernel"]], 1), "concatenate"),
        (lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["kernel"], lambda: p["kernel"].T), "cond"),
        (lambda p, x: jax.lax.scan(lambda w, _: (w.T, x @ w), p["kernel"], None, 2)[1], "scan"),
        (lambda p, x: x * (jnp.linalg.norm(p["kernel"], axis=0) > 1), "mul"),
    ],
)
def test_what_has_no_low_rank_form_is_an_error_and_is_right_when_materialised(fn, primitive):
    with pytest.raises(ValueError, match=rf"(?s)adapt: \d use.*\n  'kernel' in `{primitive}`  at .*test_adapt\.py:\d+"):
        adapt(fn)(wrapped(), X)
    close(adapt(fn, materialize=True)(wrapped(), X), fn(merge(wrapped()), X), 1e-4)


def test_a_use_in_a_loop_whose_body_is_traced_twice_is_counted_once():
    # The carry starts weakly typed, so scan traces its body once more.
    step = lambda c, w: (c + (X @ jnp.sort(w)).sum(), None)
    fn = lambda params: jax.lax.scan(step, 0.0, params["kernel"])[0]
    tree = wrap({"kernel": jnp.ones((2, 6, 6))}, 2, layout={"kernel": "sio"})
    with pytest.raises(ValueError, match=r"adapt: 1 use of an adapted kernel with no low-rank form\.\n.*\nFix"):
        adapt(fn)(tree)


def test_a_kernel_returned_as_it_is_says_so():
    fn = lambda params, x: (params, x @ params["kernel"])
    with pytest.raises(ValueError, match=r"adapt: 1 use .*\n  'kernel' returned by the function as it is\nFix:"):
        adapt(fn)(wrapped(), X)
    params, y = adapt(fn, materialize=True)(wrapped(), X)
    close((params, y), (merge(wrapped()), X @ merge(wrapped())["kernel"]))


def test_adapter_leaves_without_their_kernel_are_an_error_that_names_them():
    tree = {"dense": wrapped()}
    del tree["dense"]["kernel"]
    with pytest.raises(ValueError, match=r"adapt: 1 adapter doesn't fit its kernel\.\n  '.*kernel'.*missing.*\nFix:"):
        adapt(lambda p, x: dense(p["dense"], x))(tree, X)


def test_the_functions_own_error_comes_through():
    with pytest.raises(KeyError, match="absent"):
        adapt(lambda params, x: params["absent"])(wrapped(), X)


def small():
    """A wrapped kernel with a random B."""
    wrapped = wrap({"kernel": jax.random.normal(jax.random.key(0), (6, 4))}, 2)
    wrapped["kernel_lora_b"] = jax.random.normal(jax.random.key(1), wrapped["kernel_lora_b"].shape)
    return wrapped


def test_arguments_that_only_look_like_trees_pass_as_they_are():
    fn = adapt(lambda params, x, *rest: x @ params["kernel"])
    x, params = jnp.ones((3, 6)), small()
    for other in (UserDict(a=1), MappingProxyType({"a": 1})):
        np.testing.assert_array_equal(fn(params, x, other), fn(params, x))


def test_signed_zeros_are_different_statics():
    fn = adapt(lambda params, x, sign: x @ params["kernel"] * math.copysign(1.0, sign))
    x, params = jnp.ones((3, 6)), small()
    np.testing.assert_array_equal(fn(params, x, 0.0), -fn(params, x, -0.0))


def test_every_adapter_that_does_not_fit_is_named_with_its_whole_path():
    bad = {"encoder": {name: small() for name in ("first", "second")}, "fine": small()}
    for node in bad["encoder"].values():
        node["kernel_lora_a"] = jnp.ones((5, 2))
    with pytest.raises(ValueError, match=r"2 adapters(.|\n)*'params/encoder/first/kernel'(.|\n)*encoder/second/kernel"):
        adapt(lambda tree: tree)({"params": bad})


@pytest.mark.parametrize("view", [lambda w: w[:, jnp.array([2, 0, 3])], lambda w: w[:, :0]], ids=["columns", "nothing"])
def test_a_choice_of_columns_stays_low_rank(view):
    fn = lambda params, x: x @ view(params["kernel"])
    x, params = jnp.ones((3, 6)), small()
    np.testing.assert_allclose(adapt(fn)(params, x), fn(merge(params), x), rtol=1e-5, atol=1e-6)
    added = [eqn for eqn in jax.make_jaxpr(adapt(fn))(params, x).eqns if eqn.primitive.name == "add"]
    assert all(eqn.outvars[0].aval.shape[0] == 3 for eqn in added if eqn.outvars[0].aval.ndim == 2)


def test_a_table_of_one_row_is_looked_up():
    wrapped = wrap({"table": jnp.ones((1, 4))}, 1, targets=["table"])
    wrapped["table_lora_b"] = jnp.ones((1, 4))
    fn = lambda params, ids: params["table"][ids] + 1
    ids = jnp.zeros((2, 3), jnp.int32)
    np.testing.assert_allclose(adapt(fn)(wrapped, ids), fn(merge(wrapped), ids), rtol=1e-6)


ELSEWHERE = """
import sys
import jax, jax.numpy as jnp, jlora
assert jax.__file__.startswith(sys.argv[1]), jax.__file__
params = jlora.wrap({"kernel": jnp.ones((4, 4))}, 2)
try:
    jlora.adapt(lambda params: jnp.sort(params["kernel"]))(params)  # the user's line
except ValueError as error:
    print(error)
"""


def test_an_errors_line_is_the_users_where_jax_is_outside_site_packages(tmp_path):
    libraries, script = tmp_path / "libraries", tmp_path / "model.py"
    libraries.mkdir()
    for name in ("jax", "jaxlib"):
        (libraries / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    script.write_text(ELSEWHERE)
    paths = os.pathsep.join(
        [str(libraries), *filter(None, [os.environ.get("PYTHONPATH")]), str(Path(__file__).parents[2])]
    )
    command = [sys.executable, str(script), str(libraries)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    line = ELSEWHERE.splitlines().index(next(row for row in ELSEWHERE.splitlines() if "the user's" in row)) + 1
    assert f"'kernel' in `sort`  at {script}:{line} (<lambda>)" in done.stdout
