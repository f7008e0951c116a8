"""Resized adapters are the best ones of their rank."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_trees import LAYOUTS, RANK, compute_update, make_model, make_wrapped

import jlora
from jlora.adapters.resize import resize
from jlora.tree.layouts import AFFIXES
from jlora.tree.paths import flatten


@pytest.mark.parametrize("layout, shape", LAYOUTS.values(), ids=LAYOUTS)
def test_resize_is_the_truncated_svd(layout, shape):
    params = make_wrapped(shape, layout, jnp.bfloat16)
    smaller = resize(params, rank=2)
    u, s, vt = np.linalg.svd(compute_update(params, layout), full_matrices=False)
    best = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :]
    np.testing.assert_allclose(compute_update(smaller, layout), best, atol=1e-5 * s.max())
    assert smaller["kernel"] is params["kernel"]
    assert smaller["kernel_lora_scaling"] is params["kernel_lora_scaling"]
    assert {smaller["kernel" + affix].dtype for affix in AFFIXES} == {jnp.dtype("float32")}
    assert jlora.summary(smaller).rows[0].rank == 2


def test_by_energy_a_kernel_gets_the_least_rank_that_keeps_it_in_every_layer():
    params = make_wrapped((3, 10, 8), "sio")
    full = compute_update(params, "sio")
    squares = np.square(np.linalg.svd(full, compute_uv=False)[..., :RANK])
    for energy in (0.5, 0.9, 0.99, 0.9999, 1.0):
        smaller = resize(params, energy=energy)
        rank = smaller["kernel_lora_a"].shape[-1]
        kept = lambda n: (squares[:, :n].sum(-1) / squares.sum(-1)).min()
        assert kept(rank) >= energy - 1e-12
        assert rank == 1 or kept(rank - 1) < energy
    assert resize(params, energy=1.0)["kernel_lora_a"] is params["kernel_lora_a"]


def test_a_function_sees_the_same_through_fewer_columns_where_the_rest_was_unused():
    params, forward = make_model()
    wide = resize(params, rank=6)
    assert {leaf.shape[-1] for path, leaf in flatten(wide).items() if path.endswith("_lora_a")} == {6}
    narrow = resize(wide, energy=1.0)
    assert all(row.rank <= 4 for row in jlora.summary(narrow).rows)
    x = jax.random.normal(jax.random.key(9), (5, 6))
    outputs = [jlora.adapt(forward)(tree, x) for tree in (params, wide, narrow)]
    for output in outputs[1:]:
        np.testing.assert_allclose(output, outputs[0], atol=1e-5)


def test_ranks_are_set_by_path_and_by_pattern_and_the_rest_stays():
    params, _ = make_model()
    ranks = lambda tree: {row.path: row.rank for row in jlora.summary(tree).rows}
    assert list(ranks(resize(params, rank={"down.x+y/kernel": 1, "u.*": 2})).values()) == [2, 4, 1]
    assert list(ranks(resize(params, rank={("up", "middle"): 3, ".*": 5})).values()) == [3, 3, 5]


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
def test_resize_names_what_is_wrong(options, words):
    with pytest.raises(ValueError, match=words):
        resize(make_model()[0], **options)


def test_a_rank_is_an_int_and_a_tree_is_wrapped():
    params, _ = make_model()
    with pytest.raises(TypeError, match="must be an int"):
        resize(params, rank=2.5)
    with pytest.raises(ValueError, match="the tree has no adapter"):
        resize(jlora.unwrap(params), rank=2)
