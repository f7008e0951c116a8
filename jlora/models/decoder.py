"""Llama and similar models in Flax linen: one decoder module for all, with a config for their differences.

Llama 2 and 3, Mistral, Qwen 2 and 3 and Gemma 1 to 3 differ only in the values of their `DecoderConfig`. Module
and parameter names are those of the Hugging Face checkpoint (`layers_0/self_attn/q_proj/kernel` for
`model.layers.0.self_attn.q_proj.weight`), every projection is a two-axis kernel `(in, out)`, and the final hidden
states are available without the logits, for a loss that never keeps the logits of a whole batch in memory.

Source:
    Touvron et al. 2023, "Llama 2" (arXiv:2307.09288); Su et al. 2021, RoPE (arXiv:2104.09864);
    Ainslie et al. 2023, grouped-query attention (arXiv:2305.13245); Jiang et al. 2023, "Mistral 7B"
    (arXiv:2310.06825); Gemma 2 (arXiv:2408.00118) and 3 (arXiv:2503.19786) for caps, norms and local layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jlora.errors import JloraValueError, count
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
    make_attention_context,
    make_layers,
    run_layers,
    split_heads,
)

HEADS = ("causal_lm", "classification", "token_classification")
ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings.

    Args:
        theta: base of the frequencies.
        kind: "default"; "linear", all frequencies are divided by `factor`; or "llama3", only the frequencies of long
            wavelengths are divided, with a smooth transition.
        factor: the divisor.
        low_freq_factor: frequencies of wavelengths above original_length / low_freq_factor are divided.
        high_freq_factor: frequencies of wavelengths below original_length / high_freq_factor stay the same.
        original_length: context length in tokens before the model was extended.

    Raises:
        ValueError: the kind is unknown.

    Source:
        Chen et al. 2023, position interpolation (arXiv:2306.15595); Llama 3 (arXiv:2407.21783), section 3.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        check_choice("Rope", kind=(self.kind, ROPES))

    def frequencies(self, width: int) -> Float[np.ndarray, "half"]:
        """Radians per position of each pair of features."""
        frequency = self.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        if self.kind == "linear":
            frequency = frequency / self.factor
        elif self.kind == "llama3":
            turns = self.original_length * frequency / (2 * np.pi)
            fraction = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            weight = np.clip(fraction, 0.0, 1.0)
            frequency = weight * frequency + (1 - weight) * frequency / self.factor
        return frequency.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes and settings of a decoder.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated MLP.
        num_layers: number of decoder blocks.
        num_heads: number of query heads; `hidden_size` must be a multiple of it unless `head_dim` is given.
        num_kv_heads: number of key and value heads, `None` for the number of query heads.
        head_dim: width of one head, `None` for `hidden_size / num_heads`.
        rope: rotary position embeddings.
        local_rope: rotary position embeddings of sliding layers, `None` if they are the same.
        norm_eps: epsilon of every RMSNorm.
        norm_offset: added to every norm's scale; 1 in Gemma, whose scales are stored around 0.
        tie_embeddings: the output head is the embedding table, transposed.
        embedding_scale: factor of the embeddings; sqrt(hidden_size) in Gemma.
        activation: activation function of the gate.
        qkv_bias: the query, key and value projections have biases.
        output_bias: the output projection of attention has a bias.
        mlp_bias: the projections of the MLP have biases.
        qk_norm: normalize queries and keys per head before the rotation.
        post_norms: also normalize the outputs of attention and MLP before they are added.
        sliding_window: number of tokens that a sliding layer attends to, the current one included; `None` for all.
        sliding_layers: one flag per layer, True for a sliding layer; empty means all layers if there is a window.
        causal: a token attends to no later token. False for an encoder such as EmbeddingGemma, which can't generate
            and whose sliding layers attend to as many later tokens as earlier ones.
        query_scale: factor of the scores, `None` for 1 / sqrt(width of a head).
        attention_softcap: bound of the scores, applied with tanh.
        logit_softcap: bound of the logits over the vocabulary, applied with tanh.
        initializer_range: standard deviation of a new classification head.
        dtype: dtype of the matmuls; norms, softmax and rotations use float32 at least.
        param_dtype: dtype of the parameters that `init` creates.
        scan: compile one block for all layers, with parameters stacked on axis 0 under `layers`.
        remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: sizes do not fit, all are listed; or the activation is unknown.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope: Rope = Rope()
    local_rope: Rope | None = None
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    tie_embeddings: bool = False
    embedding_scale: float | None = None
    activation: str = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    causal: bool = True
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        check_choice("DecoderConfig", activation=(self.activation, tuple(ACTIVATIONS)))
        wrong = []
        if self.head_dim is None and self.hidden_size % self.num_heads:
            wrong.append(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            wrong.append(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if not wrong and self.head_width % 2:
            wrong.append(f"the head width {self.head_width} is odd, but rotary embeddings need pairs of features")
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"a sliding_window of {self.sliding_window} tokens includes no token")
        if len(self.sliding_layers) not in (0, self.num_layers):
            wrong.append(f"{len(self.sliding_layers)} sliding_layers for {self.num_layers} layers")
        if wrong:
            problem = f"{count(len(wrong), 'size does', 'sizes do')} not fit."
            raise JloraValueError("DecoderConfig", problem, wrong, "correct them, or pass head_dim.")

    @classmethod
    def from_hf(cls, config: Any, **switches: Any) -> DecoderConfig:
        """Reads transformers' config of Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3.

        Args:
            config: transformers' config.
            switches: dtype, param_dtype, scan, remat.

        Raises:
            ValueError: the config has settings that this model does not support; all are listed.
        """
        kind, ropes = config.model_type, read_ropes(config)
        gemma = kind.startswith("gemma")
        types = tuple(getattr(config, "layer_types", None) or ()) if kind != "mistral" else ()
        offenders = [f"rope {name}: {reason}" for name, rope in ropes.items() for reason in find_unsupported_rope(rope)]
        offenders += [f"layer type {name!r}" for name in sorted({*types} - {"full_attention", "sliding_attention"})]
        activation = config.hidden_activation if kind in ("gemma2", "gemma3_text") else config.hidden_act
        if activation not in ACTIVATIONS:
            offenders.append(f"activation {activation!r}, known: {', '.join(ACTIVATIONS)}")
        bidirectional = bool(getattr(config, "use_bidirectional_attention", None))
        if bidirectional and kind != "gemma3_text":
            offenders.append(f"use_bidirectional_attention is set, which is supported for gemma3_text only, not {kind}")
        if not getattr(config, "is_causal", True):
            offenders.append("is_causal is false: only causal attention is supported")
        if offenders:
            problem, fix = "the config has settings that are not supported.", "use a checkpoint without them."
            raise JloraValueError("DecoderConfig", problem, offenders, fix)
        rope, local = (make_rope(ropes.get(name)) for name in ("full_attention", "sliding_attention"))
        bias = getattr(config, "attention_bias", False)
        window = getattr(config, "sliding_window", None)
        slides = tuple(name == "sliding_attention" for name in types)
        scalar = getattr(config, "query_pre_attn_scalar", None)
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None),
            rope=rope or local or Rope(),
            local_rope=local,
            norm_eps=config.rms_norm_eps,
            norm_offset=1.0 if gemma else 0.0,
            tie_embeddings=config.tie_word_embeddings,
            embedding_scale=config.hidden_size**0.5 if gemma else None,
            activation=activation,
            qkv_bias=kind == "qwen2" or bias,
            output_bias=bias,
            mlp_bias=getattr(config, "mlp_bias", False),
            qk_norm=kind in ("qwen3", "gemma3_text"),
            post_norms=kind in ("gemma2", "gemma3_text"),
            sliding_window=window if any(slides) or kind == "mistral" else None,
            sliding_layers=slides if any(slides) else (),
            causal=not bidirectional,
            query_scale=None if scalar is None else scalar**-0.5,
            attention_softcap=config.attn_logit_softcapping if kind == "gemma2" else None,
            logit_softcap=getattr(config, "final_logit_softcapping", None),
            initializer_range=config.initializer_range,
            **switches,
        )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def slides(self) -> tuple[bool, ...]:
        """For each layer, whether it attends to a sliding window only."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        return self.sliding_layers or (True,) * self.num_layers


