"""What an adapter used: singular values, the best smaller form, and ranks shared out."""

import itertools
import math
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapters import spectrum
from jlora.adapters.spectrum import Spectrum, allocate, gradient_norms, resize
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES
from jlora.tree.paths import flatten

LAYOUTS = {
    "dense": ("io", (12, 9)),
    "turned": ("oi", (9, 12)),
    "conv": ("iiio", (3, 2, 4, 10)),
    "query": ("ioo", (12, 3, 4)),
    "out": ("iio", (3, 4, 11)),
    "stacked": ("sio", (3, 10, 8)),
    "twice_stacked": ("ssio", (2, 3, 7, 9)),
    "mixed": ("isoo", (10, 3, 2, 6)),
    "mixed_in": ("oisi", (8, 3, 2, 4)),
}
RANK = 5


def wrapped(shape: tuple[int, ...], layout: str, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A kernel with an adapter that is random all over, its scaling another one in each layer."""
    draw = np.random.default_rng(1)
    a, b, scaling = (draw.normal(size=size) for size in layouts.pair_shapes(shape, layout, RANK))
    b = np.moveaxis(
        np.moveaxis(b, layouts.rank_axis(layout), -1) * 0.5 ** np.arange(RANK), -1, layouts.rank_axis(layout)
    )
    trio = (a, b, 1.5 + np.arange(scaling.size).reshape(scaling.shape))
    leaves = {"kernel" + affix: jnp.asarray(leaf, jnp.float32) for affix, leaf in zip(AFFIXES, trio, strict=True)}
    return {"kernel": jnp.asarray(draw.normal(size=shape)).astype(dtype), **leaves}


def matrices(full: np.ndarray, layout: str) -> np.ndarray:
    """A kernel-shaped array as (*stack, fan_in, fan_out)."""
    order = [n for kind in ("s", "iv", "o") for n, letter in enumerate(layout) if letter in kind]
    fan_in, fan_out = layouts.fans(full.shape, layout)
    stack = [full.shape[n] for n in order[: layout.count("s")]]
    return full.transpose(order).reshape(*stack, fan_in, fan_out)


def update(params: dict[str, Any], layout: str) -> np.ndarray:
    """The product scaling * AB in float64, as (*stack, fan_in, fan_out), by broadcasting the aligned pair."""
    a, b, scaling = (np.asarray(params["kernel" + affix], np.float64) for affix in AFFIXES)
    if layouts.ORDERED.fullmatch(layout):
        stack, inner, outer = (sum(letter in kind for letter in layout) for kind in ("s", "iv", "o"))
        full = a.reshape(*a.shape[:-1], *[1] * outer, a.shape[-1]) * np.moveaxis(b, stack, -1).reshape(
            *b.shape[:stack], *[1] * inner, *b.shape[stack + 1 :], b.shape[stack]
        )
    else:
        full = a * b
    matrix = matrices(full.sum(-1), layout)
    return matrix * scaling[..., None, None]


@pytest.mark.parametrize("layout, shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_spectrum_is_numpys_of_the_explicit_product(layout, shape, dtype):
    params = wrapped(shape, layout, dtype)
    found = jlora.spectrum(params, overlap=True)["kernel"]
    full, kernel = update(params, layout), matrices(np.asarray(params["kernel"]).astype(np.float64), layout)
    expected = np.linalg.svd(full, compute_uv=False)[..., :RANK]
    np.testing.assert_allclose(found.singular_values, expected, rtol=1e-6)
    np.testing.assert_allclose(found.norm, np.linalg.norm(full, axis=(-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(found.kernel_norm, np.linalg.norm(kernel, axis=(-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(found.relative_norm, found.norm / found.kernel_norm)
    u, _, vt = np.linalg.svd(kernel, full_matrices=False)
    u, v = u[..., :RANK], vt[..., :RANK, :].swapaxes(-1, -2)
    for share, inside in zip(
        found.overlap, (u @ u.swapaxes(-1, -2) @ full, full @ v @ v.swapaxes(-1, -2)), strict=True
    ):
        np.testing.assert_allclose(share, np.square(inside).sum((-2, -1)) / np.square(full).sum((-2, -1)), rtol=1e-6)


def of(values: Any) -> Spectrum:
    return Spectrum(singular_values=np.asarray(values, float), kernel_norm=np.ones(np.shape(values)[:-1]))


def test_the_effective_rank_counts_equal_values_and_energy_adds_up():
    rows = of([[2, 2, 2, 0], [7, 0, 0, 0], [0, 0, 0, 0], [1e-200, 1e-200, 0, 0]])
    np.testing.assert_allclose(rows.effective_rank, [3, 1, 0, 2])
    p = np.array([4, 2, 1, 1]) / 8
    one = of([4, 2, 1, 1])
    assert one.effective_rank == pytest.approx(math.prod(p**-p))
    np.testing.assert_allclose(one.energy, np.array([16, 20, 21, 22]) / 22)
    np.testing.assert_array_equal(rows.rank_for(0.9), [3, 1, 1, 2])
    assert [int(one.rank_for(share)) for share in (0.5, 0.9, 0.95, 1.0)] == [1, 2, 3, 4]


def test_an_adapter_inside_its_kernels_leading_directions_overlaps_whole():
    kernel = np.diag(np.arange(8.0, 0, -1)).astype(np.float32)
    params = jlora.wrap({"kernel": jnp.asarray(kernel)}, 2)
    params |= {"kernel_lora_a": jnp.eye(8)[:, :2], "kernel_lora_b": jnp.eye(8)[6:]}
    assert jlora.spectrum(params, overlap=True)["kernel"].overlap == (pytest.approx(1), pytest.approx(0))
    assert jlora.spectrum(params)["kernel"].overlap is None


def test_a_diverged_layer_is_nan_and_leaves_the_others_alone():
    params = wrapped((3, 10, 8), "sio")
    params["kernel_lora_a"] = params["kernel_lora_a"].at[1, 0, 0].set(jnp.inf)
    found = jlora.spectrum(params)["kernel"]
    np.testing.assert_array_equal(np.isfinite(found.norm), [True, False, True])
    with pytest.raises(ValueError, match="not finite"):
        resize(params, rank=2)


def test_nothing_of_a_kernels_size_is_allocated():
    params = {"kernel": jnp.ones((2048, 2048)), "kernel_lora_scaling": jnp.ones(())}
    params |= {"kernel_lora_a": jnp.ones((2048, 8)), "kernel_lora_b": jnp.ones((8, 2048))}
    for run in (jlora.spectrum, lambda params: resize(params, rank=4)):
        tracemalloc.start()
        try:
            run(params)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < params["kernel"].nbytes / 8


@pytest.mark.parametrize("layout, shape", LAYOUTS.values(), ids=LAYOUTS)
def test_resize_is_the_truncated_svd(layout, shape):
    params = wrapped(shape, layout, jnp.bfloat16)
    smaller = resize(params, rank=2)
    u, s, vt = np.linalg.svd(update(params, layout), full_matrices=False)
    best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    np.testing.assert_allclose(update(smaller, layout), best, atol=1e-5 * s.max())
    assert smaller["kernel"] is params["kernel"]
    assert smaller["kernel_lora_scaling"] is params["kernel_lora_scaling"]
    assert {smaller["kernel" + affix].dtype for affix in AFFIXES} == {jnp.dtype("float32")}
    assert jlora.summary(smaller).rows[0].rank == 2


def test_by_energy_a_kernel_gets_the_least_rank_that_keeps_it_in_every_layer():
    params = wrapped((3, 10, 8), "sio")
    full = update(params, "sio")
    squares = np.square(np.linalg.svd(full, compute_uv=False)[..., :RANK])
    for energy in (0.5, 0.9, 0.99, 0.9999, 1.0):
        smaller = resize(params, energy=energy)
        rank = smaller["kernel_lora_a"].shape[-1]
        kept = lambda n: (squares[:, :n].sum(-1) / squares.sum(-1)).min()
        assert kept(rank) >= energy - 1e-12
        assert rank == 1 or kept(rank - 1) < energy
    assert resize(params, energy=1.0)["kernel_lora_a"] is params["kernel_lora_a"]


def model() -> tuple[Any, Any]:
    """Three layers with a random adapter of rank 4 on each."""
    draw, sizes = np.random.default_rng(0), {"up": (6, 10), "middle": (10, 10), "down.x+y": (10, 6)}
    params = {name: {"kernel": jnp.asarray(draw.normal(size=size), jnp.float32)} for name, size in sizes.items()}
    params = jlora.wrap(params, 4)
    for leaves in params.values():
        leaves["kernel_lora_b"] = jnp.asarray(draw.normal(size=leaves["kernel_lora_b"].shape), jnp.float32)

    def forward(params: Any, x: Any) -> Any:
        for name in sizes:
            x = jnp.tanh(x @ params[name]["kernel"])
        return x

    return params, forward


def test_a_function_sees_the_same_through_fewer_columns_where_the_rest_was_unused():
    params, forward = model()
    wide = resize(params, rank=6)
    assert {leaf.shape[-1] for path, leaf in flatten(wide).items() if path.endswith("_lora_a")} == {6}
    narrow = resize(wide, energy=1.0)
    assert all(row.rank <= 4 for row in jlora.summary(narrow).rows)
    x = jax.random.normal(jax.random.key(9), (5, 6))
    outputs = [jlora.adapt(forward)(tree, x) for tree in (params, wide, narrow)]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_ranks_are_set_by_path_and_by_pattern_and_the_rest_stays():
    params, _ = model()
    ranks = lambda tree: {row.path: row.rank for row in jlora.summary(tree).rows}
    assert list(ranks(resize(params, rank={"down.x+y/kernel": 1, "u.*": 2})).values()) == [2, 4, 1]
    assert list(ranks(resize(params, rank={("up", "middle"): 3, ".*": 5})).values()) == [3, 3, 5]


def parameters(params: Any) -> int:
    return jlora.summary(params).trainable


def test_allocate_keeps_to_the_budget_and_wrap_and_resize_take_it():
    params, _ = model()
    plain = jlora.unwrap(params)
    norms = {path: 10.0**n for n, path in enumerate(jlora.spectrum(params))}
    for importance in (jlora.spectrum(params), norms):
        for budget in (1, 1.7, 2, 3.5):
            ranks = allocate(importance, params, budget=budget)
            new = jlora.wrap(plain, targets=ranks)
            assert [row.rank for row in jlora.summary(new).rows] == list(ranks.values())
            assert parameters(new) <= budget * parameters(jlora.wrap(plain, 1)) < parameters(new) + 20
            assert parameters(resize(params, rank=ranks)) == parameters(new)
    assert list(allocate(norms, params, budget=3, low=2, high=4).values()) == [2, 3, 4]
    assert list(allocate(norms, params, budget=100).values()) == [6, 10, 6]


def test_by_spectra_the_choice_is_the_best_of_all_where_kernels_are_of_one_size():
    params = jlora.wrap({name: {"kernel": jnp.ones((9, 9))} for name in "abc"}, 4)
    draw = np.random.default_rng(0)
    for budget in (1, 2, 2.4, 3):
        values = {f"{name}/kernel": of(np.sort(draw.exponential(size=4))[::-1]) for name in "abc"}
        kept = lambda ranks, values=values: sum(
            np.square(found.singular_values[:n]).sum() for found, n in zip(values.values(), ranks, strict=True)
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
    _, forward = model()
    params = jlora.wrap(jlora.unwrap(model()[0]), 2)
    adapters, base = jlora.split(params)
    loss = lambda adapters, x: jnp.square(jlora.adapt(forward)(jlora.join(adapters, base), x)).sum()
    x = jax.random.normal(jax.random.key(9), (5, 6))
    grads = jax.grad(loss)(adapters, x)
    found = gradient_norms(grads)
    assert set(found) == {"up/kernel", "middle/kernel", "down.x+y/kernel"}
    for name, leaves in grads.items():
        assert not np.any(leaves["kernel_lora_a"])
        assert found[f"{name}/kernel"] == pytest.approx(np.linalg.norm(leaves["kernel_lora_b"]), rel=1e-5)
    assert gradient_norms({"kernel_lora_a": np.full(4, 3.0), "kernel_lora_b": np.full(4, 4.0), "bias": 1.0}) == {
        "kernel": 10.0
    }


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "neither of rank and energy"),
        ({"rank": 2, "energy": 0.9}, "both of rank and energy"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.01}, "energy is 1.01"),
        ({"energy": math.nan}, "energy is nan"),
        ({"rank": 0}, "'up/kernel'  rank 0, allowed 1 to 6"),
        ({"rank": 7}, "'down.x.y/kernel'  rank 7, allowed 1 to 6"),
        ({"rank": {"up/kernel": 0}}, "'up/kernel'  rank 0"),
        ({"rank": {"sideways/.*": 2}}, "'sideways/.*'  nearest"),
    ],
)
def test_resize_says_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        resize(model()[0], **options)


def test_a_rank_is_an_int_and_a_tree_is_wrapped_and_real():
    params, _ = model()
    with pytest.raises(TypeError, match="must be an int"):
        resize(params, rank=2.5)
    with pytest.raises(ValueError, match="the tree has no adapter"):
        resize(jlora.unwrap(params), rank=2)
    with pytest.raises(ValueError, match="3 adapters without values"):
        spectrum.spectrum(jax.eval_shape(lambda: params))
    with pytest.raises(ValueError, match="no gradient of an adapter"):
        gradient_norms(jlora.unwrap(params))


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({"up/kernel": None}, {}, "'up/kernel'  missing"),
        ({"upp/kernel": 1.0}, {}, "'upp/kernel'  not wrapped, nearest: 'up/kernel'"),
        ({"up/kernel": -1.0}, {}, "'up/kernel'  -1.0"),
        ({"up/kernel": math.nan}, {}, "'up/kernel'  nan"),
        (dict.fromkeys(("up/kernel", "middle/kernel", "down.x+y/kernel"), 0.0), {}, "no kernel has any importance"),
        ({}, {"low": 0}, "low 0"),
        ({}, {"low": 1.5}, "low 1.5"),
        ({}, {"low": 3, "high": 2}, "low 3, high 2"),
        ({}, {"budget": 0.5}, "budget of 0.5 is less than rank 1"),
        ({}, {"budget": math.inf}, "budget of inf"),
    ],
)
def test_allocate_says_what_is_wrong(change, options, words):
    params, _ = model()
    importance = dict.fromkeys(jlora.spectrum(params), 1.0) | change
    importance = {path: number for path, number in importance.items() if number is not None}
    with pytest.raises(ValueError, match=words):
        allocate(importance, params, **{"budget": 2} | options)


def test_spectra_and_numbers_are_not_mixed():
    params, _ = model()
    with pytest.raises(TypeError, match="can't be compared"):
        allocate(jlora.spectrum(params) | {"up/kernel": 1.0}, params, budget=2)
