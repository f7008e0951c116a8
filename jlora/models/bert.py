"""BERT in Flax linen: embeddings, encoder layers, and a head over them.

Modules are named as in the Hugging Face checkpoint (`encoder/layer_0/attention/self/query/kernel` for
`bert.encoder.layer.0.attention.self.query.weight`), every projection is a two-axis kernel `(in, out)`, and
there is no dropout: the base is frozen in fine-tuning, and adapters have their own.

Source:
    Devlin et al. 2018, "BERT" (arXiv:1810.04805).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jlora.core.errors import complain


def gelu(x: Array) -> Array:
    """GELU by the error function, exact. Source: Hendrycks & Gimpel, arXiv:1606.08415, section 2."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
HEADS = (None, "classification")
POOLINGS = ("pooler", "mean", "cls")


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The values of a Hugging Face BERT config that shape the computation, under their names there."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        offenders = []
        if self.hidden_act not in ACTIVATIONS:
            offenders.append(f"hidden_act is {self.hidden_act!r}, known: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            offenders.append(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if offenders:
            problem = "values that make no BERT."
            raise ValueError(complain("BertConfig", problem, offenders, "correct the config."))

    @classmethod
    def from_hf(cls, config: Any) -> "BertConfig":
        """Reads transformers' BertConfig.

        Raises:
            ValueError: a value asks for what this model does not compute.
        """
        required = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
        offenders = [
            f"{name} is {getattr(config, name)!r}, only {value!r} is computed here"
            for name, value in required.items()
            if getattr(config, name, value) != value
        ]
        if offenders:
            problem, fix = "the config asks for another model.", "use a checkpoint of a plain BERT encoder."
            raise ValueError(complain("BertConfig", problem, offenders, fix))
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


class Embedding(nn.Module):
    """A table whose rows are cast after they are gathered, so the table itself is never copied."""

    rows: int
    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        init = nn.initializers.normal(self.config.initializer_range)
        table = self.param("embedding", init, (self.rows, self.config.hidden_size))
        return jnp.take(table, ids, axis=0).astype(self.dtype)


def dense(config: BertConfig, features: int, dtype: DTypeLike, name: str) -> nn.Dense:
    """A projection with BERT's initializer."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=dtype, kernel_init=init, name=name)


def layer_norm(config: BertConfig, dtype: DTypeLike) -> nn.LayerNorm:
    """LayerNorm with the two-pass variance: E[x^2] - E[x]^2 cancels where the mean is large."""
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name="LayerNorm")


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalised."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, input_ids: Int[Array, "batch time"], token_type_ids: Int[Array, "batch time"] | None
    ) -> Float[Array, "batch time hidden"]:
        config, time = self.config, input_ids.shape[1]
        if time > config.max_position_embeddings:
            problem = f"{time} tokens, but there are positions for {config.max_position_embeddings}."
            raise ValueError(complain("Bert", problem, (), "truncate the input."))
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        word = Embedding(config.vocab_size, config, self.dtype, name="word_embeddings")(input_ids)
        positions = Embedding(config.max_position_embeddings, config, self.dtype, name="position_embeddings")
        token_types = Embedding(config.type_vocab_size, config, self.dtype, name="token_type_embeddings")
        return layer_norm(config, self.dtype)(word + token_types(types) + positions(jnp.arange(time)))


def attention(
    query: Float[Array, "batch time heads size"],
    key: Float[Array, "batch time heads size"],
    value: Float[Array, "batch time heads size"],
    bias: Float[Array, "batch 1 1 time"] | None,
) -> Float[Array, "batch time heads size"]:
    """Scaled dot-product attention, its softmax in float32 whatever the compute dtype."""
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores if bias is None else scores + bias)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)


class SelfAttention(nn.Module):
    """Query, key and value projections, and attention over their heads."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch time hidden"], bias: Float[Array, "batch 1 1 time"] | None
    ) -> Float[Array, "batch time hidden"]:
        config = self.config
        heads = (*hidden.shape[:2], config.num_attention_heads, -1)
        query, key, value = (
            dense(config, config.hidden_size, self.dtype, name)(hidden).reshape(heads)
            for name in ("query", "key", "value")
        )
        return attention(query, key, value, bias).reshape(hidden.shape)


