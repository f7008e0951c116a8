"""BERT in Flax linen: embeddings, encoder layers, and a head over them.

Modules are named as in the Hugging Face checkpoint (`encoder/layer_0/attention/self/query/kernel` for
`bert.encoder.layer.0.attention.self.query.weight`), every projection is a two-axis kernel `(in, out)`, and
there is no dropout: the base is frozen in fine-tuning, and adapters have separate dropout.

Source:
    Devlin et al. 2018, "BERT" (arXiv:1810.04805).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jlora.errors import JloraValueError
from jlora.models.family import Family
from jlora.models.layers import (
    ACTIVATIONS,
    Origin,
    attend,
    check_choice,
    join_heads,
    layer_norm,
    make_layers,
    run_layers,
    split_heads,
)

HEADS = (None, "classification", "token_classification", "masked_lm")
POOLINGS = ("pooler", "mean", "cls")
SWITCHES = ("param_dtype", "scan", "remat")


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The values of a Hugging Face BERT config that the computation depends on, with their names there, and switches.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of encoder layers.
        num_attention_heads: number of attention heads.
        intermediate_size: width inside the feed-forward pair.
        hidden_act: activation function of the feed-forward pair.
        max_position_embeddings: the largest number of tokens of a row.
        type_vocab_size: number of token types.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of new kernels and tables.
        tie_word_embeddings: the masked-LM head multiplies by the table of word embeddings, transposed.
        param_dtype: dtype of the parameters that `init` creates.
        scan: compile one layer for all, with parameters stacked on axis 0 under `encoder/layer`.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        ValueError: the values don't define a BERT; all are listed.
    """

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
    tie_word_embeddings: bool = True
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    def __post_init__(self):
        offenders = []
        if self.hidden_act not in ACTIVATIONS:
            offenders.append(f"hidden_act is {self.hidden_act!r}, known: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            offenders.append(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}")
        if offenders:
            problem = "the values don't define a BERT."
            raise JloraValueError("BertConfig", problem, offenders, "correct the config.")

    @classmethod
    def from_hf(cls, config: Any, **switches: Any) -> "BertConfig":
        """Reads transformers' BertConfig.

        Args:
            config: transformers' config.
            switches: param_dtype, scan, remat.

        Raises:
            ValueError: the config has settings that this model does not support; all are listed.
        """
        required = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
        offenders = [
            f"{name} is {getattr(config, name)!r}, only {value!r} is supported"
            for name, value in required.items()
            if getattr(config, name, value) != value
        ]
        if offenders:
            problem, fix = (
                "the config has settings that are not supported.",
                "use a checkpoint of a plain BERT encoder.",
            )
            raise JloraValueError("BertConfig", problem, offenders, fix)
        names = [field.name for field in fields(cls) if field.name not in SWITCHES]
        return cls(**{name: getattr(config, name) for name in names}, **switches)


class Embedding(nn.Module):
    """A table whose rows are cast after they are gathered, so that no copy of the table is made."""

    rows: int
    config: BertConfig
    dtype: DTypeLike

    def setup(self) -> None:
        config, init = self.config, nn.initializers.normal(self.config.initializer_range)
        self.embedding = self.param("embedding", init, (self.rows, config.hidden_size), config.param_dtype)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        return jnp.take(self.embedding, ids, axis=0).astype(self.dtype)

    def attend(self, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch rows"]:
        """The product of the hidden states with every row: the table as an output head."""
        return hidden @ self.embedding.astype(self.dtype).T


def dense(config: BertConfig, features: int, dtype: DTypeLike, name: str | None = None) -> nn.Dense:
    """A projection with BERT's initializer."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Dense(features, dtype=dtype, param_dtype=config.param_dtype, kernel_init=init, name=name)


def norm(config: BertConfig, dtype: DTypeLike, name: str | None = None) -> nn.LayerNorm:
    return layer_norm(config.layer_norm_eps, dtype=dtype, param_dtype=config.param_dtype, name=name)


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalized."""

    config: BertConfig
    dtype: DTypeLike

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.word_embeddings = Embedding(config.vocab_size, config, dtype)
        self.position_embeddings = Embedding(config.max_position_embeddings, config, dtype)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config, dtype)
        self.LayerNorm = norm(config, dtype)

    def __call__(
        self, input_ids: Int[Array, "batch time"], token_type_ids: Int[Array, "batch time"] | None
    ) -> Float[Array, "batch time hidden"]:
        time, positions = input_ids.shape[1], self.config.max_position_embeddings
        if time > positions:
            problem = f"the input has {time} tokens, but the model has {positions} positions."
            raise JloraValueError("Bert", problem, (), "truncate the input.")
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        word, position = self.word_embeddings(input_ids), self.position_embeddings(jnp.arange(time))
        return self.LayerNorm(word + self.token_type_embeddings(types) + position)


