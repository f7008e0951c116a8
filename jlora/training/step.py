"""One jitted training step: gradients of the adapters alone, accumulated, clipped, guarded and applied."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from jlora.errors import JloraTypeError, JloraValueError
from jlora.transform.jaxprs import unread
from jlora.tree.layouts import A, B
from jlora.tree.paths import Tree, map_with_path
from jlora.tree.splitting import join

Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[[Tree, Batch, Key[Array, ""]], Any]

_OWN_METRICS = ("loss", "grad_norm", "skipped")


@struct.dataclass
class TrainState:
    """All that changes while training.

    Attributes:
        step: steps taken, skipped ones included.
        adapters: what trains, the first half of `split`.
        opt_state: the optimizer's state for `adapters`.
        key: the run's PRNG key; a step folds its number into it.
        skipped: steps whose update was left out because the loss or a gradient was not finite.
    """

    step: Int[Array, ""]
    adapters: Tree
    opt_state: optax.OptState
    key: Key[Array, ""]
    skipped: Int[Array, ""]

    @classmethod
    def create(cls, adapters: Tree, tx: optax.GradientTransformation, key: Key[Array, ""]) -> "TrainState":
        """The state before the first step.

        Args:
            adapters: the first half of `split`; copied, because a step donates its state.
            tx: the optimizer, for `adapters` alone.
            key: the run's PRNG key.
        """
        zero = jnp.zeros((), jnp.int32)
        state = cls(step=zero, adapters=adapters, opt_state=tx.init(adapters), key=key, skipped=zero)
        # Some transformations keep the parameters in their state, and one buffer can't be donated twice.
        return jax.tree.map(_own, state)


def _own(leaf: Any) -> Array:
    """A fresh buffer whose dtype no longer gives way, so that a step gives back the types it was given."""
    return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype, copy=True)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1, clip: float | None = None
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]:
    """Makes a jitted step, `step(state, base, batch) -> (state, metrics)`.

    Only `state.adapters` is differentiated. `state` is donated, `base` never is. The step is traced once for
    all batches of one shape and all adapters and bases of one structure::

        adapters, base = jlora.split(params)
        state = jlora.TrainState.create(adapters, tx, jax.random.key(0))
        step = jlora.make_train_step(loss_fn, tx)
        for batch in batches:
            state, metrics = step(state, base, batch)

    Args:
        loss_fn: `loss_fn(params, batch, key) -> loss` or `(loss, aux)`, with `loss` a scalar and `aux` a dict of
            metrics. It must be a mean over the rows of the batch, or accumulating changes its meaning.
        tx: an optimizer for the adapters. It is told the loss as `value=`, which `reduce_on_plateau` needs.
        accumulate: micro-batches a batch is cut into, along the leading axis of every leaf; micro-batch i takes the
            rows i, i + accumulate, and so on, and a key of its own. Gradients are summed in float32.
        clip: largest global norm of the gradient over all that trains; None means no clipping.

    Returns:
        The step. Its metrics are `loss`, `grad_norm` (before clipping, in float32), `skipped` (so far) and what `aux`
        holds: over micro-batches floats are averaged and integers, being counts, summed. A loss or gradient norm that
        is not finite leaves adapters and optimizer state as they were; the step counts.

    Raises:
        ValueError: `accumulate` or `clip` is out of range; at the first call, a batch that can't be cut evenly, a loss
            that never reads the adapters, or an aux that uses the name of another metric.
        TypeError: at the first call, a loss that is no floating scalar, or an aux that is no dict.

    At any call, a state that an earlier call donated is a ValueError.
    """
    _check_options(accumulate, clip)
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, base: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(adapters: Tree, rows: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
            return _loss_and_aux(loss_fn(join(adapters, base), rows, key))

        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulate)
        loss, grads, aux = _mean_gradient(loss_of, state.adapters, _cut(batch, accumulate), keys)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if clip is not None:
            shrink = jnp.minimum(1, clip / norm)
            grads = jax.tree.map(lambda grad: grad * shrink, grads)
        before = state.adapters, state.opt_state
        grads = _cast_like(grads, state.adapters)
        updates, opt_state = tx.update(grads, state.opt_state, state.adapters, value=loss)
        after = _cast_like((optax.apply_updates(state.adapters, updates), opt_state), before)
        adapters, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
        skipped = state.skipped + ~finite
        state = TrainState(state.step + 1, adapters, opt_state, state.key, skipped)
        return state, {"loss": loss, "grad_norm": norm, "skipped": skipped, **aux}

    return _DonatingStep(jax.jit(step, donate_argnums=0))


class _DonatingStep:
    """A jitted step that refuses a state whose memory an earlier call has reused; otherwise the jitted function."""

    def __init__(self, jitted: Any):
        self._jitted = jitted

    def __call__(self, state: TrainState, base: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        if _is_deleted(state.step):
            raise _donated_error()
        try:
            return self._jitted(state, base, batch)
        except (RuntimeError, ValueError) as error:
            # A call that fails while it runs has taken all of the state, and one that JAX refuses none of it: leaves
            # that are gone beside a step number that is not come from another state.
            if not _is_deleted(state.step) and any(map(_is_deleted, jax.tree.leaves(state))):
                raise _donated_error() from error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def _is_deleted(leaf: Any) -> bool:
    # Under another transformation a leaf is a tracer, which has no memory.
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def _donated_error() -> ValueError:
    problem = "this state was given to an earlier step, which reused its memory."
    fix = "go on with the state that step returned, `state, metrics = step(state, base, batch)`, or keep a copy: "
    return JloraValueError("make_train_step", problem, [], fix + "jax.tree.map(jnp.copy, state).")


def _mean_gradient(
    loss_of: Callable[..., tuple[Float[Array, ""], Metrics]],
    adapters: Tree,
    cut: Batch,
    keys: Key[Array, "n"],
) -> tuple[Float[Array, ""], Tree, Metrics]:
    """Loss, gradient and aux over all micro-batches, which `cut` holds along a new leading axis."""
    first = jax.tree.map(lambda leaf: leaf[0], (cut, keys))
    _check_reads(lambda adapters: loss_of(adapters, *first)[0], adapters)

    def gradient(rows: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Tree, Metrics]:
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(adapters, rows, key)
        return _wide(loss), jax.tree.map(_wide, grads), aux

    if keys.shape[0] == 1:
        return gradient(*first)

    def add(total: Tree, one: tuple[Batch, Key[Array, ""]]) -> tuple[Tree, tuple[Float[Array, ""], Metrics]]:
        loss, grads, aux = gradient(*one)
        return jax.tree.map(jnp.add, total, grads), (loss, aux)

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(_wide(leaf)), adapters)
    total, (losses, auxes) = jax.lax.scan(add, zeros, (cut, keys))
    mean = jax.tree.map(lambda leaf: leaf / keys.shape[0], total)
    return losses.mean(), mean, jax.tree.map(_reduce, auxes)


def _wide(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    """At least float32, in which sums over micro-batches and norms are taken."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _reduce(stacked: Array) -> Array:
    return stacked.mean(0) if jnp.issubdtype(stacked.dtype, jnp.inexact) else stacked.sum(0)


