"""Generation: a prompt read once, then one token after another through the key-value cache, all of it on the device.

Two compiled functions do it. `prefill` reads the prompts and chooses the first token; `decode` goes on from there to
any limit, in one loop that ends early once every row has stopped. Lengths are padded to buckets, and whatever is a
number (temperature, top_k, top_p, the limit, the stop tokens) is an argument, so new values compile nothing.
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
SHOWN = 3  # parameters that an error lists

Kind = Literal["greedy", "sampled", "filtered"]


class Sampling(NamedTuple):
    """How tokens are chosen, and when a row stops: traced values all.

    Args:
        temperature: what logits are divided by.
        top_k: how many of the likeliest tokens may be drawn.
        tail: 1 - top_p, the probability that may be cut off.
        stop: the tokens that end a row, filled up with one that is none.
        pad: what follows them.
        key: PRNG key.
    """

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    tail: Float[Array, ""]
    stop: Int[Array, "stops"]
    pad: Int[Array, ""]
    key: Key[Array, ""]


class State(NamedTuple):
    """Where a generation stands.

    Args:
        cache: of all tokens but each row's last.
        token: each row's last token.
        stopped: rows that have met a stop token.
        tokens: the new tokens so far, then padding.
        step: how many of them there are.
    """

    cache: Cache
    token: Int[Array, "batch"]
    stopped: Bool[Array, "batch"]
    tokens: Int[Array, "batch room"]
    step: Int[Array, ""]


class Job(NamedTuple):
    """A request that has passed its checks.

    Args:
        ids: the prompts, padded on the left to their bucket.
        mask: 1 for a token, 0 for padding.
        limit: new tokens at most.
        room: slots for them.
        kind: what a choice computes.
        sampling: how tokens are chosen.
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
    """Continues prompts, and gives the new tokens alone.

    Lengths are padded to powers of two (16, 32, ...), so one compile serves every prompt and every `max_new_tokens`
    of a bucket, at any temperature, top_k, top_p and stop tokens. Adapters are applied as they are: x W + s (x A) B at
    every token. `jlora.merge(params)` saves that work, for the price of a copy of the adapted kernels.

    ::

        tokens = jlora.generate(model, params, [[1, 403, 407], [1, 261]], max_new_tokens=64, stop_tokens=[2])

    Args:
        model: a decoder: its calls take a cache.
        params: a base tree, a wrapped or a merged one.
        input_ids: the prompts: a list of lists of token ids, or an array (batch, time).
        attention_mask: for an array: 1 for a token, 0 for padding, on either side.
        max_new_tokens: tokens to add to each prompt, at most.
        temperature: 0 takes the likeliest token each time; anything above divides the logits and draws from their
            softmax.
        top_k: draw from the k likeliest tokens only; tokens that tie with the last of them stay too.
        top_p: then draw from the fewest of the likeliest tokens whose probabilities reach top_p, ties as above.
        stop_tokens: a row ends with any of them; it is still given.
        pad_token: what fills a row after it has ended.
        key: for drawing, one draw a row and token: a row's do not depend on the other rows. None for
            `jax.random.key(0)`.

    Returns:
        The new tokens (batch, max_new_tokens), without the prompts; `pad_token` after a stop token.

    Raises:
        ValueError: a model without a cache or with too few positions, parameters that are not the model's, prompts that
            are empty, padded amid their tokens or outside the vocabulary, settings out of range (all of them listed).

    Source:
        Holtzman et al. 2020 for top_p (arXiv:1904.09751); Fan et al. 2018 for top_k (arXiv:1805.04833).
    """
    job = prepare(
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
    state = decode(model, job.kind, params, begin(model, params, job), job.sampling, job.limit)
    return state.tokens[:, : job.limit]


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
    """Continues prompts as `generate` does, by the same compiled functions, and gives each step's tokens as they come.

    Args:
        model: as for `generate`, and so are all others.
        params: a base tree, a wrapped or a merged one.
        input_ids: the prompts.
        attention_mask: 1 for a token, 0 for padding.
        max_new_tokens: tokens to add to each prompt, at most.
        temperature: 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only.
        top_p: then from the fewest that reach this probability.
        stop_tokens: a row ends with any of them.
        pad_token: what fills a row after it has ended.
        key: for drawing.

    Returns:
        An iterator over the columns of what `generate` gives; it ends early once all rows have stopped.

    Raises:
        ValueError: as `generate` does, before the first token is asked for.
    """
    job = prepare(
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
    return steps(model, params, job)


def steps(model: nn.Module, params: Tree, job: Job) -> Iterator[Int[np.ndarray, "batch"]]:
    """Every step's tokens, until the limit or until all rows have stopped."""
    state = begin(model, params, job)
    yield np.asarray(state.token)
    for limit in range(2, job.limit + 1):
        if np.asarray(state.stopped).all():
            return
        state = decode(model, job.kind, params, state, job.sampling, limit)
        yield np.asarray(state.token)


def begin(model: nn.Module, params: Tree, job: Job) -> State:
    return prefill(model, job.kind, job.room, params, job.ids, job.mask, job.sampling)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(
    model: nn.Module,
    kind: Kind,
    room: int,
    params: Tree,
    ids: Int[Array, "batch time"],
    mask: Int[Array, "batch time"],
    sampling: Sampling,
) -> State:
    """Reads the prompts and chooses the first of at most `room` new tokens."""
    batch, time = ids.shape
    cache = model.init_cache(batch, time + room)
    logits, cache = last_logits(model, params, ids, mask, cache)
    state = State(
        cache=cache,
        token=jnp.zeros((batch,), jnp.int32),
        stopped=jnp.zeros((batch,), bool),
        tokens=jnp.full((batch, room), sampling.pad, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
    return add_token(kind, state, logits, sampling)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def decode(
    model: nn.Module, kind: Kind, params: Tree, state: State, sampling: Sampling, limit: Int[Array, ""]
) -> State:
    """Adds tokens until there are `limit` of them or all rows have stopped; the cache is updated in place."""

    def unfinished(state: State) -> Bool[Array, ""]:
        return (state.step < limit) & ~state.stopped.all()

    def advance(state: State) -> State:
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
    """Logits of the next token: the head multiplies each row's last hidden state and no other."""

    def forward(params: Tree, ids: Array, mask: Array | None, cache: Cache) -> Any:
        hidden, cache = model.apply({"params": params}, ids, mask, cache=cache, method="hidden")  # type: ignore[assignment]
        return model.apply({"params": params}, hidden[:, -1], method="head"), cache

    return adapt(forward)(params, ids, mask, cache)


def add_token(kind: Kind, state: State, logits: Float[Array, "batch vocab"], sampling: Sampling) -> State:
    """Chooses each row's next token; a row that has stopped gets padding."""
    token = jnp.where(state.stopped, sampling.pad, choose(kind, logits, sampling, state.step))
    return state._replace(
        token=token,
        stopped=state.stopped | (token[:, None] == sampling.stop).any(axis=1),
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.step, axis=1),
        step=state.step + 1,
    )


def choose(
    kind: Kind, logits: Float[Array, "batch vocab"], sampling: Sampling, step: Int[Array, ""]
) -> Int[Array, "batch"]:
    """The likeliest tokens, or drawn ones."""
    if kind == "greedy":
        return logits.argmax(axis=-1).astype(jnp.int32)
    scores = warp(logits, sampling, cut=kind == "filtered")
    # A key for each row and step: neither the batch nor the way the steps are run changes a row's draws.
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(sampling.key, row), step))
    return jax.vmap(jax.random.categorical)(keys(jnp.arange(len(scores))), scores).astype(jnp.int32)


def warp(logits: Float[Array, "batch vocab"], sampling: Sampling, *, cut: bool) -> Float[Array, "batch vocab"]:
    """Scores whose softmax is drawn from: temperature, then, if `cut`, top_k and top_p, what they cut off at -inf."""
    logits = logits.astype(jnp.float32)
    # The best score is 0, so no temperature is too low for the division.
    scores = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if not cut:
        return scores
    rising = jnp.sort(scores, axis=-1)
    vocab = scores.shape[-1]
    least = rising[:, vocab - jnp.minimum(sampling.top_k, vocab)][:, None]
    rising = jnp.where(rising < least, -jnp.inf, rising)
    kept = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) > sampling.tail
    # Rounding may keep the sum below the tail of a tiny top_p; the likeliest token always stays.
    kept = kept.at[:, -1].set(True)
    least = jnp.where(kept, rising, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(scores < least, -jnp.inf, scores)


def bucket(length: int, shortest: int = SHORTEST) -> int:
    """The power of two that this length is padded to.

    >>> [bucket(length) for length in (1, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(shortest, 1 << (length - 1).bit_length())


def sizes(longest: int, limit: int, positions: int | None) -> tuple[int, int]:
    """Slots for the prompts and for the new tokens: buckets, cut where the model has too few positions for them.

    >>> sizes(20, 100, None), sizes(600, 100, 1024), sizes(600, 424, 1024)
    ((32, 128), (896, 128), (600, 424))
    """
    time, room = bucket(longest), bucket(limit)
    if positions is not None:
        room = min(room, positions - longest)
        time = min(time, positions - room)
    return time, room


def prepare(
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
) -> Job:
    """Checks everything at once, and brings it into the form that is compiled for."""
    rows, offenders = read_rows(input_ids, attention_mask)
    stops = read_stops(stop_tokens)
    offenders += unusable_settings(max_new_tokens, temperature, top_k, top_p) + unusable_key(key)
    if not hasattr(model, "init_cache"):
        offenders.append(f"{type(model).__name__} has no cache: only a decoder can generate")
    elif model.head_type != "causal_lm":
        offenders.append(f"the model has the head {model.head_type!r}: only 'causal_lm' can generate")
    else:
        offenders += misfits(model.config, rows, stops, max_new_tokens)
        offenders += unusable_pad(pad_token, model.config.vocab_size) + unusable_params(model, params)
    if offenders:
        problem = f"{count(len(offenders), 'argument')} can't be used."
        raise JloraValueError("generate", problem, offenders, "correct what is listed.")
    config = model.config
    time, room = sizes(max(map(len, rows)), max_new_tokens, positions_of(config))
    ids, mask = np.zeros((2, len(rows), time), np.int32)
    for n, row in enumerate(rows):
        ids[n, time - len(row) :], mask[n, time - len(row) :] = row, 1
    stop = np.full(bucket(len(stops), STOPS), NO_TOKEN, np.int32)
    stop[: len(stops)] = stops
    sampling = Sampling(
        # What is no float32 above 0 can't divide.
        temperature=jnp.float32(max(temperature, np.finfo(np.float32).tiny)),
        top_k=jnp.int32(min(top_k or config.vocab_size, config.vocab_size)),
        tail=jnp.float32(0 if top_p is None else 1 - top_p),
        stop=jnp.asarray(stop),
        pad=jnp.int32(pad_token),
        key=jax.random.key(0) if key is None else key,
    )
    drawn: Kind = "sampled" if top_k is None and top_p in (None, 1) else "filtered"
    return Job(ids, mask, max_new_tokens, room, "greedy" if temperature == 0 else drawn, sampling)


def read_stops(stop_tokens: Any) -> np.ndarray:
    """The stop tokens in one axis, whatever they are."""
    try:
        return np.atleast_1d(np.asarray(stop_tokens))
    except ValueError:  # lists of different lengths
        stops = np.empty(len(stop_tokens), object)
        stops[:] = stop_tokens
        return stops


def read_rows(input_ids: Any, attention_mask: Any) -> tuple[list[Int[np.ndarray, "time"]], list[str]]:
    """The prompts without their padding, and what is wrong with their form."""
    try:
        rows = [np.asarray(row) for row in on_host(input_ids)]
        given = [np.ones(len(row)) for row in rows] if attention_mask is None else on_host(attention_mask)
        masks = [np.asarray(mask) != 0 for mask in given]
    except TypeError:
        return [], ["input_ids and attention_mask have two axes: (batch, time)"]
    if [row.shape for row in rows] != [mask.shape for mask in masks] or any(row.ndim != 1 for row in rows):
        return [], ["input_ids and attention_mask have two axes, of the same sizes: (batch, time)"]
    offenders = [] if rows else ["input_ids: there is no prompt"]
    for n, mask in enumerate(masks):
        (places,) = mask.nonzero()
        if not len(places):
            offenders.append(f"prompt {n} is empty")
        elif places[-1] - places[0] >= len(places):
            offenders.append(f"prompt {n} has padding between its tokens")
    return [row[mask] for row, mask in zip(rows, masks, strict=True)], offenders


def on_host(batch: Any) -> Any:
    """An array fetched in one go; lists, whose rows may differ in length, as they are."""
    return np.asarray(batch) if hasattr(batch, "ndim") else batch


def unusable_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> list[str]:
    """Settings out of range."""
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
    """A seed out of range."""
    return [] if 0 <= seed < 2**32 else [f"seed is {seed!r}  expected: a whole number from 0 to 4294967295"]


def unusable_key(key: Any) -> list[str]:
    """A key that is not one of jax.random."""
    dtype = getattr(key, "dtype", None)
    if key is None or (dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or dtype == jnp.uint32)):
        return []
    return [f"key is {key!r}  expected: jax.random.key(seed)"]


def unusable_pad(pad_token: Any, vocab_size: int) -> list[str]:
    """A token for padding that the vocabulary does not have."""
    if isinstance(pad_token, numbers.Integral) and pad_token in range(vocab_size):
        return []
    return [f"pad_token is {pad_token!r}  expected: a token id from 0 to {vocab_size - 1}"]


def unusable_params(model: nn.Module, params: Any) -> list[str]:
    """What keeps a tree from being the model's parameters, with or without adapters."""
    if not isinstance(params, Mapping):
        return [f"params is a {type(params).__name__}  expected: the tree of parameters that load_model gives"]
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
    return offenders[:SHOWN] + (
        [f"and {count(more, 'more parameter')} that {'do' if more > 1 else 'does'} not fit"] if more > 0 else []
    )


@functools.lru_cache(maxsize=16)
def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each of a model's parameters, by path."""
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def misfits(
    config: Any, rows: Sequence[Int[np.ndarray, "time"]], stops: Int[np.ndarray, "stops"], max_new_tokens: int
) -> list[str]:
    """What the model has no embedding for: tokens and places."""
    offenders = []
    for name, ids in [*((f"prompt {n}", row) for n, row in enumerate(rows)), ("stop_tokens", stops)]:
        unknown = [token for token in ids.tolist() if token not in range(config.vocab_size)]
        if unknown:
            offenders.append(f"{name} has {quoted(unknown)}, the vocabulary 0 to {config.vocab_size - 1}")
    positions = positions_of(config)
    if positions is not None and isinstance(max_new_tokens, numbers.Integral):
        offenders += [
            f"prompt {n} has {len(row)} tokens and is to get {max_new_tokens} more, the model has {positions} positions"
            for n, row in enumerate(rows)
            if len(row) + max_new_tokens > positions
        ]
    return offenders


def positions_of(config: Any) -> int | None:
    """How many tokens a text may have; None where positions are not learned but computed."""
    return getattr(config, "num_positions", None)
