"""XLA's own count of temporary bytes: no path through the transform brings a copy of the base back."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora.models.decoder import Decoder, DecoderConfig
from jlora.tree.paths import partition

SMALL = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_layers": 4,
    "num_heads": 4,
    "scan": True,
    "remat": True,
}
KERNEL = 256 * 1024 * 4  # bytes of the small model's largest kernel in float32; its activations are far smaller


@cache
def temp_bytes(mode: str, tokens: int = 8, rank: int = 1, **changes: Any) -> int:
    """Temporary bytes of a compiled gradient: of the adapters, of the merged adapters, or of the base's norms."""
    model = Decoder(DecoderConfig(**(SMALL | changes)))
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    base = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids)["params"], ids)
    wrapped = jlora.wrap(
        base, rank, layout=jlora.infer_layout(lambda p, ids: model.apply({"params": p}, ids), base, ids)
    )
    if mode == "base":
        trained, frozen = norms_of(base)
        join, forward = jlora.join, model.apply
    else:
        trained, frozen = jlora.split(wrapped)
        join = jlora.join if mode == "adapt" else lambda a, b: jlora.merge(jlora.join(a, b))
        forward = jlora.adapt(model.apply) if mode == "adapt" else model.apply

    def loss(trained: Any, frozen: Any, ids: Any) -> Any:
        logits = forward({"params": join(trained, frozen)}, ids).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], ids[:, 1:]).mean()

    compiled = jax.jit(jax.grad(loss)).lower(trained, frozen, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def norms_of(base: Any) -> tuple[Any, Any]:
    return partition(base, lambda path, _: "norm" in path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "grown", [{}, {"intermediate_size": 2048}, {"num_layers": 8}], ids=["as is", "wider", "deeper"]
)
def test_the_adapters_add_no_kernel_to_the_bases_own_backward_pass(grown: Any, dtype: Any) -> None:
    """The base's own is the reference, since XLA on CPU copies one layer out of a scanned stack at a time."""
    extra = temp_bytes("adapt", dtype=dtype, **grown) - temp_bytes("base", dtype=dtype, **grown)
    assert extra < KERNEL / 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_twice_the_layers_take_no_kernel_more(dtype: Any) -> None:
    assert temp_bytes("adapt", dtype=dtype, num_layers=8) - temp_bytes("adapt", dtype=dtype) < KERNEL / 4


def test_merging_first_takes_at_least_fifteen_times_the_bytes_at_64_tokens() -> None:
    size = {
        "vocab_size": 32_000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_layers": 12,
        "num_heads": 12,
    }
    merged, adapted = (temp_bytes(mode, tokens=64, rank=8, **size) for mode in ("merge", "adapt"))
    assert merged >= 15 * adapted
