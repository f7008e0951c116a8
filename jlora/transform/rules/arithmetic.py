"""Arithmetic that is linear in the kernel: b takes the scalar."""

from typing import Any

import jax.numpy as jnp

from jlora.transform.kernel import AdaptedKernel
from jlora.transform.registry import Call, register_rule


@register_rule("mul")
def multiply(call: Call, left: Any, right: Any) -> AdaptedKernel:
    """Times a scalar."""
    w, scalar = (left, right) if isinstance(left, AdaptedKernel) else (right, left)
    if isinstance(scalar, AdaptedKernel) or jnp.ndim(scalar):
        call.refuse()
    kernel = call(w.kernel, scalar) if w is left else call(scalar, w.kernel)
    return w.with_factors(kernel, lambda a, b: (a, b * _wide(scalar, b)))


@register_rule("div", operands=0)
def divide(call: Call, w: AdaptedKernel, scalar: Any) -> AdaptedKernel:
    """Divided by a scalar."""
    if jnp.ndim(scalar):
        call.refuse()
    return w.with_factors(call(w.kernel, scalar), lambda a, b: (a, b / _wide(scalar, b)))


@register_rule("neg")
def negate(call: Call, w: AdaptedKernel) -> AdaptedKernel:
    """The sign goes to b."""
    return w.with_factors(call(w.kernel), lambda a, b: (a, -b))


def _wide(scalar: Any, b: Any) -> Any:
    """The scalar in the wider of both dtypes."""
    scalar = jnp.asarray(scalar)
    return scalar.astype(jnp.promote_types(b.dtype, scalar.dtype))
