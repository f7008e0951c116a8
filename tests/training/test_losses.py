"""The chunked cross entropy against optax's over all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jlora.training.losses import cross_entropy
from jlora.transform.adapt import adapt
from jlora.tree.splitting import join, split
from jlora.tree.wrapping import merge, wrap


def head(params, hidden):
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def plain(logits_fn, params, hidden, labels, weights=None):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_fn(params, hidden), labels)
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def problem(tokens=(7, 9), features=6, vocab=13, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"head": {"kernel": draw(features, vocab), "bias": draw(vocab)}}
    weights = jnp.asarray(rng.uniform(size=tokens) * (rng.uniform(size=tokens) < 0.7), dtype)
    return params, draw(*tokens, features), jnp.asarray(rng.integers(0, vocab, tokens)), weights


def close(actual, expected, tolerance=1e-10):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 10, 63, 500])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradients_equal_optax_in_float64(chunk, weighted):
    with jax.enable_x64(True):
        params, hidden, labels, weights = problem()
        weights = weights if weighted else None
        ours = lambda p, h: 3 * cross_entropy(head, p, h, labels, weights, chunk=chunk)
        theirs = lambda p, h: 3 * plain(head, p, h, labels, weights)
        expected = jax.jit(jax.value_and_grad(theirs, (0, 1)))(params, hidden)
        close(jax.jit(jax.value_and_grad(ours, (0, 1)))(params, hidden), expected)
        close(jax.jit(ours)(params, hidden), expected[0])


def test_an_adapted_head_gets_the_gradients_that_merging_first_gives():
    with jax.enable_x64(True):
        params, hidden, labels, _ = problem()
        params = wrap(params, rank=2, alpha=3)
        params["head"]["kernel_lora_b"] = jax.random.normal(jax.random.key(5), (2, 13), jnp.float64)
        adapters, base = split(params)
        logits = adapt(head)
        ours = lambda a, h: cross_entropy(logits, join(a, base), h, labels, chunk=10)
        oracle = lambda a, h: plain(head, merge(join(a, base)), h, labels)
        actual, expected = (jax.jit(jax.value_and_grad(loss, (0, 1)))(adapters, hidden) for loss in (ours, oracle))
        close(actual, expected)


def test_it_works_under_vmap_over_adapters_and_inside_remat_and_scan():
    with jax.enable_x64(True):
        params, hidden, labels, _ = problem()
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
        ours = jax.remat(lambda p: cross_entropy(head, p, hidden, labels, chunk=10))
        expected = jax.jit(jax.vmap(jax.grad(lambda p: plain(head, p, hidden, labels))))(stack)
        close(jax.jit(jax.vmap(jax.grad(ours)))(stack), expected)
        scanned = lambda p: jax.lax.scan(lambda total, one: (total + ours(one), None), 0.0, p)[0]
        close(jax.jit(jax.grad(scanned))(stack), expected)


def compiled(loss, argnums, *args):
    return jax.jit(jax.grad(loss, argnums)).lower(*args).compile()


def test_the_logits_of_a_whole_batch_are_never_in_memory():
    params, hidden, labels, _ = problem((2048,), 32, 4096, jnp.float32)
    ours = compiled(lambda p, h: cross_entropy(head, p, h, labels, chunk=128), (0, 1), params, hidden)
    all_at_once = compiled(lambda p, h: plain(head, p, h, labels), (0, 1), params, hidden)
    logits = 2048 * 4096 * 4
    assert all_at_once.memory_analysis().temp_size_in_bytes >= logits
    assert ours.memory_analysis().temp_size_in_bytes < logits / 4


def test_a_frozen_head_needs_no_gradient_computation():
    params, hidden, labels, _ = problem((512,), 64, 512, jnp.float32)
    loss = lambda p, h: cross_entropy(head, p, h, labels, chunk=512)
    frozen, trained = (compiled(loss, argnums, params, hidden).cost_analysis()["flops"] for argnums in (1, (0, 1)))
    assert abs(frozen / trained - 2 / 3) < 0.03  # logits and their gradient to hidden, without the kernel's


def test_a_masked_token_is_read_in_neither_label_nor_logits():
    params, hidden, labels, _ = problem(dtype=jnp.float32)
    params["head"]["bias"] = params["head"]["bias"].at[0].set(-jnp.inf)
    keep = jnp.arange(63).reshape(7, 9) % 3 > 0
    labels = jnp.maximum(labels, 1)
    loss = jax.jit(jax.value_and_grad(lambda p, labels: cross_entropy(head, p, hidden, labels, keep, chunk=16)))
    expected, actual = loss(params, labels), loss(params, jnp.where(keep, labels, -100))
    assert bool(jnp.isfinite(expected[0]))
    close(actual, expected, 0)


def test_without_any_weight_loss_and_gradient_are_zero():
    params, hidden, labels, weights = problem(dtype=jnp.float32)
    loss = jax.jit(jax.value_and_grad(lambda p: cross_entropy(head, p, hidden, labels, 0 * weights)))
    loss, grads = loss(params)
    assert float(loss) == 0 and not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_gradients_of_a_bfloat16_head_are_summed_in_float32():
    params, hidden, labels, _ = problem((4096,), 4, 8, jnp.bfloat16)
    actual = jax.jit(jax.grad(lambda p: cross_entropy(head, p, hidden, labels, chunk=8)))(params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, hidden))
    expected = jax.jit(jax.grad(lambda p: plain(head, p, wide[1], labels)))(wide[0])
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.bfloat16
        # Logits rounded to bfloat16 leave under one percent; sums over 512 chunks in it would leave far more.
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


def test_arguments_that_do_not_fit_are_reported_together():
    params, hidden, labels, weights = problem(dtype=jnp.float32)
    with pytest.raises(ValueError, match="cross_entropy") as error:
        cross_entropy(head, params, hidden[0], labels.astype(jnp.float32), weights[0], chunk=0)
    text = str(error.value)
    assert all(part in text for part in ("hidden [9, 6] and labels [7, 9]", "weights [9]", "float32", "chunk=0"))
    with pytest.raises(ValueError, match="no tokens"):
        cross_entropy(head, params, hidden[:0], labels[:0])