def read_ropes(config: Any) -> dict[str, dict[str, Any]]:
    """The rotary parameters of a config by layer type; parameters for all layers are under "full_attention"."""
    ropes = config.rope_parameters or {}
    nested = {name: rope for name, rope in ropes.items() if isinstance(rope, dict)}
    return nested or {"full_attention": ropes}


def find_unsupported_rope(rope: dict[str, Any]) -> list[str]:
    """The rotary parameters of a config that this model does not support."""
    offenders = []
    if rope.get("rope_type", "default") not in ROPES:
        offenders.append(f"rope_type {rope['rope_type']!r}, known: {', '.join(ROPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        offenders.append(
            f"partial_rotary_factor {rope['partial_rotary_factor']}: only the rotation of whole heads is supported"
        )
    return offenders


def make_rope(rope: dict[str, Any] | None) -> Rope | None:
    """The rotary parameters of a config as a `Rope`."""
    if rope is None:
        return None
    names = {
        "rope_theta": "theta",
        "rope_type": "kind",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    }
    return Rope(**{names[name]: value for name, value in rope.items() if name in names and value is not None})


class RMSNorm(nn.Module):
    """Divides by the root mean square over the features, in float32 at least, and scales."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        config = self.config
        init = nn.initializers.constant(1.0 - config.norm_offset)
        scale = self.param("scale", init, (x.shape[-1],), config.param_dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(wide)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.norm_eps)
        return (y * (scale.astype(wide) + config.norm_offset)).astype(config.dtype)


def rope_table(
    positions: Int[Array, "batch time"], frequencies: Float[np.ndarray, "half"]
) -> tuple[Float[Array, "batch 1 time width"], Float[Array, "batch 1 time width"]]:
    """Cosine and signed sine of every position's rotation, for all heads; the sine of the first half is negative."""
    angle = positions[:, None, :, None] * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: Float[Array, "batch heads time width"], rope: tuple[Array, Array]) -> Array:
    """Rotates each pair of features i and i + width / 2, the order of Hugging Face checkpoints."""
    cos, sin = rope
    wide = x.astype(cos.dtype)
    # jnp.roll of the input is faster on XLA's CPU backend than concatenating two computed halves, by 4 % of a block.
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, which also returns its keys and values for the cache."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], past: tuple[Array, Array] | None, view: Any
    ) -> tuple[Float[Array, "batch time d"], tuple[Array, Array]]:
        config = self.config
        rope, bias = view

        def heads(name: str, count: int) -> Float[Array, "batch heads time width"]:
            return split_heads(dense(config, count * config.head_width, name, config.qkv_bias)(x), count)

        q, k = heads("q_proj", config.num_heads), heads("k_proj", config.kv_heads)
        if config.qk_norm:
            q, k = RMSNorm(config, name="q_norm")(q), RMSNorm(config, name="k_norm")(k)
        q, k, v = rotate(q, rope), rotate(k, rope), heads("v_proj", config.kv_heads)
        y = attend(q, k, v, bias, scale=config.query_scale, softcap=config.attention_softcap, past=past)
        return dense(config, config.hidden_size, "o_proj", config.output_bias)(join_heads(y)), (k, v)


