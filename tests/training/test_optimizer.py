"""`jlora.optimizer`: the loop over a whole tree, in which frozen leaves stay frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, nnx
from flax.training.train_state import TrainState

from jlora.training.optimizer import optimizer
from jlora.transform.adapt import adapt
from jlora.tree.paths import flatten
from jlora.tree.splitting import join, split
from jlora.tree.wrapping import wrap

CONTAINERS = {"dict": dict, "FrozenDict": core.freeze, "State": nnx.State}


def network(params, x):
    for name in ("first", "second"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"]


forward = adapt(network)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def base_params(width=24):
    layer = lambda n, m: {"kernel": draw(n, n, m) / n**0.5, "bias": jnp.zeros(m)}
    params = {"first": layer(8, width), "second": layer(width, width + 1), "head": layer(width + 1, 5)}
    params["first"]["bias"] = jnp.asarray(np.array([-0.0, 1e-40, 0.0] * (width // 3), np.float32))
    params["second"]["bias"] = params["second"]["bias"].astype(jnp.bfloat16)
    params["count"] = jnp.arange(3)
    return params


def wrapped(kind="dict", **options):
    return wrap(CONTAINERS[kind](base_params(**options)), rank=2, targets=["first", "second"])


def loss_of(params, x, y):
    return jnp.mean((forward(params, x) - y) ** 2)


def batch():
    return draw(2, 16, 8), draw(3, 16, 5)


def chain():
    return optax.chain(optax.clip_by_global_norm(0.05), optax.adamw(1e-2, weight_decay=0.1))


def raw(leaf):
    return np.asarray(leaf).tobytes()


@pytest.mark.parametrize("kind", CONTAINERS)
def test_frozen_leaves_are_bit_identical_after_ten_steps(kind):
    params = wrapped(kind)
    before = {path: raw(leaf) for path, leaf in flatten(params).items()}
    tx = optimizer(chain(), params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_of, allow_int=True)(params, *batch())
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(10):
        params, state = step(params, state)
    assert isinstance(params, type(wrapped(kind)))
    for path, leaf in flatten(params).items():
        assert (raw(leaf) == before[path]) is not path.endswith(("_lora_a", "_lora_b")), path


def test_minus_zero_keeps_its_sign_outside_of_jit_too():
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.array([-0.0, 0.0], np.float32)}
    params = wrap(params, rank=1)
    tx = optimizer(optax.sgd(0.1), params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.signbit(optax.apply_updates(params, updates)["bias"]).tolist() == [True, False]


def test_state_holds_no_array_of_a_frozen_leafs_size():
    params = wrapped()
    shapes = {leaf.shape for leaf in jax.tree.leaves(optimizer(chain(), params).init(params))}
    assert shapes == {leaf.shape for leaf in jax.tree.leaves(split(params)[0])} | {()}


def test_the_global_norm_is_computed_over_the_trainable_leaves():
    params, (x, y) = wrapped(), batch()
    adapters, base = split(params, train=["head"])

    @jax.jit
    def halves(adapters):
        grads = jax.grad(lambda adapters: loss_of(join(adapters, base), x, y))(adapters)
        return chain().update(grads, chain().init(adapters), adapters)[0]

    @jax.jit
    def whole(params):
        tx = optimizer(chain(), params, train=["head"])
        return tx.update(jax.grad(loss_of, allow_int=True)(params, x, y), tx.init(params), params)[0]

    expected, actual = flatten(halves(adapters)), flatten(whole(params))
    assert {path for path in expected if "_lora_" not in path} == {"head/kernel", "head/bias"}
    for path, update in expected.items():
        np.testing.assert_allclose(actual[path], update, rtol=1e-5, atol=1e-8, err_msg=path)


def flops(step, *args):
    return jax.jit(step).lower(*args).compile().cost_analysis()["flops"]


def test_xla_drops_the_gradients_of_frozen_kernels():
    params, (x, y) = wrap(base_params(width=384), rank=2, targets=["first", "second"]), batch()
    x, y = jnp.tile(x, (8, 1)), jnp.tile(y, (8, 1))
    adapters, base = split(params)

    def whole(params, tx):
        grads = jax.grad(loss_of, allow_int=True)(params, x, y)
        return tx.update(grads, tx.init(params), params)[0]

    def halves(adapters, base):
        grads = jax.grad(lambda adapters: loss_of(join(adapters, base), x, y))(adapters)
        return chain().update(grads, chain().init(adapters), adapters)[0]

    ours = flops(lambda params: whole(params, optimizer(chain(), params)), params)
    assert ours < 1.05 * flops(halves, adapters, base)


def test_flax_train_state_learns_with_it():
    params, (x, y) = wrapped(), batch()
    del params["count"]  # flax's TrainState differentiates every leaf
    state = TrainState.create(apply_fn=forward, params=params, tx=optimizer(optax.adam(1e-2), params))

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(loss_of)(state.params, x, y))

    first = loss_of(state.params, x, y)
    for _ in range(30):
        state = step(state)
    assert loss_of(state.params, x, y) < 0.8 * first


def test_a_tree_without_adapters_and_a_wrong_train_name_are_errors():
    with pytest.raises(ValueError, match=r"optimizer: the tree has no adapter\.\n"):
        optimizer(chain(), base_params())
    with pytest.raises(ValueError, match=r"'hed'  nearest: 'head"):
        optimizer(chain(), wrapped(), train=["hed"])
