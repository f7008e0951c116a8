"""What the models share: activations, a stack of layers, who sees whom, attention, and the cache of a decoder.

Tokens are told apart by *segments*, int32 (batch, time): 0 is padding, wherever it stands; any other number is a text
of its own, so an attention mask of zeros and ones is one case and a packed batch another. Positions count from each
segment's first token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jlora.errors import JloraValueError


def gelu(x: Array) -> Array:
    """GELU by the error function, exact. Source: Hendrycks & Gimpel, arXiv:1606.08415, section 2."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

# By the names of transformers' ACT2FN. Those with parameters (prelu, xielu) are left out.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu_10": lambda x: jnp.clip(gelu(x), -10, 10),
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_python": gelu,
    "gelu_python_tanh": gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": jax.nn.identity,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Origin(NamedTuple):
    """The checkpoint a model comes from.

    Args:
        name: the folder, or the name on the hub.
        config: its config.json, as text.
        generation: its generation_config.json, None where it has none.
        folder: the local folder that it was read from, None where there is none.
        revision: the branch, tag or commit on the hub, None for the default branch or a local folder.
    """

    name: str
    config: str
    generation: str | None = None
    folder: str | None = None
    revision: str | None = None


@struct.dataclass
class Cache:
    """Keys and values of the tokens a decoder has seen; its shapes stay as they are while it fills.

    Args:
        layers: (keys, values), each (batch, kv_heads, length, width): one pair a layer, or, where the model scans its
            layers, one pair with the layers stacked on axis 0.
        segments: of the tokens seen so far, 0 from `index` on.
        index: how many slots are filled; the next token goes to this one.
    """

    layers: Any
    segments: Int[Array, "batch length"]
    index: Int[Array, ""]

    @classmethod
    def empty(cls, batch: int, length: int, *, layers: int, heads: int, width: int, dtype: DTypeLike, scan: bool):
        """A cache with nothing in it."""
        shape = (batch, heads, length, width)
        if scan:
            pairs: Any = (jnp.zeros((layers, *shape), dtype), jnp.zeros((layers, *shape), dtype))
        else:
            pairs = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]
        return cls(layers=pairs, segments=jnp.zeros((batch, length), jnp.int32), index=jnp.zeros((), jnp.int32))

    def write(self, pairs: Any, segments: Int[Array, "batch time"] | None, after: Float[Array, "..."]) -> "Cache":
        """The cache with the next tokens in it.

        Args:
            pairs: their keys and values, in the form of `layers`.
            segments: theirs.
            after: computed from all that is read of the cache, so that it is written in place, not copied first.
        """
        assert segments is not None, "`look` gives every call with a cache its segments"
        # Nothing but a data dependence orders a write after the reads; XLA keeps a float's product with zero.
        index = self.index + jnp.nan_to_num(0 * after[(0,) * after.ndim]).astype(jnp.int32)

        def put(slots: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis)

        return Cache(
            layers=jax.tree.map(lambda slots, new: put(slots, new, slots.ndim - 2), self.layers, pairs),
            segments=put(self.segments, segments, 1),
            index=self.index + segments.shape[1],
        )


class Sight(NamedTuple):
    """Where the tokens of a call stand and what they may see, once for all layers.

    Args:
        segments: of the call's tokens; None where there is no padding, no packing and no cache.
        positions: of the call's tokens within their segments.
        queries: the tokens' places in the row, counted over the cache.
        keys: the places of what can be seen: the cache's slots, if any, then the call's tokens.
        key_segments: their segments.
    """

    segments: Int[Array, "batch time"] | None
    positions: Int[Array, "batch time"]
    queries: Int[Array, "time"]
    keys: Int[Array, "source"]
    key_segments: Int[Array, "batch source"] | None

    def bias(self, *, causal: bool = True, window: int | None = None) -> Float[Array, "batch 1 time source"]:
        """What is added to the scores: 0 where a query may look, a large negative number where not.

        Args:
            causal: a query sees no later token.
            window: a query sees tokens that are less than this many places away, before it and, where attention is not
                causal, after it.
        """
        distance = self.queries[:, None] - self.keys[None, :]
        visible: Bool[Array, "..."] = (distance >= 0) if causal else jnp.ones_like(distance, bool)
        distance = distance if causal else abs(distance)
        if window is not None:
            visible &= distance < window
        visible = visible[None, None]
        if self.segments is not None and self.key_segments is not None:
            visible = visible & (self.segments[:, :, None] == self.key_segments[:, None, :])[:, None]
        return jnp.where(visible, 0.0, -1e30).astype(jnp.float32)


