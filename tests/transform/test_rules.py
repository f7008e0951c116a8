"""Rules of primitives against the merged kernel, in float64: convolutions of every kind, drawn at random."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora import adapt, join, merge, split, wrap
from jlora.tree.paths import map_with_path


@dataclass(frozen=True)
class Convolution:
    """One call of `conv_general_dilated`, and how its kernel comes from the tree.

    Attributes:
        is_split: A or B has the kernel's output axis alone, and there are no batch groups: a low-rank form exists.
    """

    x: tuple[int, ...]
    stored: tuple[int, ...]
    layout: str
    is_split: bool
    kernel: tuple[int, ...]
    order: tuple[int, ...]
    options: dict[str, Any]

    def __call__(self, params: Any, x: Any) -> Any:
        kernel = jnp.broadcast_to(jnp.transpose(params["kernel"], self.order), self.kernel)
        return jax.lax.conv_general_dilated(x, kernel, **self.options)


def draw_convolution(rng: np.random.Generator) -> Convolution:
    """Strides, dilations, groups, batch groups, depthwise, orders of axes, empty batches and broadcast kernels."""
    pick = lambda *choices: choices[rng.integers(len(choices))]
    axes = "XY"[: pick(1, 2)]
    groups, batch_groups = pick((1, 1), (1, 1), (2, 1), (3, 1), (1, 2))
    inner = pick(1, 1, 2, 3)
    sizes = {"N": pick(0, 1, 2) * batch_groups, "C": inner * groups} | {axis: pick(1, 3, 5) for axis in axes}
    kernel = {"I": inner, "O": pick(1, 2, 3) * groups * batch_groups} | {axis: pick(1, 2, 3) for axis in axes}
    lhs, out = ("".join(rng.permutation(list("NC" + axes))) for _ in range(2))
    rhs = "".join(rng.permutation(list("IO" + axes)))
    shape = tuple(kernel[axis] for axis in rhs)
    broadcast = pick("", "", axes, axes[0], "I", "O")
    order = rng.permutation(len(rhs))
    stored = [rhs[n] for n in np.argsort(order)]
    roles = pick("io", "io", "oi", None)
    layout = "".join(pick("i", "o") if roles is None else roles[axis == "O"] for axis in stored)
    per_axis = lambda *choices: [pick(*choices) for _ in axes]
    return Convolution(
        x=tuple(sizes[axis] for axis in lhs),
        stored=tuple(1 if axis in broadcast else kernel[axis] for axis in stored),
        layout=layout,
        is_split=roles is not None and batch_groups == 1,
        kernel=shape,
        order=tuple(int(n) for n in order),
        options={
            "window_strides": per_axis(1, 2),
            "padding": pick("SAME", "VALID", [(2, 1)] * len(axes)),
            "lhs_dilation": per_axis(1, 1, 2),
            "rhs_dilation": per_axis(1, 1, 2),
            "dimension_numbers": (lhs, rhs, out),
            "feature_group_count": groups,
            "batch_group_count": batch_groups,
        },
    )


def draw_valid(seed: int) -> tuple[Convolution, dict[str, Any], Any]:
    """A convolution that JAX accepts, its wrapped tree with a random B, and its input."""
    rng = np.random.default_rng(seed)
    while True:
        program = draw_convolution(rng)
        params, x = {"kernel": jnp.asarray(rng.normal(size=program.stored))}, jnp.asarray(rng.normal(size=program.x))
        try:
            jax.eval_shape(program, params, x)
            wrapped = wrap(params, 1, alpha=1.5, layout={"kernel": program.layout})
        except (ValueError, TypeError):
            continue
        draw = lambda path, leaf: jnp.asarray(rng.normal(size=leaf.shape)) if path.endswith("_lora_b") else leaf
        return program, map_with_path(draw, wrapped), x


@pytest.mark.parametrize("seed", range(24))
def test_a_convolution_equals_that_of_the_merged_kernel_or_is_refused_by_name(seed: int) -> None:
    with jax.enable_x64(True):
        program, wrapped, x = draw_valid(seed)
        adapters, base = split(wrapped)

        def gradients(run: Any) -> Any:
            def loss(adapters: Any, x: Any) -> Any:
                y = run(join(adapters, base), x)
                return jnp.sum(jnp.sin(y)), y

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(adapters, x)

        try:
            both = jax.jit(lambda: (gradients(adapt(program)), gradients(lambda p, x: program(merge(p), x))))()
        except ValueError as error:
            assert not program.is_split
            assert str(error).startswith(
                "adapt: 1 use of an adapted kernel with no low-rank form.\n  'kernel' in `conv"
            )
            return
        for one, other in zip(*map(jax.tree.leaves, both), strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_the_drawn_convolutions_cover_what_they_are_for() -> None:
    with jax.enable_x64(True):
        programs = [draw_valid(seed)[0] for seed in range(24)]
    split_ones = [program for program in programs if program.is_split]
    empty = [program for program in split_ones if 0 in program.x]
    broadcast = [program for program in split_ones if np.prod(program.stored) < np.prod(program.kernel)]
    grouped = [program for program in split_ones if program.options["feature_group_count"] > 1]
    assert min(map(len, (empty, broadcast, grouped))) >= 3 and len(split_ones) < len(programs)
