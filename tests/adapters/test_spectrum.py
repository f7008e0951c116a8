"""Spectra of adapters equal NumPy's singular values of the explicit products."""

import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapter_trees import LAYOUTS, RANK, compute_update, make_model, make_spectrum, make_wrapped, to_matrices

import jlora
from jlora.adapters.resize import resize
from jlora.adapters.spectrum import spectrum


@pytest.mark.parametrize("layout, shape", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_spectrum_is_numpys_of_the_explicit_product(layout, shape, dtype):
    params = make_wrapped(shape, layout, dtype)
    result = jlora.spectrum(params, overlap=True)["kernel"]
    full, kernel = compute_update(params, layout), to_matrices(np.asarray(params["kernel"]).astype(np.float64), layout)
    expected = np.linalg.svd(full, compute_uv=False)[..., :RANK]
    np.testing.assert_allclose(result.singular_values, expected, rtol=1e-6)
    np.testing.assert_allclose(result.norm, np.linalg.norm(full, axis=(-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(result.kernel_norm, np.linalg.norm(kernel, axis=(-2, -1)), rtol=1e-6)
    np.testing.assert_allclose(result.relative_norm, result.norm / result.kernel_norm)
    u, _, vt = np.linalg.svd(kernel, full_matrices=False)
    u, v = u[..., :RANK], vt[..., :RANK, :].swapaxes(-1, -2)
    for fraction, inside in zip(
        result.overlap, (u @ u.swapaxes(-1, -2) @ full, full @ v @ v.swapaxes(-1, -2)), strict=True
    ):
        np.testing.assert_allclose(fraction, np.square(inside).sum((-2, -1)) / np.square(full).sum((-2, -1)), rtol=1e-6)


def test_the_effective_rank_counts_equal_values_and_energy_adds_up():
    rows = make_spectrum([[2, 2, 2, 0], [7, 0, 0, 0], [0, 0, 0, 0], [1e-200, 1e-200, 0, 0]])
    np.testing.assert_allclose(rows.effective_rank, [3, 1, 0, 2])
    p = np.array([4, 2, 1, 1]) / 8
    one = make_spectrum([4, 2, 1, 1])
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
    params = make_wrapped((3, 10, 8), "sio")
    params["kernel_lora_a"] = params["kernel_lora_a"].at[1, 0, 0].set(jnp.inf)
    result = jlora.spectrum(params)["kernel"]
    np.testing.assert_array_equal(np.isfinite(result.norm), [True, False, True])
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


def test_an_abstract_tree_has_no_spectrum():
    params, _ = make_model()
    with pytest.raises(ValueError, match="3 adapters have no values"):
        spectrum(jax.eval_shape(lambda: params))