def look(
    input_ids: Int[Array, "batch time"],
    attention_mask: Int[Array, "batch time"] | None,
    segment_ids: Int[Array, "batch time"] | None,
    cache: Cache | None,
) -> Sight:
    """Where the tokens of a call stand."""
    time = input_ids.shape[1]
    segments = None if segment_ids is None else segment_ids.astype(jnp.int32)
    if attention_mask is not None:
        mask = attention_mask.astype(jnp.int32)
        segments = mask if segments is None else segments * mask
    places = jnp.arange(time)
    if cache is None:
        positions = places[None] if segments is None else segment_positions(segments)
        return Sight(segments, positions, places, places, segments)
    if segments is None:
        segments = jnp.ones_like(input_ids, jnp.int32)
    slots = cache.segments.shape[1]
    row = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.index, axis=1)
    positions = jax.lax.dynamic_slice_in_dim(segment_positions(row), cache.index, time, axis=1)
    queries = cache.index + places
    keys = jnp.concatenate([jnp.arange(slots), queries])
    return Sight(segments, positions, queries, keys, jnp.concatenate([cache.segments, segments], axis=1))


def segment_positions(segments: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """Every token's distance from the first of its segment.

    >>> segment_positions(jnp.array([[0, 0, 1, 1, 1, 2, 2]])).tolist()
    [[0, 1, 0, 1, 2, 0, 1]]
    """
    places = jnp.arange(segments.shape[1])[None]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)


