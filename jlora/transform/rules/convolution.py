"""Convolutions: convolve with A, then mix channels with B; or the reverse where a gradient transposed the kernel."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jlora.transform import jaxprs
from jlora.transform.jaxprs import Conv
from jlora.transform.kernel import AdaptedKernel, Factor
from jlora.transform.registry import Call, register_rule


@register_rule("conv_general_dilated", operands=1)
def convolution(call: Call, x: Any, w: AdaptedKernel) -> Any:
    """A factor with only the out axis, or only the in axis, is a 1x1 convolution; the other holds the window."""
    how = jaxprs.conv(call.equation)
    out, inner = how.rhs_spec[:2]
    y = call(x, w.kernel)
    wide = [n for n in range(w.ndim) if w.shape[n] != 1]

    def low_rank(a: Factor, b: Factor) -> Any:
        rows = call.adapter_input(x, w, y.dtype)
        axes_of = lambda factor: {n for n in wide if w.applies(factor)[n]}
        for window, mixer in ((a, b), (b, a)):
            ours, theirs = axes_of(window), axes_of(mixer)
            if how.batch_groups == 1 and theirs <= {out} and out not in ours:
                factors = _split_axis(window, mixer, out, w.shape, rows.dtype)
                return _convolve_then_mix(rows, *factors, how).astype(y.dtype)
            if how.batch_groups == how.groups == 1 and theirs <= {inner} and inner not in ours:
                factors = _split_axis(window, mixer, inner, w.shape, rows.dtype)
                return _mix_then_convolve(rows, *factors, how).astype(y.dtype)
        call.refuse()

    return y + call.apply_factors(w, ["o" if n == out else "i" for n in range(w.ndim)], low_rank)


def _split_axis(
    a: Factor, b: Factor, axis: int, sizes: Sequence[int], dtype: Any
) -> tuple[Factor, Float[Array, "size rank"]]:
    """The factors with every axis of the kernel but one in a, and that one alone in b; broadcast axes are repeated."""
    a = jnp.broadcast_to(a, [*(1 if n == axis else size for n, size in enumerate(sizes)), a.shape[-1]])
    b = jnp.broadcast_to(b.reshape(b.shape[axis], b.shape[-1]), (sizes[axis], b.shape[-1]))
    return a.astype(dtype), b.astype(dtype)


def _convolve_then_mix(x: Any, a: Factor, b: Float[Array, "out rank"], how: Conv) -> Any:
    out, features, groups = how.rhs_spec[0], how.out_spec[1], how.groups
    kernel = jnp.moveaxis(jnp.squeeze(a, out), -1, out)
    # Every group reads its own channels through the same A.
    kernel = jnp.tile(kernel, [groups if n == out else 1 for n in range(kernel.ndim)])
    narrow = jax.lax.conv_general_dilated(x, kernel, feature_group_count=groups, **how.options)
    narrow = jnp.moveaxis(narrow, features, -1)
    # All sizes are written out: -1 has no meaning where the batch is empty.
    narrow = narrow.reshape(*narrow.shape[:-1], groups, a.shape[-1])
    per_group = b.reshape(groups, len(b) // groups, b.shape[-1])
    y = jnp.einsum("...gr,gor->...go", narrow, per_group, precision=how.options["precision"])
    return jnp.moveaxis(y.reshape(*y.shape[:-2], len(b)), -1, features)


def _mix_then_convolve(x: Any, a: Factor, b: Float[Array, "inner rank"], how: Conv) -> Any:
    inner, features = how.rhs_spec[1], how.lhs_spec[1]
    narrow = jnp.tensordot(x, b, axes=([features], [0]), precision=how.options["precision"])
    kernel = jnp.moveaxis(jnp.squeeze(a, inner), -1, inner)
    return jax.lax.conv_general_dilated(jnp.moveaxis(narrow, -1, features), kernel, **how.options)