class MLP(nn.Module):
    """A gated MLP. Source: Shazeer 2020 (arXiv:2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        config = self.config
        gate = dense(config, config.intermediate_size, "gate_proj", config.mlp_bias)(x)
        up = dense(config, config.intermediate_size, "up_proj", config.mlp_bias)(x)
        return dense(config, config.hidden_size, "down_proj", config.mlp_bias)(
            ACTIVATIONS[config.activation](gate) * up
        )


class Block(nn.Module):
    """Attention, then the MLP, each on a normalized copy of the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], each: Any, views: Any
    ) -> tuple[Float[Array, "batch time d"], tuple[Array, Array]]:
        config = self.config
        kind, past = each

        def normalize(name: str, y: Array) -> Array:
            return RMSNorm(config, name=name)(y)

        attention, mlp = Attention(config, name="self_attn"), MLP(config, name="mlp")
        y, pair = attention(normalize("input_layernorm", x), past, choose_view(views, kind))
        if not config.post_norms:
            x = x + y
            return x + mlp(normalize("post_attention_layernorm", x)), pair
        x = x + normalize("post_attention_layernorm", y)
        y = mlp(normalize("pre_feedforward_layernorm", x))
        return x + normalize("post_feedforward_layernorm", y), pair


def choose_view(views: list[Any], kind: Any) -> Any:
    """The rotary table and the bias for a kind of layer; under scan the kind is traced, so `jnp.where` selects them."""
    if len(views) == 1:
        return views[0]
    if isinstance(kind, int):
        return views[kind]
    return jax.tree.map(lambda first, second: jnp.where(kind == 0, first, second), *views)