class Output(nn.Module):
    """A projection back to the residual stream, normalised after the sum."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, inner: Float[Array, "batch time inner"], residual: Float[Array, "batch time hidden"]
    ) -> Float[Array, "batch time hidden"]:
        projected = dense(self.config, self.config.hidden_size, self.dtype, "dense")(inner)
        return layer_norm(self.config, self.dtype)(residual + projected)


class Attention(nn.Module):
    """Self-attention and its output."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch time hidden"], bias: Float[Array, "batch 1 1 time"] | None
    ) -> Float[Array, "batch time hidden"]:
        attended = SelfAttention(self.config, self.dtype, name="self")(hidden, bias)
        return Output(self.config, self.dtype, name="output")(attended, hidden)


class Intermediate(nn.Module):
    """The wide half of the feed-forward pair."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch time inner"]:
        projected = dense(self.config, self.config.intermediate_size, self.dtype, "dense")(hidden)
        return ACTIVATIONS[self.config.hidden_act](projected)


class Layer(nn.Module):
    """One encoder layer: attention, then the feed-forward pair."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch time hidden"], bias: Float[Array, "batch 1 1 time"] | None
    ) -> Float[Array, "batch time hidden"]:
        hidden = Attention(self.config, self.dtype, name="attention")(hidden, bias)
        inner = Intermediate(self.config, self.dtype, name="intermediate")(hidden)
        return Output(self.config, self.dtype, name="output")(inner, hidden)


class Encoder(nn.Module):
    """The stack of layers."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch time hidden"], attention_mask: Int[Array, "batch time"] | None
    ) -> Float[Array, "batch time hidden"]:
        bias = None
        if attention_mask is not None:
            bias = jnp.where(attention_mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        for i in range(self.config.num_hidden_layers):
            hidden = Layer(self.config, self.dtype, name=f"layer_{i}")(hidden, bias)
        return hidden


def mean_pool(
    hidden: Float[Array, "batch time hidden"], attention_mask: Int[Array, "batch time"] | None = None
) -> Float[Array, "batch hidden"]:
    """The mean over the tokens that the mask keeps, as sentence-transformers' Pooling."""
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask.astype(hidden.dtype)[..., None]
    return (hidden * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


class Pooler(nn.Module):
    """The first token, projected."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch hidden"]:
        return jnp.tanh(dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden[:, 0]))


class Bert(nn.Module):
    """BERT with the head that is asked for.

        logits = model.apply({"params": params}, input_ids, attention_mask, token_type_ids)

    Args:
        config: the sizes.
        head: "classification" gives logits (batch, labels); None gives hidden states (batch, time, hidden).
        pooling: what the classifier reads: "pooler" (the first token through a projection and tanh, as
            BertForSequenceClassification), "mean" (over the attention mask, as sentence-transformers) or
            "cls" (the first token as it is).
        num_labels: how many labels the classifier has.
        dtype: what is computed in, whatever the parameters are stored in.

    Raises:
        ValueError: an unknown head or pooling, or more tokens than positions.
    """

    config: BertConfig
    head: str | None = None
    pooling: str = "pooler"
    num_labels: int = 2
    dtype: DTypeLike = jnp.float32

    lora_targets: ClassVar[str] = r"(?!classifier/).*/kernel"

    def __post_init__(self):
        chosen = {"head": (self.head, HEADS), "pooling": (self.pooling, POOLINGS)}
        offenders = [f"{name} {value!r}" for name, (value, known) in chosen.items() if value not in known]
        if offenders:
            fix = f"head is one of {HEADS}, pooling one of {POOLINGS}."
            raise ValueError(complain("Bert", "unknown choice.", offenders, fix))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch labels"] | Float[Array, "batch time hidden"]:
        hidden = Embeddings(self.config, self.dtype, name="embeddings")(input_ids, token_type_ids)
        hidden = Encoder(self.config, self.dtype, name="encoder")(hidden, attention_mask)
        if self.head is None:
            return hidden
        if self.pooling == "pooler":
            pooled = Pooler(self.config, self.dtype, name="pooler")(hidden)
        else:
            pooled = mean_pool(hidden, attention_mask) if self.pooling == "mean" else hidden[:, 0]
        return dense(self.config, self.num_labels, self.dtype, "classifier")(pooled)
