"""Shared parts of the models: activations, the stack of layers, attention masks, attention, and the decoder's cache.

Each token has a *segment* number, int32 (batch, time): 0 is padding at any place, and every other number is a separate
text. An attention mask of zeros and ones and a packed batch are both special cases. Positions count from the first
token of each segment.
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

from jlora.errors import JloraValueError, count


def gelu(x: Array) -> Array:
    """GELU with the error function, without approximation. Source: Hendrycks & Gimpel, arXiv:1606.08415, section 2."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

# The keys are those of transformers' ACT2FN. Activations with parameters (prelu, xielu) are not supported.
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
    """The checkpoint that a model was loaded from.

    Args:
        name: the folder, or the name on the hub.
        config: text of the config.json.
        generation: text of the generation_config.json, None if there is no such file.
        folder: the local folder that it was read from, None if there is none.
        revision: the branch, tag or commit on the hub, None for the default branch or a local folder.
    """

    name: str
    config: str
    generation: str | None = None
    folder: str | None = None
    revision: str | None = None


@struct.dataclass
class Cache:
    """Keys and values of the tokens that a decoder has read. Its shapes are fixed.

    Args:
        layers: (keys, values), each (batch, kv_heads, length, width): one pair per layer or, if the model scans its
            layers, one pair with the layers stacked on axis 0.
        segments: segments of the tokens read so far, 0 from `index` on.
        index: number of filled slots, and the slot of the next token.
    """

    layers: Any
    segments: Int[Array, "batch length"]
    index: Int[Array, ""]

    @classmethod
    def empty(cls, batch: int, length: int, *, layers: int, heads: int, width: int, dtype: DTypeLike, scan: bool):
        """A cache without tokens."""
        shape = (batch, heads, length, width)
        if scan:
            pairs: Any = (jnp.zeros((layers, *shape), dtype), jnp.zeros((layers, *shape), dtype))
        else:
            pairs = [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]
        return cls(layers=pairs, segments=jnp.zeros((batch, length), jnp.int32), index=jnp.zeros((), jnp.int32))

    def write(self, pairs: Any, segments: Int[Array, "batch time"] | None, after: Float[Array, "..."]) -> "Cache":
        """The cache with the next tokens added.

        Args:
            pairs: keys and values of the tokens, in the form of `layers`.
            segments: segments of the tokens.
            after: an array computed from everything that is read from the cache, so that XLA writes in place after the
                reads and makes no copy.
        """
        assert segments is not None, "`make_attention_context` sets the segments of every call with a cache"
        # Only a data dependence orders a write after the reads; XLA does not simplify the product of a float and zero.
        index = self.index + jnp.nan_to_num(0 * after[(0,) * after.ndim]).astype(jnp.int32)

        def write_slots(slots: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), index, axis)

        return Cache(
            layers=jax.tree.map(lambda slots, new: write_slots(slots, new, slots.ndim - 2), self.layers, pairs),
            segments=write_slots(self.segments, segments, 1),
            index=self.index + segments.shape[1],
        )


