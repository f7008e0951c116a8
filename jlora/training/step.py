"""The jitted training step: computes, accumulates, clips, checks and applies gradients of the adapters alone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from jlora.errors import JloraTypeError, JloraValueError, count
from jlora.transform.jaxprs import unread
from jlora.tree.layouts import A, B
from jlora.tree.paths import Tree, map_with_path
from jlora.tree.splitting import join

Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[[Tree, Batch, Key[Array, ""]], Any]

_RESERVED_METRICS = ("loss", "grad_norm", "skipped")


@struct.dataclass
class TrainState:
    """The state of training: everything that a step changes.

    Attributes:
        step: steps taken, skipped ones included.
        adapters: the trainable leaves, the first result of `split`.
        opt_state: the optimizer's state for `adapters`.
        key: the run's PRNG key; each step folds its number into it.
        skipped: steps whose update was skipped because the loss or a gradient was not finite.
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
            adapters: the first result of `split`; copied, because a step donates its state.
            tx: the optimizer of `adapters`.
            key: the run's PRNG key.
        """
        zero = jnp.zeros((), jnp.int32)
        state = cls(step=zero, adapters=adapters, opt_state=tx.init(adapters), key=key, skipped=zero)
        # Some transformations keep the parameters in their state, and one buffer can't be donated twice.
        return jax.tree.map(_copy_leaf, state)


def _copy_leaf(leaf: Any) -> Array:
    """A new buffer of a strong type, so that the types of a state stay the same from step to step."""
    return jnp.array(leaf, dtype=jnp.asarray(leaf).dtype, copy=True)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1, clip: float | None = None
) -> Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]:
    """Makes a jitted step, `step(state, base, batch) -> (state, metrics)`.

    Only `state.adapters` is differentiated. `state` is donated, `base` is not. The step is traced once for all batches
    of one shape and all adapters and bases of one structure::

        adapters, base = jlora.split(params)
        state = jlora.TrainState.create(adapters, tx, jax.random.key(0))
        step = jlora.make_train_step(loss_fn, tx)
        for batch in batches:
            state, metrics = step(state, base, batch)

    Args:
        loss_fn: `loss_fn(params, batch, key) -> loss` or `(loss, aux)`, with `loss` a scalar and `aux` a dict of
            metrics. It must be a mean over the rows of the batch; otherwise accumulation changes the result.
        tx: an optimizer for the adapters. Its update gets the loss as `value=`, which `reduce_on_plateau` needs.
        accumulate: number of gradient-accumulation microbatches. A batch is split along the leading axis of every leaf:
            microbatch i has the rows i, i + accumulate, and so on, and a separate key. Gradients are summed in
            float32.
        clip: largest global norm of the gradient over all trainable leaves; None means no clipping.

    Returns:
        The step. Its metrics are `loss`, `grad_norm` (before clipping, in float32), `skipped` (so far) and the entries
        of `aux`. Over microbatches, floats are averaged and integers, which are counts, are summed. If the loss or
        the gradient norm is not finite, adapters and optimizer state stay as they were, and the step number rises.

    Raises:
        ValueError: `accumulate` or `clip` is out of range. At the first call: the batch can't be split evenly, the loss
            does not read the adapters, or aux uses a reserved name. At any call: an earlier call donated the state.
        TypeError: at the first call, the loss is not a floating scalar, or aux is not a dict.
    """
    _check_options(accumulate, clip)
    tx = optax.with_extra_args_support(tx)

    def step(state: TrainState, base: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss_of(adapters: Tree, rows: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
            return _loss_and_aux(loss_fn(join(adapters, base), rows, key))

        keys = jax.random.split(jax.random.fold_in(state.key, state.step), accumulate)
        loss, grads, aux = _mean_gradient(loss_of, state.adapters, _split_batch(batch, accumulate), keys)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if clip is not None:
            factor = jnp.minimum(1, clip / norm)
            grads = jax.tree.map(lambda grad: grad * factor, grads)
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
    """A jitted step that raises a clear error for a state that an earlier call donated."""

    def __init__(self, jitted: Any):
        self._jitted = jitted

    def __call__(self, state: TrainState, base: Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        if _is_deleted(state.step):
            raise _make_donated_error()
        try:
            return self._jitted(state, base, batch)
        except (RuntimeError, ValueError) as error:
            # A call that fails while it runs deletes all leaves of the state, and a call that JAX refuses deletes none.
            # So deleted leaves beside an intact step number come from another state.
            if not _is_deleted(state.step) and any(map(_is_deleted, jax.tree.leaves(state))):
                raise _make_donated_error() from error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)


def _is_deleted(leaf: Any) -> bool:
    # Under another transformation a leaf is a tracer, which has no buffer.
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def _make_donated_error() -> ValueError:
    problem = "this state was passed to an earlier step, which reused its memory."
    fix = "use the state that the step returned, `state, metrics = step(state, base, batch)`, or keep a copy: "
    return JloraValueError("make_train_step", problem, [], fix + "jax.tree.map(jnp.copy, state).")


def _mean_gradient(
    loss_of: Callable[..., tuple[Float[Array, ""], Metrics]],
    adapters: Tree,
    microbatches: Batch,
    keys: Key[Array, "n"],
) -> tuple[Float[Array, ""], Tree, Metrics]:
    """Loss, gradient and aux over all microbatches, which are stacked along the leading axis."""
    first = jax.tree.map(lambda leaf: leaf[0], (microbatches, keys))
    _check_adapters_are_read(lambda adapters: loss_of(adapters, *first)[0], adapters)

    def gradient(rows: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Tree, Metrics]:
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(adapters, rows, key)
        return _widen(loss), jax.tree.map(_widen, grads), aux

    if keys.shape[0] == 1:
        return gradient(*first)

    def add(total: Tree, one: tuple[Batch, Key[Array, ""]]) -> tuple[Tree, tuple[Float[Array, ""], Metrics]]:
        loss, grads, aux = gradient(*one)
        return jax.tree.map(jnp.add, total, grads), (loss, aux)

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(_widen(leaf)), adapters)
    total, (losses, auxes) = jax.lax.scan(add, zeros, (microbatches, keys))
    mean = jax.tree.map(lambda leaf: leaf / keys.shape[0], total)
    return losses.mean(), mean, jax.tree.map(_reduce, auxes)


def _widen(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    """The leaf in at least float32, for sums over microbatches and for norms."""
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _reduce(stacked: Array) -> Array:
    return stacked.mean(0) if jnp.issubdtype(stacked.dtype, jnp.inexact) else stacked.sum(0)


def _cast_like(tree: Tree, like: Tree) -> Tree:
    return jax.tree.map(lambda leaf, old: leaf if leaf.dtype == old.dtype else leaf.astype(old.dtype), tree, like)


def _split_batch(batch: Batch, accumulate: int) -> Batch:
    """Adds a leading axis of `accumulate` microbatches.

    Each microbatch has every `accumulate`-th row. So if rows are sharded over devices, no row moves to another device.
    """
    if accumulate == 1:
        return jax.tree.map(lambda leaf: leaf[None], batch)
    named = jax.tree_util.tree_leaves_with_path(batch)
    uneven = [
        f"'{jax.tree_util.keystr(path, simple=True, separator='/')}' {list(leaf.shape)}"
        for path, leaf in named
        if leaf.ndim == 0 or leaf.shape[0] % accumulate
    ]
    if uneven:
        raise JloraValueError(
            "make_train_step",
            f"the leading axis can't be split into accumulate={accumulate} equal microbatches.",
            uneven,
            f"make the number of rows a multiple of {accumulate}, and leave arrays without rows out of the batch.",
        )
    return jax.tree.map(lambda leaf: leaf.reshape(-1, accumulate, *leaf.shape[1:]).swapaxes(0, 1), batch)


def _loss_and_aux(result: Any) -> tuple[Float[Array, ""], Metrics]:
    loss, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        problem = f"loss_fn returned {dtype}{list(shape)}, not a floating scalar."
        raise JloraTypeError("make_train_step", problem, [], "return the mean loss, or (loss, aux).")
    if not isinstance(aux, Mapping):
        problem = f"loss_fn's aux is a {type(aux).__name__}."
        raise JloraTypeError("make_train_step", problem, [], "return (loss, dict of metrics).")
    reserved = [repr(name) for name in aux if name in _RESERVED_METRICS]
    if reserved:
        problem = f"loss_fn's aux uses {count(len(reserved), 'name')} of the step's metrics."
        raise JloraValueError("make_train_step", problem, reserved, "choose other names.")
    return jnp.asarray(loss), dict(aux)


def _check_adapters_are_read(loss_of: Callable[[Tree], Float[Array, ""]], adapters: Tree) -> None:
    """Raises an error if the loss depends on no adapter, since such a step would train nothing and report nothing."""
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
        raise JloraValueError(
            "make_train_step",
            f"{count(len(wrong), 'option is', 'options are')} out of range.",
            wrong,
            "correct the values.",
        )
