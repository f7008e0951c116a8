"""Wrapped trees with random adapters in every layout, and the updates that NumPy computes for them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

import jlora
from jlora.adapters.spectrum import Spectrum
from jlora.tree import layouts
from jlora.tree.layouts import AFFIXES

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


def make_wrapped(shape: tuple[int, ...], layout: str, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A kernel with a random adapter; its scaling is different in each layer."""
    draw = np.random.default_rng(1)
    a, b, scaling = (draw.normal(size=size) for size in layouts.pair_shapes(shape, layout, RANK))
    b = np.moveaxis(
        np.moveaxis(b, layouts.rank_axis(layout), -1) * 0.5 ** np.arange(RANK), -1, layouts.rank_axis(layout)
    )
    trio = (a, b, 1.5 + np.arange(scaling.size).reshape(scaling.shape))
    leaves = {"kernel" + affix: jnp.asarray(leaf, jnp.float32) for affix, leaf in zip(AFFIXES, trio, strict=True)}
    return {"kernel": jnp.asarray(draw.normal(size=shape)).astype(dtype), **leaves}


def to_matrices(full: np.ndarray, layout: str) -> np.ndarray:
    """A kernel-shaped array as (*stack, fan_in, fan_out)."""
    order = [n for kind in ("s", "iv", "o") for n, letter in enumerate(layout) if letter in kind]
    fan_in, fan_out = layouts.fans(full.shape, layout)
    stack = [full.shape[n] for n in order[: layout.count("s")]]
    return full.transpose(order).reshape(*stack, fan_in, fan_out)


def compute_update(params: dict[str, Any], layout: str) -> np.ndarray:
    """The product scaling * AB in float64, as (*stack, fan_in, fan_out), by broadcasting the aligned pair."""
    a, b, scaling = (np.asarray(params["kernel" + affix], np.float64) for affix in AFFIXES)
    if layouts.ORDERED.fullmatch(layout):
        stack, inner, outer = (sum(letter in kind for letter in layout) for kind in ("s", "iv", "o"))
        full = a.reshape(*a.shape[:-1], *[1] * outer, a.shape[-1]) * np.moveaxis(b, stack, -1).reshape(
            *b.shape[:stack], *[1] * inner, *b.shape[stack + 1 :], b.shape[stack]
        )
    else:
        full = a * b
    matrix = to_matrices(full.sum(-1), layout)
    return matrix * scaling[..., None, None]


def make_spectrum(values: Any) -> Spectrum:
    """A spectrum with these singular values, of a kernel of norm 1."""
    return Spectrum(singular_values=np.asarray(values, float), kernel_norm=np.ones(np.shape(values)[:-1]))


def make_model() -> tuple[Any, Any]:
    """A wrapped tree of three layers, each with a random adapter of rank 4, and the function that reads it."""
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
