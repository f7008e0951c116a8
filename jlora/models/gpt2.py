"""GPT-2 in Flax linen: learned positions, pre-norm blocks, one fused projection for queries, keys and values.

Module and parameter names are those of the Hugging Face checkpoint (`h_0/attn/c_attn/kernel` for
`transformer.h.0.attn.c_attn.weight`, which is stored `(in, out)` there too), every projection is a two-axis kernel, and
there is no dropout: the base is frozen in fine-tuning, and adapters have separate dropout.

Source:
    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.errors import JloraValueError
from jlora.models.family import Family
from jlora.models.layers import (
    ACTIVATIONS,
    Cache,
    Origin,
    attend,
    check_choice,
    check_one_text_per_row,
    join_heads,
    last_tokens,
    layer_norm,
    make_attention_context,
    make_layers,
    run_layers,
    split_heads,
)

HEADS = ("causal_lm", "classification", "token_classification")


@dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """The sizes and settings of a GPT-2.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        num_heads: number of attention heads.
        num_positions: number of learned positions, the largest number of tokens of a text.
        intermediate_size: width inside the MLP; `None` for 4 hidden_size.
        norm_eps: epsilon of every LayerNorm.
        activation: activation function of the MLP.
        tie_embeddings: the output head is the embedding table, transposed.
        scale_by_width: divide the scores by sqrt(width of a head).
        scale_by_layer: also divide the scores by the layer's number, counted from 1.
        initializer_range: standard deviation of a new classification head.
        dtype: dtype of the matmuls; norms and softmax use float32 at least.
        param_dtype: dtype of the parameters that `init` creates.
        scan: compile one block for all layers, with parameters stacked on axis 0 under `h`.
        remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: the values don't define a GPT-2; all are listed.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_positions: int = 1024
    intermediate_size: int | None = None
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tie_embeddings: bool = True
    scale_by_width: bool = True
    scale_by_layer: bool = False
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        offenders = []
        if self.activation not in ACTIVATIONS:
            offenders.append(f"activation is {self.activation!r}, known: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_heads:
            offenders.append(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if offenders:
            raise JloraValueError("Gpt2Config", "the values don't define a GPT-2.", offenders, "correct the config.")

    @classmethod
    def from_hf(cls, config: Any, **switches: Any) -> Gpt2Config:
        """Reads transformers' GPT2Config.

        `reorder_and_upcast_attn`, for scores and softmax in float32, is ignored: they are always computed in float32.

        Args:
            config: transformers' config.
            switches: dtype, param_dtype, scan, remat.

        Raises:
            ValueError: the config has settings that this model does not support; all are listed.
        """
        offenders = []
        if config.add_cross_attention:
            offenders.append("add_cross_attention is set: cross-attention is not supported")
        if not getattr(config, "is_causal", True):
            offenders.append("is_causal is false: only causal attention is supported")
        if config.activation_function not in ACTIVATIONS:
            offenders.append(f"activation_function {config.activation_function!r}, known: {', '.join(ACTIVATIONS)}")
        if offenders:
            problem, fix = "the config has settings that are not supported.", "use a checkpoint without them."
            raise JloraValueError("Gpt2Config", problem, offenders, fix)
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            num_layers=config.n_layer,
            num_heads=config.n_head,
            num_positions=config.n_positions,
            intermediate_size=config.n_inner,
            norm_eps=config.layer_norm_epsilon,
            activation=config.activation_function,
            tie_embeddings=config.tie_word_embeddings,
            scale_by_width=config.scale_attn_weights,
            scale_by_layer=config.scale_attn_by_inverse_layer_idx,
            initializer_range=config.initializer_range,
            **switches,
        )

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads

    @property
    def scales(self) -> list[float]:
        """The factor of each layer's attention scores."""
        scale = self.head_width**-0.5 if self.scale_by_width else 1.0
        return [scale / (i + 1) if self.scale_by_layer else scale for i in range(self.num_layers)]


class Attention(nn.Module):
    """Causal self-attention, which also returns its keys and values for the cache."""

    config: Gpt2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], each: Any, bias: Float[Array, "b 1 time source"]
    ) -> tuple[Float[Array, "batch time d"], tuple[Array, Array]]:
        config = self.config
        scale, past = each
        # The output is split, not the kernel, so that a function transform sees the whole kernel.
        parts = jnp.split(dense(config, 3 * config.hidden_size, "c_attn")(x), 3, axis=-1)
        q, k, v = (split_heads(part, config.num_heads) for part in parts)
        y = attend(q, k, v, bias, scale=jnp.asarray(scale, q.dtype), past=past)
        return dense(config, config.hidden_size, "c_proj")(join_heads(y)), (k, v)


