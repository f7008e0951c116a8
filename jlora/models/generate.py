"""Generation with a key-value cache on the device: a prompt is read once, then tokens are added one by one.

There are two compiled functions. `prefill` reads the prompts and chooses the first token; `decode` adds tokens up to
any limit, in one loop that ends early once every row has stopped. Lengths are padded to buckets, and all numbers
(temperature, top_k, top_p, the limit, the stop tokens) are arguments, so new values need no compilation.
"""

import functools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from jlora.errors import JloraValueError, count, quoted
from jlora.models.layers import Cache
from jlora.transform.adapt import adapt
from jlora.tree.paths import Tree, flatten

SHORTEST = 16  # tokens of the smallest bucket
STOPS = 8  # stop tokens of the smallest bucket
NO_TOKEN = -1
SHOWN = 3  # the largest number of parameters that an error lists

Kind = Literal["greedy", "sampled", "filtered"]


class Sampling(NamedTuple):
    """Settings of how tokens are chosen and when a row stops. All values are traced.

    Args:
        temperature: divisor of the logits.
        top_k: number of the most likely tokens to draw from.
        tail: 1 - top_p, the total probability of the tokens that are not drawn.
        stop: the tokens that end a row, padded with `NO_TOKEN`.
        pad: the token that follows a stop token.
        key: PRNG key.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    tail: Float[Array, ""]
    stop: Int[Array, "stops"]
    pad: Int[Array, ""]
    key: Key[Array, ""]


class GenerationState(NamedTuple):
    """The state of a generation after some tokens.

    Args:
        cache: the cache of all tokens except the last one of each row.
        token: the last token of each row.
        stopped: the rows that have a stop token.
        tokens: the new tokens so far, then padding.
        step: number of new tokens.
    """

    cache: Cache
    token: Int[Array, "batch"]
    stopped: Bool[Array, "batch"]
    tokens: Int[Array, "batch room"]
    step: Int[Array, ""]


class GenerationRequest(NamedTuple):
    """Checked arguments of `generate`, in the form that the compiled functions take.

    Args:
        ids: the prompts, padded on the left to their bucket.
        mask: 1 for a token, 0 for padding.
        limit: the largest number of new tokens.
        room: number of slots for new tokens.
        kind: the method that chooses tokens.
        sampling: settings of the method.
    """

    ids: Int[np.ndarray, "batch time"]
    mask: Int[np.ndarray, "batch time"]
    limit: int
    room: int
    kind: Kind
    sampling: Sampling


def generate(
    model: nn.Module,
    params: Tree,
    input_ids: Any,
    *,
    max_new_tokens: int,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    pad_token: int = 0,
    key: Key[Array, ""] | None = None,
) -> Int[Array, "batch max_new_tokens"]:
    """Continues prompts and returns the new tokens.

    Lengths are padded to powers of two (16, 32, ...), so one compilation serves all prompts and `max_new_tokens` of a
    bucket, with any temperature, top_k, top_p and stop tokens. Adapters are applied without merging: x W + s (x A) B
    for every token. `jlora.merge(params)` avoids this work, but needs a copy of the adapted kernels.

    ::

        tokens = jlora.generate(model, params, [[1, 403, 407], [1, 261]], max_new_tokens=64, stop_tokens=[2])

    Args:
        model: a decoder, whose calls take a cache.
        params: a base tree, wrapped or merged.
        input_ids: the prompts: a list of lists of token ids, or an array (batch, time).
        attention_mask: for an array: 1 for a token, 0 for padding, on either side.
        max_new_tokens: the largest number of tokens to add to each prompt.
        temperature: 0 chooses the most likely token each time; a value above 0 divides the logits, and tokens are drawn
            from their softmax.
        top_k: draw from the k most likely tokens only, including tokens with the same probability as the last of them.
        top_p: then draw from the smallest set of most likely tokens whose total probability reaches top_p, with ties as
            for top_k.
        stop_tokens: a row ends with any of these tokens, which is part of the result.
        pad_token: the token that fills a row after its end.
        key: PRNG key for drawing tokens. The draws of a row do not depend on the other rows. None means
            `jax.random.key(0)`.

    Returns:
        The new tokens (batch, max_new_tokens), without the prompts; `pad_token` after a stop token.

    Raises:
        ValueError: the model has no cache or too few positions; the parameters are not the model's; a prompt is empty,
            has padding between its tokens or tokens outside the vocabulary; or settings are out of range. All are
            listed.

    Source:
        Holtzman et al. 2020 for top_p (arXiv:1904.09751); Fan et al. 2018 for top_k (arXiv:1805.04833).
    """
    request = prepare_request(
        model,
        params,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
        key=key,
    )
    state = start_generation(model, params, request)
    state = decode(model, request.kind, params, state, request.sampling, request.limit)
    return state.tokens[:, : request.limit]


def stream(
    model: nn.Module,
    params: Tree,
    input_ids: Any,
    *,
    max_new_tokens: int,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Sequence[int] = (),
    pad_token: int = 0,
    key: Key[Array, ""] | None = None,
) -> Iterator[Int[np.ndarray, "batch"]]:
    """Continues prompts like `generate`, with the same compiled functions, and yields the tokens of each step.

    Args:
        model: a decoder. All arguments are those of `generate`.
        params: a base tree, wrapped or merged.
        input_ids: the prompts.
        attention_mask: 1 for a token, 0 for padding.
        max_new_tokens: the largest number of tokens to add to each prompt.
        temperature: 0 chooses the most likely token each time.
        top_k: draw from the k most likely tokens only.
        top_p: then draw from the smallest set of tokens whose total probability reaches top_p.
        stop_tokens: a row ends with any of these tokens.
        pad_token: the token that fills a row after its end.
        key: PRNG key for drawing tokens.

    Returns:
        An iterator over the columns of the result of `generate`; it ends early once all rows have stopped.

    Raises:
        ValueError: as for `generate`, before the first token is requested.
    """
    request = prepare_request(
        model,
        params,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_tokens=stop_tokens,
        pad_token=pad_token,
        key=key,
    )
    return iterate_tokens(model, params, request)


def iterate_tokens(model: nn.Module, params: Tree, request: GenerationRequest) -> Iterator[Int[np.ndarray, "batch"]]:
    """The tokens of each step, until the limit or until all rows have stopped."""
    state = start_generation(model, params, request)
    yield np.asarray(state.token)
    for limit in range(2, request.limit + 1):
        if np.asarray(state.stopped).all():
            return
        state = decode(model, request.kind, params, state, request.sampling, limit)
        yield np.asarray(state.token)


def start_generation(model: nn.Module, params: Tree, request: GenerationRequest) -> GenerationState:
    return prefill(model, request.kind, request.room, params, request.ids, request.mask, request.sampling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(
    model: nn.Module,
    kind: Kind,
    room: int,
    params: Tree,
    ids: Int[Array, "batch time"],
    mask: Int[Array, "batch time"],
    sampling: Sampling,
) -> GenerationState:
    """Reads the prompts and chooses the first of at most `room` new tokens."""
    batch, time = ids.shape
    cache = model.init_cache(batch, time + room)
    logits, cache = last_logits(model, params, ids, mask, cache)
    state = GenerationState(
        cache=cache,
        token=jnp.zeros((batch,), jnp.int32),
        stopped=jnp.zeros((batch,), bool),
        tokens=jnp.full((batch, room), sampling.pad, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
    return add_token(kind, state, logits, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    model: nn.Module, kind: Kind, params: Tree, state: GenerationState, sampling: Sampling, limit: Int[Array, ""]
) -> GenerationState:
    """Adds tokens until there are `limit` of them or all rows have stopped; the cache is updated in place."""

    def unfinished(state: GenerationState) -> Bool[Array, ""]:
        return (state.step < limit) & ~state.stopped.all()

    def advance(state: GenerationState) -> GenerationState:
        logits, cache = last_logits(model, params, state.token[:, None], None, state.cache)
        return add_token(kind, state._replace(cache=cache), logits, sampling)

    return jax.lax.while_loop(unfinished, advance, state)


def last_logits(
    model: nn.Module,
    params: Tree,
    ids: Int[Array, "batch time"],
    mask: Int[Array, "batch time"] | None,
    cache: Cache,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Logits of the next token. The head reads only the last hidden state of each row."""

    def forward(params: Tree, ids: Array, mask: Array | None, cache: Cache) -> Any:
        hidden, cache = model.apply({"params": params}, ids, mask, cache=cache, method="hidden")  # type: ignore[assignment]
        return model.apply({"params": params}, hidden[:, -1], method="head"), cache

    return adapt(forward)(params, ids, mask, cache)