def attend(
    q: Float[Array, "batch heads time width"],
    k: Float[Array, "batch kv time width"],
    v: Float[Array, "batch kv time width"],
    bias: Float[Array, "b 1 time source"] | None,
    *,
    scale: float | Array | None = None,
    softcap: float | None = None,
    past: tuple[Array, Array] | None = None,
) -> Float[Array, "batch heads time width"]:
    """Softmax attention, heads before time, the softmax in float32 at least.

    Batch and heads stay the leading axes of both contractions, which is the only order XLA's CPU backend multiplies
    without transposing first. The past is read where it lies: its scores and the call's are joined, and neither its
    keys nor its values are copied.

    Args:
        q: queries.
        k: keys of the call's own tokens, their heads shared by groups of query heads.
        v: values.
        bias: added to the scores.
        scale: of the scores; None for 1 / sqrt(width).
        softcap: c keeps scores between -c and c by c tanh(score / c). Source: Gemma 2 (arXiv:2408.00118), section 2.
        past: keys and values from the cache, which stand before the call's own in `bias`.
    """
    batch, heads, time, width = q.shape
    kv = k.shape[1]
    q = q * (width**-0.5 if scale is None else scale)
    q = q.reshape(batch, kv, (heads // kv) * time, width) if heads != kv else q
    sources = [(k, v)] if past is None else [past, (k, v)]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    parts = [jnp.einsum("bhtd,bhsd->bhts", q, keys.astype(q.dtype), preferred_element_type=wide) for keys, _ in sources]
    scores = parts[0] if past is None else jnp.concatenate(parts, axis=-1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(batch, heads, time, -1)
    weights = jax.nn.softmax(scores if bias is None else scores + bias, axis=-1)
    weights = weights.astype(v.dtype).reshape(batch, kv, -1, scores.shape[-1])
    parts = jnp.split(weights, [keys.shape[2] for keys, _ in sources[:-1]], axis=-1)
    products = [
        jnp.einsum("bhts,bhsd->bhtd", part, values.astype(v.dtype))
        for part, (_, values) in zip(parts, sources, strict=True)
    ]
    return functools.reduce(jnp.add, products).reshape(batch, heads, time, width)


def split_heads(y: Float[Array, "batch time d"], heads: int) -> Float[Array, "batch heads time width"]:
    return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)


def join_heads(y: Float[Array, "batch heads time width"]) -> Float[Array, "batch time d"]:
    y = y.swapaxes(1, 2)
    return y.reshape(*y.shape[:2], -1)


def layer_norm(epsilon: float, *, dtype: DTypeLike, param_dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm in float32 at least, with the two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large."""
    return nn.LayerNorm(epsilon, dtype=dtype, param_dtype=param_dtype, use_fast_variance=False, name=name)


def make_layers(block: type[nn.Module], *args: Any, count: int, scan: bool, remat: bool) -> Any:
    """The layers of a model, for `run_layers`: a list, or one module that holds them stacked on axis 0.

    Args:
        block: its call takes (x, each, shared) and returns (x, out).
        args: what makes one.
        count: how many.
        scan: one compiled body for all.
        remat: recompute each layer in the backward pass instead of keeping its activations.
    """
    lifted: Any = nn.remat(block, prevent_cse=not scan) if remat else block
    if not scan:
        return [lifted(*args) for _ in range(count)]
    return nn.scan(
        lifted, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=(0, nn.broadcast), length=count
    )(*args)


def run_layers(layers: Any, x: Array, each: Any, shared: Any) -> tuple[Array, Any]:
    """Runs x through the layers.

    Args:
        layers: from `make_layers`.
        x: what the first layer reads.
        each: what each layer is given: a list of trees, or one tree stacked on axis 0 where layers are scanned; None
            for nothing.
        shared: what all are given.

    Returns:
        What the last layer gives, and each layer's second result in the form of `each`.
    """
    if not isinstance(layers, list | tuple):
        return layers(x, each, shared)
    outs = []
    for i, layer in enumerate(layers):
        x, out = layer(x, None if each is None else each[i], shared)
        outs.append(out)
    return x, outs


def last_tokens(
    hidden: Float[Array, "batch time d"],
    input_ids: Int[Array, "batch time"],
    attention_mask: Int[Array, "batch time"] | None,
    pad_token_id: int | None,
) -> Float[Array, "batch d"]:
    """The state of each row's last token that is not padding, whichever side the padding is on.

    As in transformers, a token with the padding's id counts as padding even where it is attended to. A row of padding
    alone gives its first token's state.

    Args:
        hidden: the states.
        input_ids: their tokens.
        attention_mask: 0 for padding; None for no padding beside that of the id.
        pad_token_id: the id of the padding; None where the mask alone says what is padding.
    """
    kept = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
    if pad_token_id is not None:
        kept = kept & (input_ids != pad_token_id)
    last = jnp.where(kept, jnp.arange(input_ids.shape[1]), 0).max(axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def check_one_text_per_row(who: str, segment_ids: Any, cache: Any) -> None:
    """Raises where a classifier of texts is given packed rows, or a cache."""
    given = {"segment_ids": segment_ids, "cache": cache}
    offenders = [name for name, value in given.items() if value is not None]
    if offenders:
        fix = "leave them out, or load the model with head='causal_lm'."
        raise JloraValueError(who, "a classifier reads each row as one whole text.", offenders, fix)


def check_choice(who: str, **choices: tuple[Any, Sequence[Any]]) -> None:
    """Raises where a value is none of those known, all of them listed."""
    offenders = [
        f"{name} is {value!r}, known: {', '.join(map(str, known))}"
        for name, (value, known) in choices.items()
        if value not in known
    ]
    if offenders:
        raise JloraValueError(who, "unknown choice.", offenders, "take one of those known.")