class MLP(nn.Module):
    """Two projections, with the activation between them."""

    config: Gpt2Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        config = self.config
        inner = 4 * config.hidden_size if config.intermediate_size is None else config.intermediate_size
        y = ACTIVATIONS[config.activation](dense(config, inner, "c_fc")(x))
        return dense(config, config.hidden_size, "c_proj")(y)


class Block(nn.Module):
    """Attention, then the MLP, each on a normalized copy of the residual stream."""

    config: Gpt2Config

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], each: Any, bias: Float[Array, "b 1 time source"]
    ) -> tuple[Float[Array, "batch time d"], tuple[Array, Array]]:
        config = self.config
        y, pair = Attention(config, name="attn")(norm(config, "ln_1")(x), each, bias)
        x = x + y
        return x + MLP(config, name="mlp")(norm(config, "ln_2")(x)), pair


class Gpt2(nn.Module):
    """Token ids to logits; `hidden` and `head` are its two halves.

    >>> import jax
    >>> config = Gpt2Config(vocab_size=32, hidden_size=8, num_layers=2, num_heads=2, num_positions=16)
    >>> model, ids = Gpt2(config), jnp.zeros((1, 4), jnp.int32)
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> model.apply({"params": params}, ids).shape
    (1, 4, 32)
    >>> model.apply({"params": params}, ids, method="hidden").shape
    (1, 4, 8)

    With `cache=model.init_cache(batch, length)` a call returns (logits, cache), and the next call continues from that
    cache.

    Args:
        config: the sizes of the model.
        origin: the checkpoint of the model, None for a model that is not from a checkpoint.
        head_type: "causal_lm" returns logits (batch, time, vocab); "classification" (batch, labels), computed at each
            row's last token that is not padding; "token_classification" (batch, time, labels).
        num_labels: number of labels of a classification head.
        pad_token_id: the token that sequence classification treats as padding, in addition to masked tokens.

    Raises:
        ValueError: an unknown head_type.
    """

    config: Gpt2Config
    origin: Origin | None = None
    head_type: str = "causal_lm"
    num_labels: int = 2
    pad_token_id: int | None = None

    lora_targets: ClassVar[str] = r"h(_\d+)?/.*/kernel"
    sharding_rules: ClassVar[tuple[tuple[str, PartitionSpec], ...]] = (
        (r".*/c_proj/kernel", PartitionSpec("model", None)),
        (r".*/kernel", PartitionSpec(None, "model")),
        (r"wte/embedding", PartitionSpec("model", None)),
    )

    @property
    def lora_layout(self) -> dict[str, str] | None:
        """The `layout` argument of `wrap`: kernels of scanned layers are stacked."""
        return {r"(?P<stack>h)/.*/kernel": "sio"} if self.config.scan else None

    @property
    def label_module(self) -> str:
        """The name of the module that computes the logits of the labels, as in transformers."""
        return "classifier" if self.head_type == "token_classification" else "score"

    @property
    def pools_apart(self) -> bool:
        """Whether a classifier reads states that are pooled outside of the torch model."""
        return False

    def __post_init__(self):
        check_choice("Gpt2", head_type=(self.head_type, HEADS))
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(0.02)
        dtypes = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.wte = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=init, **dtypes)
        self.wpe = nn.Embed(config.num_positions, config.hidden_size, embedding_init=init, **dtypes)
        self.h = make_layers(Block, config, count=config.num_layers, scan=config.scan, remat=config.remat)
        self.ln_f = norm(config)
        init_head = nn.initializers.normal(config.initializer_range)
        if self.head_type == "classification":
            self.score = nn.Dense(self.num_labels, use_bias=False, kernel_init=init_head, **dtypes)
        elif self.head_type == "token_classification":
            self.classifier = nn.Dense(self.num_labels, kernel_init=init_head, **dtypes)
        elif not config.tie_embeddings:
            self.lm_head = nn.Dense(config.vocab_size, use_bias=False, **dtypes)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens.

        Raises:
            ValueError: there are more tokens than positions.
        """
        config = self.config
        check_length(config, length)
        sizes = {"layers": config.num_layers, "heads": config.num_heads, "width": config.head_width}
        return Cache.empty(batch, length, **sizes, dtype=config.dtype, scan=config.scan)

    def hidden(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The final normalized hidden states (batch, time, d), the input of the head. With a cache, (states, cache).

        Raises:
            ValueError: there are more tokens than positions. A packed row may be longer, because positions count
                within each text; a text in it that is too long results in NaN.
        """
        config = self.config
        if cache is None and segment_ids is None:
            check_length(config, input_ids.shape[1])
        context = make_attention_context(input_ids, attention_mask, segment_ids, cache)
        pairs = None if cache is None else cache.layers
        if config.scan:
            each: Any = (jnp.array(config.scales), pairs)
        else:
            each = [(scale, None if pairs is None else pairs[i]) for i, scale in enumerate(config.scales)]
        x = self.wte(input_ids) + self.wpe(context.positions)
        x, new = run_layers(self.h, x, each, context.bias())
        x = self.ln_f(x)
        return x if cache is None else (x, cache.write(new, context.segments, after=x))

    def head(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch logits"]:
        """Logits of hidden states, in the compute dtype."""
        if self.head_type != "causal_lm":
            return getattr(self, self.label_module)(hidden)
        return self.wte.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)

    def __call__(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the head. With a cache, (logits, the cache with these tokens added).

        Args:
            input_ids: token ids.
            attention_mask: 1 for a token, 0 for padding on either side.
            segment_ids: packed texts, numbered from 1; 0 for padding. Not for sequence classification.
            cache: from `init_cache` or from the previous call. Not for sequence classification.
        """
        if self.head_type == "classification":
            check_one_text_per_row("Gpt2", segment_ids, cache)
            hidden = self.hidden(input_ids, attention_mask)
            return self.head(last_tokens(hidden, input_ids, attention_mask, self.pad_token_id))
        hidden = self.hidden(input_ids, attention_mask, segment_ids=segment_ids, cache=cache)
        return self.head(hidden) if cache is None else (self.head(hidden[0]), hidden[1])


def check_length(config: Gpt2Config, length: int) -> None:
    if length > config.num_positions:
        problem = f"the input has {length} tokens, but the model has {config.num_positions} positions."
        raise JloraValueError("Gpt2", problem, (), "truncate the input.")


def dense(config: Gpt2Config, features: int, name: str) -> nn.Dense:
    return nn.Dense(features, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def norm(config: Gpt2Config, name: str | None = None) -> nn.LayerNorm:
    return layer_norm(config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


FAMILIES = {
    "gpt2": Family(
        module=Gpt2,
        config=Gpt2Config,
        prefix="transformer.",
        stack="h",
        heads={
            "causal_lm": "GPT2LMHeadModel",
            "classification": "GPT2ForSequenceClassification",
            "token_classification": "GPT2ForTokenClassification",
        },
        default="causal_lm",
        bare=None,
        head_modules=("lm_head", "score", "classifier"),
        # Conv1D stores (in, out).
        transpose=False,
        spellings=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),
        # Causal masks that older versions saved.
        unread=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
        copies={"lm_head.weight": "transformer.wte.weight"},
        vocabulary={"wte/embedding": 0, "lm_head/kernel": 1},
    ),
}