class AttentionContext(NamedTuple):
    """The positions of a call's tokens and the tokens that they may attend to, computed once for all layers.

    Args:
        segments: segments of the call's tokens; None if there is no padding, no packing and no cache.
        positions: positions of the call's tokens within their segments.
        queries: indices of the call's tokens in the row, including the tokens in the cache.
        keys: indices of the tokens to attend to: the slots of the cache, if any, then the call's tokens.
        key_segments: segments of `keys`.
    """

    segments: Int[Array, "batch time"] | None
    positions: Int[Array, "batch time"]
    queries: Int[Array, "time"]
    keys: Int[Array, "source"]
    key_segments: Int[Array, "batch source"] | None

    def bias(self, *, causal: bool = True, window: int | None = None) -> Float[Array, "batch 1 time source"]:
        """The bias of the scores: 0 where a query may attend to a key, else a large negative number.

        Args:
            causal: a query attends to no later token.
            window: a query attends to tokens at a distance below this number, before it and, if attention is not
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


def make_attention_context(
    input_ids: Int[Array, "batch time"],
    attention_mask: Int[Array, "batch time"] | None,
    segment_ids: Int[Array, "batch time"] | None,
    cache: Cache | None,
) -> AttentionContext:
    """The attention context of a call with these tokens."""
    time = input_ids.shape[1]
    segments = None if segment_ids is None else segment_ids.astype(jnp.int32)
    if attention_mask is not None:
        mask = attention_mask.astype(jnp.int32)
        segments = mask if segments is None else segments * mask
    indices = jnp.arange(time)
    if cache is None:
        positions = indices[None] if segments is None else segment_positions(segments)
        return AttentionContext(segments, positions, indices, indices, segments)
    if segments is None:
        segments = jnp.ones_like(input_ids, jnp.int32)
    slots = cache.segments.shape[1]
    row = jax.lax.dynamic_update_slice_in_dim(cache.segments, segments, cache.index, axis=1)
    positions = jax.lax.dynamic_slice_in_dim(segment_positions(row), cache.index, time, axis=1)
    queries = cache.index + indices
    keys = jnp.concatenate([jnp.arange(slots), queries])
    key_segments = jnp.concatenate([cache.segments, segments], axis=1)
    return AttentionContext(segments, positions, queries, keys, key_segments)


def segment_positions(segments: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
    """The distance of every token from the first token of its segment.

    >>> segment_positions(jnp.array([[0, 0, 1, 1, 1, 2, 2]])).tolist()
    [[0, 1, 0, 1, 2, 0, 1]]
    """
    indices = jnp.arange(segments.shape[1])[None]
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return indices - jax.lax.cummax(jnp.where(starts, indices, 0), axis=1)


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
    """Softmax attention with the heads axis before time. The softmax uses float32 at least.

    Batch and heads are the leading axes of both contractions, the only order that XLA's CPU backend multiplies without
    a transpose. The scores of the past and of the call's tokens are concatenated, so that no copy of the cached keys
    and values is made.

    Args:
        q: queries.
        k: keys of the call's tokens; groups of query heads share a head.
        v: values.
        bias: added to the scores.
        scale: factor of the scores; None for 1 / sqrt(width).
        softcap: c limits scores to -c and c by c tanh(score / c). Source: Gemma 2 (arXiv:2408.00118), section 2.
        past: keys and values from the cache; in `bias` they come before those of the call.
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
    """The layers of a model, for `run_layers`: a list, or one module with the layers stacked on axis 0.

    Args:
        block: class of a layer, whose call takes (x, each, shared) and returns (x, out).
        args: arguments of the class.
        count: number of layers.
        scan: compile one body for all layers.
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
        x: input of the first layer.
        each: separate inputs of the layers: a list of trees, or one tree stacked on axis 0 if layers are scanned; None
            if there are none.
        shared: input of all layers.

    Returns:
        The output of the last layer, and the second result of each layer in the form of `each`.
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
    """The state of each row's last token that is not padding, for padding on either side.

    As in transformers, a token with `pad_token_id` counts as padding even if its mask is 1. For a row of padding only,
    it is the state of the first token.

    Args:
        hidden: the states.
        input_ids: the tokens of the states.
        attention_mask: 0 for padding; None means that only tokens with `pad_token_id` are padding.
        pad_token_id: id of the padding token; None means that only the mask marks padding.
    """
    is_token = jnp.ones_like(input_ids, bool) if attention_mask is None else attention_mask.astype(bool)
    if pad_token_id is not None:
        is_token = is_token & (input_ids != pad_token_id)
    last = jnp.where(is_token, jnp.arange(input_ids.shape[1]), 0).max(axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def check_one_text_per_row(who: str, segment_ids: Any, cache: Any) -> None:
    """Raises an error if sequence classification gets packed rows or a cache.

    Raises:
        ValueError: an argument is not None; all such arguments are listed.
    """
    arguments = {"segment_ids": segment_ids, "cache": cache}
    offenders = [name for name, value in arguments.items() if value is not None]
    if offenders:
        fix = "leave them out, or load the model with head='causal_lm'."
        raise JloraValueError(who, "sequence classification reads each row as one whole text.", offenders, fix)


def check_choice(who: str, **choices: tuple[Any, Sequence[Any]]) -> None:
    """Raises an error if a value is not one of the known ones.

    Raises:
        ValueError: a value is unknown; all such values are listed.
    """
    offenders = [
        f"{name} is {value!r}, known: {', '.join(map(str, known))}"
        for name, (value, known) in choices.items()
        if value not in known
    ]
    if offenders:
        raise JloraValueError(who, f"{count(len(offenders), 'unknown value')}.", offenders, "choose a known value.")