def _cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda leaf, old: leaf if leaf.dtype == old.dtype else leaf.astype(old.dtype), tree, like)


def _cut(batch: Batch, pieces: int) -> Batch:
    """Adds a leading axis of `pieces` micro-batches.

    Each takes every `pieces`-th row: where rows lie spread over devices, every device keeps its own.
    """
    if pieces == 1:
        return jax.tree.map(lambda leaf: leaf[None], batch)
    named = jax.tree_util.tree_leaves_with_path(batch)
    uneven = [
        f"'{jax.tree_util.keystr(path, simple=True, separator='/')}' {list(leaf.shape)}"
        for path, leaf in named
        if leaf.ndim == 0 or leaf.shape[0] % pieces
    ]
    if uneven:
        raise JloraValueError(
            "make_train_step",
            f"the leading axis can't be cut into accumulate={pieces} equal micro-batches.",
            uneven,
            f"make the batch a multiple of {pieces} rows, and keep what has no rows out of it.",
        )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, pieces, *leaf.shape[1:]).swapaxes(0, 1), batch)


def _loss_and_aux(result: Any) -> tuple[Float[Array, ""], Metrics]:
    loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        problem = f"loss_fn gave {dtype}{list(shape)}, not a floating scalar."
        raise JloraTypeError("make_train_step", problem, [], "return the mean loss, or (loss, aux).")
    if not isinstance(aux, Mapping):
        problem = f"loss_fn's aux is a {type(aux).__name__}."
        raise JloraTypeError("make_train_step", problem, [], "return (loss, dict of metrics).")
    taken = [repr(name) for name in aux if name in _OWN_METRICS]
    if taken:
        problem = "loss_fn's aux uses names of the step's own metrics."
        raise JloraValueError("make_train_step", problem, taken, "rename them.")
    return jnp.asarray(loss), dict(aux)


def _check_reads(loss_of: Callable[[Tree], Float[Array, ""]], adapters: Tree) -> None:
    """Refuses a loss in which no adapter has a part: it would train nothing, and say nothing."""
    names = jax.tree.leaves(map_with_path(lambda path, _: path, adapters))
    lora = {index for index, path in enumerate(names) if path.endswith((A, B))}
    if lora and lora <= set(unread(loss_of, adapters)):
        raise JloraValueError(
            "make_train_step",
            f"loss_fn never reads the adapters: its loss depends on none of their {len(lora)} leaves.",
            [],
            "call jlora.adapt(model.apply) in loss_fn, not model.apply.",
        )


def _check_options(accumulate: int, clip: float | None) -> None:
    wrong = []
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        wrong.append(f"accumulate={accumulate!r}: must be an int from 1")
    if clip is not None and not clip > 0:
        wrong.append(f"clip={clip!r}: must be above 0, or None")
    if wrong:
        raise JloraValueError("make_train_step", "an option is out of range.", wrong, "correct it.")
