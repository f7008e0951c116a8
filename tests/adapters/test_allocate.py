"""Ranks that `allocate` distributes keep to the budget and follow the importance of the kernels."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_trees import make_model, make_spectrum

import jlora
from jlora.adapters.allocate import allocate, gradient_norms
from jlora.adapters.resize import resize


def count_trainable(params: Any) -> int:
    return jlora.summary(params).trainable


def test_allocate_keeps_to_the_budget_and_wrap_and_resize_take_it():
    params, _ = make_model()
    plain = jlora.unwrap(params)
    norms = {path: 10.0**n for n, path in enumerate(jlora.spectrum(params))}
    for importance in (jlora.spectrum(params), norms):
        for budget in (1, 1.7, 2, 3.5):
            ranks = allocate(importance, params, budget=budget)
            new = jlora.wrap(plain, targets=ranks)
            assert [row.rank for row in jlora.summary(new).rows] == list(ranks.values())
            assert count_trainable(new) <= budget * count_trainable(jlora.wrap(plain, 1)) < count_trainable(new) + 20
            assert count_trainable(resize(params, rank=ranks)) == count_trainable(new)
    assert list(allocate(norms, params, budget=3, low=2, high=4).values()) == [2, 3, 4]
    assert list(allocate(norms, params, budget=100).values()) == [6, 10, 6]


def test_by_spectra_the_choice_is_the_best_of_all_where_kernels_are_of_one_size():
    params = jlora.wrap({name: {"kernel": jnp.ones((9, 9))} for name in "abc"}, 4)
    draw = np.random.default_rng(0)
    for budget in (1, 2, 2.4, 3):
        values = {f"{name}/kernel": make_spectrum(np.sort(draw.exponential(size=4))[::-1]) for name in "abc"}
        kept = lambda ranks, values=values: sum(
            np.square(result.singular_values[:n]).sum() for result, n in zip(values.values(), ranks, strict=True)
        )
        every = [ranks for ranks in itertools.product(range(1, 5), repeat=3) if sum(ranks) <= 3 * budget]
        chosen = allocate(values, params, budget=budget)
        assert kept(chosen.values()) == pytest.approx(max(map(kept, every)))


def test_by_numbers_ranks_are_in_proportion():
    params = jlora.wrap({name: {"kernel": jnp.ones((40, 40))} for name in "abc"}, 1)
    assert allocate({"a/kernel": 1.0, "b/kernel": 2.0, "c/kernel": 5.0}, params, budget=8) == {
        "a/kernel": 3,
        "b/kernel": 6,
        "c/kernel": 15,
    }


def test_a_gradients_norm_is_of_both_halves_and_of_b_alone_at_the_first_step():
    _, forward = make_model()
    params = jlora.wrap(jlora.unwrap(make_model()[0]), 2)
    adapters, base = jlora.split(params)
    loss = lambda adapters, x: jnp.square(jlora.adapt(forward)(jlora.join(adapters, base), x)).sum()
    x = jax.random.normal(jax.random.key(9), (5, 6))
    grads = jax.grad(loss)(adapters, x)
    result = gradient_norms(grads)
    assert set(result) == {"up/kernel", "middle/kernel", "down.x+y/kernel"}
    for name, leaves in grads.items():
        assert not np.any(leaves["kernel_lora_a"])
        assert result[f"{name}/kernel"] == pytest.approx(np.linalg.norm(leaves["kernel_lora_b"]), rel=1e-5)
    assert gradient_norms({"kernel_lora_a": np.full(4, 3.0), "kernel_lora_b": np.full(4, 4.0), "bias": 1.0}) == {
        "kernel": 10.0
    }


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({"up/kernel": None}, {}, "'up/kernel'  missing"),
        ({"upp/kernel": 1.0}, {}, "'upp/kernel'  not wrapped, nearest: 'up/kernel'"),
        ({"up/kernel": -1.0}, {}, "'up/kernel'  -1.0"),
        ({"up/kernel": math.nan}, {}, "'up/kernel'  nan"),
        (
            dict.fromkeys(("up/kernel", "middle/kernel", "down.x+y/kernel"), 0.0),
            {},
            "the importance of every kernel is zero",
        ),
        ({}, {"low": 0}, "low 0"),
        ({}, {"low": 1.5}, "low 1.5"),
        ({}, {"low": 3, "high": 2}, "low 3, high 2"),
        ({}, {"budget": 0.5}, "budget of 0.5 is less than rank 1"),
        ({}, {"budget": math.inf}, "budget of inf"),
    ],
)
def test_allocate_names_what_is_wrong(change, options, words):
    params, _ = make_model()
    importance = dict.fromkeys(jlora.spectrum(params), 1.0) | change
    importance = {path: number for path, number in importance.items() if number is not None}
    with pytest.raises(ValueError, match=words):
        allocate(importance, params, **{"budget": 2} | options)


def test_spectra_and_numbers_are_not_mixed():
    params, _ = make_model()
    with pytest.raises(TypeError, match="can't be compared"):
        allocate(jlora.spectrum(params) | {"up/kernel": 1.0}, params, budget=2)


def test_a_tree_without_the_gradient_of_an_adapter_is_refused():
    with pytest.raises(ValueError, match="no gradient of an adapter"):
        gradient_norms(jlora.unwrap(make_model()[0]))
