"""Matrix products: x W becomes x W + (x A) B."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora.transform import jaxprs
from jlora.transform.kernel import AdaptedKernel, Factor
from jlora.transform.registry import Call, register_rule


@register_rule("dot_general")
def dot_general(call: Call, left: Any, right: Any) -> Any:
    """A contraction with one operand that is not adapted, in any labeling of the axes."""
    if isinstance(left, AdaptedKernel) and isinstance(right, AdaptedKernel):
        call.refuse()
    dot = jaxprs.dot(call.equation)
    side = int(isinstance(right, AdaptedKernel))
    w, x = (right, left) if side else (left, right)
    y = call(x, w.kernel) if side else call(w.kernel, x)
    labels = [x.ndim + n for n in range(w.ndim)]
    for pairs in (dot.contract, dot.batch):
        for n, m in zip(pairs[side], pairs[1 - side], strict=True):
            labels[n] = m
    free_x = [n for n in range(x.ndim) if n not in dot.contract[1 - side] and n not in dot.batch[1 - side]]
    free_w = [label for label in labels if label >= x.ndim]
    out = [*dot.batch[1 - side], *(free_x + free_w if side else free_w + free_x)]
    return y + call.contract(x, w, labels, out, precision=dot.precision, dtype=y.dtype)


@register_rule("ragged_dot_general", operands=1)
def ragged_dot(call: Call, x: Any, w: AdaptedKernel, sizes: Any, *rest: Any) -> Any:
    """Experts: the rows of each group are multiplied with that group's A and B."""
    how = jaxprs.ragged_dot(call.equation)
    if not how.plain:
        call.refuse()
    y = call(x, w.kernel, sizes, *rest)
    (inner,) = how.contract[1]
    (out,) = {0, 1, 2} - {inner, how.group_axis}

    def low_rank(a: Factor, b: Factor) -> Any:
        if a.shape[out] != 1:
            a, b = b, a
        if a.shape[out] != 1 or b.shape[inner] != 1 or {f.shape[how.group_axis] for f in (a, b)} != {sizes.shape[0]}:
            call.refuse()
        a = jnp.einsum(a, [0, 1, 2, 3], [how.group_axis, inner, 3])
        b = jnp.einsum(b, [0, 1, 2, 3], [how.group_axis, 3, out])
        rows = call.adapter_input(x, w, y.dtype)
        narrow = jax.lax.ragged_dot(rows, a.astype(rows.dtype), sizes, precision=how.precision)
        wide = jax.lax.ragged_dot(narrow, b.astype(rows.dtype), sizes, precision=how.precision)
        return wide.astype(y.dtype)

    roles = ["s" if n == how.group_axis else "i" if n == inner else "o" for n in range(3)]
    return y + call.apply_factors(w, roles, low_rank)
