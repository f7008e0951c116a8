"""Cross entropy over a large vocabulary that keeps the logits of only one chunk of tokens in memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jlora.errors import JloraValueError
from jlora.tree.paths import Tree

LogitsFn = Callable[[Tree, Float[Array, "chunk features"]], Float[Array, "chunk vocab"]]


def cross_entropy(
    logits_fn: LogitsFn,
    params: Tree,
    hidden: Float[Array, "*tokens features"],
    labels: Int[Array, "*tokens"],
    weights: Float[Array, "*tokens"] | Bool[Array, "*tokens"] | None = None,
    *,
    chunk: int = 512,
) -> Float[Array, ""]:
    """The mean cross entropy of `logits_fn(params, hidden)`, in chunks over tokens.

    The gradient of a chunk is computed with its logits, in the forward pass. So the logits are computed once, and the
    memory for logits is chunk x vocab for any number of tokens. Only the leaves of `params` that are differentiated
    get a gradient: a frozen head needs no computation for it.

    Adapt the head alone, and call this function outside of any adapted function, because an adapted kernel can't enter
    the derivative rule of the loss::

        features = jlora.adapt(lambda params, ids: model.apply({"params": params}, ids, method="features"))
        head = jlora.adapt(lambda params, hidden: model.apply({"params": params}, hidden, method="head"))

        def loss_fn(params, batch, key):
            return cross_entropy(head, params, features(params, batch["ids"]), batch["labels"])

    Args:
        logits_fn: computes the logits of rows of `hidden`, each row independently. It must not close over arrays that
            are differentiated.
        params: passed to `logits_fn`, wrapped or not.
        hidden: features of every token.
        labels: the correct class of every token; not read where the weight is 0.
        weights: weight of every token, constant in differentiation; None means 1 for all.
        chunk: tokens per chunk.

    Returns:
        sum(weights * losses) / sum(weights) in float32 or wider; 0 where all weights are 0.

    Raises:
        ValueError: the shapes don't fit each other, there are no tokens, or chunk is below 1.

    Examples:
        >>> head = lambda params, hidden: hidden @ params["kernel"]
        >>> hidden, labels = jnp.ones((2, 8, 4)), jnp.zeros((2, 8), int)
        >>> loss = jlora.cross_entropy(head, {"kernel": jnp.zeros((4, 10))}, hidden, labels, chunk=4)
        >>> print(f"{loss:.4f}")  # of 10 equal logits: log 10
        2.3026
    """
    _check(hidden, labels, weights, chunk)
    tokens = labels.size
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    weights = jnp.ones(labels.shape, dtype) if weights is None else weights
    weights = jax.lax.stop_gradient(weights).astype(dtype)
    total = weights.sum()
    weights = weights / jnp.where(total == 0, 1, total)
    labels = jnp.where(weights == 0, 0, labels)
    chunks = math.ceil(tokens / chunk)
    padding = -tokens % chunks

    def to_chunks(leaf: Array, mode: str) -> Array:
        """(*tokens, ...) to (chunks, rows, ...). If tokens are sharded over devices, so is each chunk."""
        flat = leaf.reshape(tokens, *leaf.shape[labels.ndim :])
        padded = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1), mode=mode)
        return padded.reshape(-1, chunks, *flat.shape[1:]).swapaxes(0, 1)

    # The padding repeats the last token, so that it is finite if the data is, and has weight 0.
    rows = to_chunks(hidden, "edge"), to_chunks(labels, "edge"), to_chunks(weights, "constant")
    leaves, structure = jax.tree.flatten(params)
    loss = _make_chunked_loss(lambda leaves, hidden: logits_fn(jax.tree.unflatten(structure, leaves), hidden))
    return loss(leaves, *rows)


def _make_chunked_loss(logits_fn: Callable[[list[Array], Array], Array]) -> Callable[..., Float[Array, ""]]:
    """The loss as a scan over chunks, with a derivative rule that computes the gradient in the forward pass."""

    def chunk_loss(leaves: list[Array], hidden: Array, labels: Array, weights: Array) -> Float[Array, ""]:
        logits = logits_fn(leaves, hidden).astype(weights.dtype)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.where(weights == 0, 0, losses * weights).sum()

    @jax.custom_vjp
    def loss(leaves: list[Array], hidden: Array, labels: Array, weights: Array) -> Float[Array, ""]:
        def add(total: Array, rows: tuple[Array, ...]) -> tuple[Array, None]:
            return total + chunk_loss(leaves, *rows), None

        return jax.lax.scan(add, jnp.zeros((), weights.dtype), (hidden, labels, weights))[0]

    def forward(leaves: list[Any], hidden: Any, labels: Any, weights: Any) -> tuple[Float[Array, ""], Any]:
        values = [leaf.value for leaf in leaves]
        differentiated = {n: leaf.value for n, leaf in enumerate(leaves) if leaf.perturbed}

        def add(carry: tuple[Array, Any], rows: tuple[Array, ...]) -> tuple[tuple[Array, Any], Array | None]:
            def compute(differentiated: dict[int, Array], hidden: Array) -> Float[Array, ""]:
                return chunk_loss([differentiated.get(n, value) for n, value in enumerate(values)], hidden, *rows[1:])

            total, sums = carry
            one, vjp = jax.vjp(compute, differentiated, rows[0])
            d_differentiated, d_hidden = vjp(jnp.ones_like(one))
            sums = jax.tree.map(lambda sum, new: sum + new.astype(sum.dtype), sums, d_differentiated)
            return (total + one, sums), d_hidden if hidden.perturbed else None

        zeros = {n: jnp.zeros(v.shape, jnp.promote_types(v.dtype, jnp.float32)) for n, v in differentiated.items()}
        start = jnp.zeros((), weights.value.dtype), zeros
        (total, sums), d_hidden = jax.lax.scan(add, start, (hidden.value, labels.value, weights.value))
        d_leaves = [sums[n].astype(value.dtype) if n in sums else None for n, value in enumerate(values)]
        return total, (d_leaves, d_hidden)

    def backward(grads: tuple[list[Array | None], Array | None], g: Float[Array, ""]) -> tuple[Any, ...]:
        d_leaves, d_hidden = jax.tree.map(lambda grad: (grad * g).astype(grad.dtype), grads)
        return d_leaves, d_hidden, None, None

    loss.defvjp(forward, backward, symbolic_zeros=True)
    return loss


def _check(hidden: Any, labels: Any, weights: Any, chunk: int) -> None:
    wrong = []
    if hidden.ndim != labels.ndim + 1 or hidden.shape[:-1] != labels.shape:
        shapes = f"hidden {list(hidden.shape)} and labels {list(labels.shape)}"
        wrong.append(f"{shapes}: must be (*tokens, features) and (*tokens)")
    if weights is not None and weights.shape != labels.shape:
        wrong.append(f"weights {list(weights.shape)} and labels {list(labels.shape)}: must have the same shape")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        wrong.append(f"labels are {labels.dtype}: must be integers")
    if labels.size == 0:
        wrong.append("no tokens")
    if chunk < 1:
        wrong.append(f"chunk={chunk}: must be 1 or more")
    if wrong:
        raise JloraValueError("cross_entropy", "the arguments don't fit each other.", wrong, "correct them.")