class Decoder(nn.Module):
    """Token ids to logits; `hidden` and `head` are its two halves.

    >>> config = DecoderConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
    >>> model, ids = Decoder(config), jnp.zeros((1, 4), jnp.int32)
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

    config: DecoderConfig
    origin: Origin | None = None
    head_type: str = "causal_lm"
    num_labels: int = 2
    pad_token_id: int | None = None

    lora_targets: ClassVar[str] = r"layers(_\d+)?/.*/kernel"
    sharding_rules: ClassVar[tuple[tuple[str, PartitionSpec], ...]] = (
        (r".*/(o_proj|down_proj)/kernel", PartitionSpec("model", None)),
        (r".*/kernel", PartitionSpec(None, "model")),
        (r"embed_tokens/embedding", PartitionSpec("model", None)),
    )

    @property
    def lora_layout(self) -> dict[str, str] | None:
        """The `layout` argument of `wrap`: kernels of scanned layers are stacked."""
        return {r"(?P<stack>layers)/.*/kernel": "sio"} if self.config.scan else None

    @property
    def label_module(self) -> str:
        """The name of the module that computes the logits of the labels."""
        return "score"

    @property
    def pools_apart(self) -> bool:
        """Whether a classifier reads states that are pooled outside of the torch model."""
        return False

    def __post_init__(self):
        check_choice("Decoder", head_type=(self.head_type, HEADS))
        super().__post_init__()

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=config.dtype, param_dtype=config.param_dtype
        )
        self.layers = make_layers(Block, config, count=config.num_layers, scan=config.scan, remat=config.remat)
        self.norm = RMSNorm(config)
        if self.head_type != "causal_lm":
            # Name and bias as in transformers' generic classifiers.
            self.score = nn.Dense(
                self.num_labels,
                use_bias=self.head_type == "token_classification",
                kernel_init=nn.initializers.normal(config.initializer_range),
                dtype=config.dtype,
                param_dtype=config.param_dtype,
            )
        elif not config.tie_embeddings:
            self.lm_head = dense(config, config.vocab_size)

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `batch` rows of at most `length` tokens.

        Raises:
            ValueError: the attention of the model is not causal.
        """
        config = self.config
        if not config.causal:
            fix = "use its hidden states, or a causal model to generate."
            raise JloraValueError("Decoder", "a model with attention in both directions has no cache.", (), fix)
        sizes = {"layers": config.num_layers, "heads": config.kv_heads, "width": config.head_width}
        return Cache.empty(batch, length, **sizes, dtype=config.dtype, scan=config.scan)

    def hidden(
        self,
        input_ids: Int[Array, "batch time"],
        attention_mask: Int[Array, "batch time"] | None = None,
        *,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """The final normalized hidden states (batch, time, d), the input of the head. With a cache, (states, cache)."""
        config = self.config
        context = make_attention_context(input_ids, attention_mask, segment_ids, cache)
        sliding = sorted(set(config.slides))
        ropes = [(config.local_rope or config.rope) if slides else config.rope for slides in sliding]
        views = [
            (
                rope_table(context.positions, rope.frequencies(config.head_width)),
                context.bias(causal=config.causal, window=config.sliding_window if slides else None),
            )
            for slides, rope in zip(sliding, ropes, strict=True)
        ]
        kinds = [sliding.index(slides) for slides in config.slides]
        pairs = None if cache is None else cache.layers
        if config.scan:
            each: Any = (jnp.array(kinds), pairs)
        else:
            each = [(kind, None if pairs is None else pairs[i]) for i, kind in enumerate(kinds)]
        x = self.embed_tokens(input_ids)
        if config.embedding_scale is not None:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        x, new = run_layers(self.layers, x, each, views)
        x = self.norm(x)
        return x if cache is None else (x, cache.write(new, context.segments, after=x))

    def head(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch logits"]:
        """Logits of hidden states, in the compute dtype."""
        if self.head_type != "causal_lm":
            return self.score(hidden)
        logits = self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

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
            check_one_text_per_row("Decoder", segment_ids, cache)
            hidden = self.hidden(input_ids, attention_mask)
            return self.head(last_tokens(hidden, input_ids, attention_mask, self.pad_token_id))
        hidden = self.hidden(input_ids, attention_mask, segment_ids=segment_ids, cache=cache)
        return self.head(hidden) if cache is None else (self.head(hidden[0]), hidden[1])


def dense(config: DecoderConfig, features: int, name: str | None = None, bias: bool = False) -> nn.Dense:
    return nn.Dense(features, use_bias=bias, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def decoder_family(name: str, *, classifier: str | None = None, tokens: bool = True) -> Family:
    """A family that differs from the other decoders only in its config.

    Args:
        name: prefix of its architectures, as in "LlamaForCausalLM".
        classifier: the architecture for sequence classification, if its name has another form.
        tokens: whether transformers has an architecture for token classification.
    """
    heads = {
        "causal_lm": f"{name}ForCausalLM",
        "classification": classifier or f"{name}ForSequenceClassification",
    }
    return Family(
        module=Decoder,
        config=DecoderConfig,
        prefix="model.",
        stack="layers",
        heads=heads | ({"token_classification": f"{name}ForTokenClassification"} if tokens else {}),
        default="causal_lm",
        bare=None,
        head_modules=("lm_head", "score"),
        # A bare model is saved without the prefix.
        spellings=((r"^(embed_tokens|layers|norm)\.", r"model.\1."),),
        # Frequencies that older versions saved; they follow from the config.
        unread=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
        copies={"lm_head.weight": "model.embed_tokens.weight"},
        vocabulary={"embed_tokens/embedding": 0, "lm_head/kernel": 1},
    )


FAMILIES = {
    "llama": decoder_family("Llama"),
    "mistral": decoder_family("Mistral"),
    "qwen2": decoder_family("Qwen2"),
    "qwen3": decoder_family("Qwen3"),
    "gemma": decoder_family("Gemma"),
    "gemma2": decoder_family("Gemma2"),
    "gemma3_text": decoder_family("Gemma3", classifier="Gemma3TextForSequenceClassification", tokens=False),
}