def add_token(
    kind: Kind, state: GenerationState, logits: Float[Array, "batch vocab"], sampling: Sampling
) -> GenerationState:
    """Chooses each row's next token; a row that has stopped gets padding."""
    token = jnp.where(state.stopped, sampling.pad, choose_tokens(kind, logits, sampling, state.step))
    return state._replace(
        token=token,
        stopped=state.stopped | (token[:, None] == sampling.stop).any(axis=1),
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        step=state.step + 1,
    )


def choose_tokens(
    kind: Kind, logits: Float[Array, "batch vocab"], sampling: Sampling, step: Int[Array, ""]
) -> Int[Array, "batch"]:
    """The most likely tokens, or drawn tokens."""
    if kind == "greedy":
        return logits.argmax(axis=-1).astype(jnp.int32)
    scores = warp(logits, sampling, cut=kind == "filtered")
    # A separate key for each row and step, so that a row's draws depend on neither the batch nor the bucket sizes.
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(sampling.key, row), step))
    return jax.vmap(jax.random.categorical)(keys(jnp.arange(len(scores))), scores).astype(jnp.int32)


def warp(logits: Float[Array, "batch vocab"], sampling: Sampling, *, cut: bool) -> Float[Array, "batch vocab"]:
    """Logits after temperature and, if `cut`, top_k and top_p, with -inf for the tokens that are not drawn."""
    logits = logits.astype(jnp.float32)
    # The best score is 0, so that the division can't overflow there at any temperature.
    scores = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if not cut:
        return scores
    rising = jnp.sort(scores, axis=-1)
    vocab = scores.shape[-1]
    least = rising[:, vocab - jnp.minimum(sampling.top_k, vocab)][:, None]
    rising = jnp.where(rising < least, -jnp.inf, rising)
    drawable = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) > sampling.tail
    # For a tiny top_p the rounded sum may not exceed the tail. The most likely token can always be drawn.
    drawable = drawable.at[:, -1].set(True)
    least = jnp.where(drawable, rising, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(scores < least, -jnp.inf, scores)


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The power of two that this length is padded to.

    >>> [bucket(length) for length in (1, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(shortest, 1 << (length - 1).bit_length())


def bucket_sizes(longest: int, limit: int, positions: int | None) -> tuple[int, int]:
    """Numbers of slots for the prompts and for the new tokens: buckets, or less if the model has too few positions.

    >>> bucket_sizes(20, 100, None), bucket_sizes(600, 100, 1024), bucket_sizes(600, 424, 1024)
    ((32, 128), (896, 128), (600, 424))
    """
    time, room = bucket(longest), bucket(limit)
    if positions is not None:
        room = min(room, positions - longest)
        time = min(time, positions - room)
    return time, room


def prepare_request(
    model: nn.Module,
    params: Tree,
    input_ids: Any,
    attention_mask: Any,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_tokens: int | Sequence[int],
    pad_token: int,
    key: Key[Array, ""] | None,
) -> GenerationRequest:
    """Checks all arguments and converts them to the form that the compiled functions take."""
    rows, offenders = read_rows(input_ids, attention_mask)
    stops = read_stops(stop_tokens)
    offenders += unusable_settings(max_new_tokens, temperature, top_k, top_p) + unusable_key(key)
    if not hasattr(model, "init_cache"):
        offenders.append(f"{type(model).__name__} has no cache: only a decoder can generate")
    elif model.head_type != "causal_lm":
        offenders.append(f"the model has the head {model.head_type!r}: only 'causal_lm' can generate")
    else:
        offenders += unusable_tokens(model.config, rows, stops, max_new_tokens)
        offenders += unusable_pad(pad_token, model.config.vocab_size) + unusable_params(model, params)
    if offenders:
        problem = f"{count(len(offenders), 'argument')} can't be used."
        raise JloraValueError("generate", problem, offenders, "correct what is listed.")
    config = model.config
    time, room = bucket_sizes(max(map(len, rows)), max_new_tokens, num_positions(config))
    ids, mask = np.zeros((2, len(rows), time), np.int32)
    for n, row in enumerate(rows):
        ids[n, time - len(row) :], mask[n, time - len(row) :] = row, 1
    stop = np.full(bucket(len(stops), STOPS), NO_TOKEN, np.int32)
    stop[: len(stops)] = stops
    sampling = Sampling(
        # The temperature must be above 0 in float32 too.
        temperature=jnp.float32(max(temperature, np.finfo(np.float32).tiny)),
        top_k=jnp.int32(min(top_k or config.vocab_size, config.vocab_size)),
        tail=jnp.float32(0 if top_p is None else 1 - top_p),
        stop=jnp.asarray(stop),
        pad=jnp.int32(pad_token),
        key=jax.random.key(0) if key is None else key,
    )
    method: Kind = "sampled" if top_k is None and top_p in (None, 1) else "filtered"
    return GenerationRequest(ids, mask, max_new_tokens, room, "greedy" if temperature == 0 else method, sampling)


def read_stops(stop_tokens: Any) -> np.ndarray:
    """The stop tokens as an array with one axis, before they are checked."""
    try:
        return np.atleast_1d(np.asarray(stop_tokens))
    except ValueError:  # lists of different lengths
        stops = np.empty(len(stop_tokens), object)
        stops[:] = stop_tokens
        return stops


def read_rows(input_ids: Any, attention_mask: Any) -> tuple[list[Int[np.ndarray, "time"]], list[str]]:
    """The prompts without padding, and the errors in their form."""
    try:
        rows = [np.asarray(row) for row in to_host(input_ids)]
        ones = [np.ones(len(row)) for row in rows]
        masks = [np.asarray(mask) != 0 for mask in (ones if attention_mask is None else to_host(attention_mask))]
    except TypeError:
        return [], ["input_ids and attention_mask must have two axes: (batch, time)"]
    if [row.shape for row in rows] != [mask.shape for mask in masks] or any(row.ndim != 1 for row in rows):
        return [], ["input_ids and attention_mask must have two axes of the same sizes: (batch, time)"]
    offenders = [] if rows else ["input_ids: there is no prompt"]
    for n, mask in enumerate(masks):
        (indices,) = mask.nonzero()
        if not len(indices):
            offenders.append(f"prompt {n} is empty")
        elif indices[-1] - indices[0] >= len(indices):
            offenders.append(f"prompt {n} has padding between its tokens")
    return [row[mask] for row, mask in zip(rows, masks, strict=True)], offenders


def to_host(batch: Any) -> Any:
    """Fetches an array in one transfer. Lists, whose rows may differ in length, are returned as they are."""
    return np.asarray(batch) if hasattr(batch, "ndim") else batch


def unusable_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> list[str]:
    """The settings that are out of range."""
    offenders = []
    if not (isinstance(max_new_tokens, numbers.Integral) and max_new_tokens >= 1):
        offenders.append(f"max_new_tokens is {max_new_tokens!r}  expected: a whole number from 1")
    if not (isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf):
        offenders.append(f"temperature is {temperature!r}  expected: a number from 0")
    if not (top_k is None or (isinstance(top_k, numbers.Integral) and top_k >= 1)):
        offenders.append(f"top_k is {top_k!r}  expected: a whole number from 1")
    if not (top_p is None or (isinstance(top_p, numbers.Real) and 0 < top_p <= 1)):
        offenders.append(f"top_p is {top_p!r}  expected: a number above 0, to 1")
    return offenders


def unusable_seed(seed: int) -> list[str]:
    """The seed, if it is out of range."""
    return [] if 0 <= seed < 2**32 else [f"seed is {seed!r}  expected: a whole number from 0 to 4294967295"]


def unusable_key(key: Any) -> list[str]:
    """The key, if it is not a key of jax.random."""
    dtype = getattr(key, "dtype", None)
    if key is None or (dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32)):
        return []
    return [f"key is {key!r}  expected: jax.random.key(seed)"]


def unusable_pad(pad_token: Any, vocab_size: int) -> list[str]:
    """The padding token, if it is not in the vocabulary."""
    if isinstance(pad_token, numbers.Integral) and pad_token in range(vocab_size):
        return []
    return [f"pad_token is {pad_token!r}  expected: a token id from 0 to {vocab_size - 1}"]


def unusable_params(model: nn.Module, params: Any) -> list[str]:
    """The parameters that differ from the model's. Adapters are ignored."""
    if not isinstance(params, Mapping):
        return [f"params is a {type(params).__name__}  expected: the tree of parameters that load_model returns"]
    leaves = flatten(params)
    offenders = []
    for path, shape in parameter_shapes(model).items():
        if path not in leaves:
            offenders.append(f"params has no {path!r}")
        elif np.shape(leaves[path]) != shape:
            offenders.append(f"params has {path!r} with the shape {np.shape(leaves[path])}, the model {shape}")
        elif isinstance(leaves[path], jax.ShapeDtypeStruct):
            offenders.append(f"params has {path!r} without values")
    more = len(offenders) - SHOWN
    rest = [f"and {count(more, 'more parameter that does', 'more parameters that do')} not fit"] if more > 0 else []
    return offenders[:SHOWN] + rest


@functools.lru_cache(maxsize=16)
def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each of a model's parameters, by path."""
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def unusable_tokens(
    config: Any, rows: Sequence[Int[np.ndarray, "time"]], stops: Int[np.ndarray, "stops"], max_new_tokens: int
) -> list[str]:
    """Tokens outside the vocabulary, and prompts with more tokens than the model has positions."""
    offenders = []
    for name, ids in [*((f"prompt {n}", row) for n, row in enumerate(rows)), ("stop_tokens", stops)]:
        unknown = [token for token in ids.tolist() if token not in range(config.vocab_size)]
        if unknown:
            offenders.append(f"{name} has {quoted(unknown)}, the vocabulary 0 to {config.vocab_size - 1}")
    positions = num_positions(config)
    if positions is not None and isinstance(max_new_tokens, numbers.Integral):
        offenders += [
            f"prompt {n} has {len(row)} tokens, plus {max_new_tokens} new ones, but the model has {positions} positions"
            for n, row in enumerate(rows)
            if len(row) + max_new_tokens > positions
        ]
    return offenders


def num_positions(config: Any) -> int | None:
    """The largest number of tokens of a text; None if positions are computed, not learned."""
    return getattr(config, "num_positions", None)