class SelfAttention(nn.Module):
    """Query, key and value projections, and attention over their heads."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch time hidden"], bias: Float[Array, "batch 1 1 time"] | None
    ) -> Float[Array, "batch time hidden"]:
        config = self.config
        q, k, v = (
            split_heads(dense(config, config.hidden_size, self.dtype, name)(hidden), config.num_attention_heads)
            for name in ("query", "key", "value")
        )
        return join_heads(attend(q, k, v, bias))


class Output(nn.Module):
    """A projection back to the residual stream, normalized after the sum."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, inner: Float[Array, "batch time inner"], residual: Float[Array, "batch time hidden"]
    ) -> Float[Array, "batch time hidden"]:
        projected = dense(self.config, self.config.hidden_size, self.dtype, "dense")(inner)
        return norm(self.config, self.dtype, "LayerNorm")(residual + projected)


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
    """The first, wider layer of the feed-forward pair."""

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
        self, hidden: Float[Array, "batch time hidden"], each: None, bias: Float[Array, "batch 1 1 time"] | None
    ) -> tuple[Float[Array, "batch time hidden"], None]:
        hidden = Attention(self.config, self.dtype, name="attention")(hidden, bias)
        inner = Intermediate(self.config, self.dtype, name="intermediate")(hidden)
        return Output(self.config, self.dtype, name="output")(inner, hidden), each


class Encoder(nn.Module):
    """The stack of layers."""

    config: BertConfig
    dtype: DTypeLike

    def setup(self) -> None:
        config = self.config
        self.layer = make_layers(
            Layer, config, self.dtype, count=config.num_hidden_layers, scan=config.scan, remat=config.remat
        )

    def __call__(
        self, hidden: Float[Array, "batch time hidden"], attention_mask: Int[Array, "batch time"] | None
    ) -> Float[Array, "batch time hidden"]:
        bias = None
        if attention_mask is not None:
            bias = jnp.where(attention_mask.astype(bool), 0.0, jnp.finfo(jnp.float32).min)[:, None, None, :]
        return run_layers(self.layer, hidden, None, bias)[0]


def mean_pool(
    hidden: Float[Array, "batch time hidden"], attention_mask: Int[Array, "batch time"] | None = None
) -> Float[Array, "batch hidden"]:
    """The mean over the tokens whose mask is not 0, as in sentence-transformers' Pooling."""
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask.astype(hidden.dtype)[..., None]
    return (hidden * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


class Pooler(nn.Module):
    """The first token through a projection and tanh."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch hidden"]:
        return jnp.tanh(dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden[:, 0]))


class Transform(nn.Module):
    """The part of the masked-LM head before the projection to the vocabulary."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        projected = dense(self.config, self.config.hidden_size, self.dtype, "dense")(hidden)
        return norm(self.config, self.dtype, "LayerNorm")(ACTIVATIONS[self.config.hidden_act](projected))


class Predictions(nn.Module):
    """Logits over the vocabulary, from the table of word embeddings or, if untied, from a separate projection."""

    config: BertConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "batch time hidden"], attend_to_words: Callable[[Array], Array]
    ) -> Float[Array, "batch time vocab"]:
        config = self.config
        hidden = Transform(config, self.dtype, name="transform")(hidden)
        if not config.tie_word_embeddings:
            return dense(config, config.vocab_size, self.dtype, "decoder")(hidden)
        bias = self.param("bias", nn.initializers.zeros, (config.vocab_size,), config.param_dtype)
        return attend_to_words(hidden) + bias.astype(self.dtype)


class MaskedLm(nn.Module):
    """The masked-LM head, nested one module deeper, as in the checkpoint."""

    config: BertConfig
    dtype: DTypeLike

    def setup(self) -> None:
        self.predictions = Predictions(self.config, self.dtype)

    def __call__(
        self, hidden: Float[Array, "batch time hidden"], attend_to_words: Callable[[Array], Array]
    ) -> Float[Array, "batch time vocab"]:
        return self.predictions(hidden, attend_to_words)


class Bert(nn.Module):
    """BERT with one of its heads, or without a head.

        logits = model.apply({"params": params}, input_ids, attention_mask, token_type_ids)

    Args:
        config: the sizes of the model.
        head: "classification" returns logits (batch, labels); "token_classification" (batch, time, labels); "masked_lm"
            (batch, time, vocab); None returns hidden states (batch, time, hidden).
        pooling: the input of sequence classification: "pooler" (the first token through a projection and tanh, as in
            BertForSequenceClassification), "mean" (over the attention mask, as in sentence-transformers) or "cls" (the
            first token without a projection).
        num_labels: number of labels of a classification head.
        dtype: dtype of the computation, independent of the dtype of the parameters.
        origin: the checkpoint of the model, None for a model that is not from a checkpoint.

    Raises:
        ValueError: the head or the pooling is unknown, or there are more tokens than positions.
    """

    config: BertConfig
    head: str | None = None
    pooling: str = "pooler"
    num_labels: int = 2
    dtype: DTypeLike = jnp.float32
    origin: Origin | None = None

    lora_targets: ClassVar[str] = r"(?!(classifier|cls)/).*/kernel"
    sharding_rules: ClassVar[tuple[tuple[str, PartitionSpec], ...]] = (
        (r".*/output/dense/kernel", PartitionSpec("model", None)),
        (r"encoder/.*/kernel", PartitionSpec(None, "model")),
        (r".*/word_embeddings/embedding", PartitionSpec("model", None)),
    )

    @property
    def head_type(self) -> str | None:
        """The head, with the name of the attribute that all models have."""
        return self.head

    @property
    def label_module(self) -> str:
        """The name of the module that computes the logits of the labels."""
        return "classifier"

    @property
    def pools_apart(self) -> bool:
        """Whether a classifier reads states that are pooled outside of the torch model, as in sentence-transformers."""
        return self.head == "classification" and self.pooling != "pooler"

    @property
    def lora_layout(self) -> dict[str, str] | None:
        """The `layout` argument of `wrap`: kernels of scanned layers are stacked."""
        return {r"(?P<stack>encoder/layer)/.*/kernel": "sio"} if self.config.scan else None

    def __post_init__(self):
        check_choice("Bert", head=(self.head, HEADS), pooling=(self.pooling, POOLINGS))
        super().__post_init__()

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.embeddings = Embeddings(config, dtype)
        self.encoder = Encoder(config, dtype)
        if self.head == "classification" and self.pooling == "pooler":
            self.pooler = Pooler(config, dtype)
        if self.head in ("classification", "token_classification"):
            self.classifier = dense(config, self.num_labels, dtype)
        if self.head == "masked_lm":
            self.cls = MaskedLm(config, dtype)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        token_type_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "*batch features"]:
        hidden = self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask)
        if self.head is None:
            return hidden
        if self.head == "masked_lm":
            return self.cls(hidden, self.embeddings.word_embeddings.attend)
        return self.classifier(self.pool(hidden, attention_mask) if self.head == "classification" else hidden)

    def pool(
        self, hidden: Float[Array, "batch time hidden"], attention_mask: Int[Array, "batch time"] | None
    ) -> Float[Array, "batch hidden"]:
        """The input of sequence classification, one vector per row."""
        if self.pooling == "mean":
            return mean_pool(hidden, attention_mask)
        return self.pooler(hidden) if self.pooling == "pooler" else hidden[:, 0]


FAMILIES = {
    "bert": Family(
        module=Bert,
        config=BertConfig,
        prefix="bert.",
        stack="layer",
        heads={
            "classification": "BertForSequenceClassification",
            "token_classification": "BertForTokenClassification",
            "masked_lm": "BertForMaskedLM",
        },
        default=None,
        bare="BertModel",
        head_modules=("classifier", "cls", "qa_outputs"),
        spellings=(
            (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
            # The names of TensorFlow's LayerNorm, in checkpoints converted from the original release.
            (r"LayerNorm\.gamma$", "LayerNorm.weight"),
            (r"LayerNorm\.beta$", "LayerNorm.bias"),
        ),
        unread=(
            # Buffers of constants (0, 1, 2, ... and zeros) that older versions saved.
            r"bert\.embeddings\.(position|token_type)_ids",
            # Part of the body in the file, but only classification with the pooler reads it.
            r"bert\.pooler\.dense\.(weight|bias)",
            # The next-sentence head of the original release.
            r"cls\.seq_relationship\.(weight|bias)",
            # The file of an untied head has this bias too, but the head adds only the bias of its decoder.
            r"cls\.predictions\.bias",
        ),
        unread_modules=("pooler",),
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        vocabulary={
            "embeddings/word_embeddings/embedding": 0,
            "cls/predictions/bias": 0,
            "cls/predictions/decoder/kernel": 1,
            "cls/predictions/decoder/bias": 0,
        },
        pooled=True,
    ),
}
