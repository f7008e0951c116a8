"""Llama and its kin in Flax linen: one decoder, plain enough to be read by a transform, shaped by its config.

Llama 2 and 3, Mistral, Qwen 2 and 3 and Gemma 1 to 3 differ in what `DecoderConfig` says and in nothing else. Module
and parameter names are those of the Hugging Face checkpoint (`layers_0/self_attn/q_proj/kernel` for
`model.layers.0.self_attn.q_proj.weight`), every projection is a two-axis kernel `(in, out)`, and the final hidden
states are to be had apart from the logits, for a loss that never holds the logits of a whole batch.

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
    look,
    make_layers,
    run_layers,
    split_heads,
)

HEADS = ("causal_lm", "classification", "token_classification")
ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of rotary positions.

    Args:
        theta: their base.
        kind: "default"; "linear", all divided by `factor`; or "llama3", the long wavelengths divided, the short ones
            left, those between blended.
        factor: by how much.
        low_freq_factor: wavelengths above original_length / low_freq_factor are divided in full.
        high_freq_factor: those below original_length / high_freq_factor are left.
        original_length: tokens the model was trained on before it was stretched.

    Raises:
        ValueError: an unknown kind.

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
            share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = np.clip(share, 0.0, 1.0)
            frequency = kept * frequency + (1 - kept) * frequency / self.factor
        return frequency.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, and how it is computed.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the gated MLP.
        num_layers: decoder blocks.
        num_heads: query heads; `hidden_size` must be a multiple unless `head_dim` is given.
        num_kv_heads: key and value heads, `None` for as many as query heads.
        head_dim: width of one head, `None` for `hidden_size / num_heads`.
        rope: rotary positions.
        local_rope: those of the sliding layers, where they differ.
        norm_eps: epsilon of every RMSNorm.
        norm_offset: added to every norm's scale; 1 in Gemma, whose scales are stored around 0.
        tie_embeddings: the output head is the embedding table, transposed.
        embedding_scale: what embeddings are multiplied by; sqrt(hidden_size) in Gemma.
        activation: of the gate.
        qkv_bias: the query, key and value projections have biases.
        output_bias: attention's output projection has one.
        mlp_bias: the MLP's projections have them.
        qk_norm: queries and keys are normed, head by head, before they are rotated.
        post_norms: what attention and MLP give is normed too, before it is added.
        sliding_window: how many tokens back a sliding layer sees, itself counted; `None` for all.
        sliding_layers: which layers slide, one flag each; empty for all, where there is a window.
        causal: a token sees no later one; False for an encoder such as EmbeddingGemma, where a sliding layer sees as
            many tokens ahead as back, and which can't generate.
        query_scale: what scores are multiplied by, `None` for 1 / sqrt(width of a head).
        attention_softcap: bound of the scores, by tanh.
        logit_softcap: bound of the logits over the vocabulary, by tanh.
        initializer_range: standard deviation of a fresh classifier.
        dtype: what the matmuls are computed in; norms, softmax and rotations use float32 at least.
        param_dtype: what `init` makes the parameters in.
        scan: one compiled block for all layers, parameters stacked on axis 0 under `layers`.
        remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: sizes that do not fit, listed together; an unknown activation.
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
            wrong.append(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            wrong.append(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.kv_heads}")
        if not wrong and self.head_width % 2:
            wrong.append(f"a head's width {self.head_width} is odd, but its halves are rotated in pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            wrong.append(f"a sliding_window of {self.sliding_window} tokens sees nothing")
        if len(self.sliding_layers) not in (0, self.num_layers):
            wrong.append(f"{len(self.sliding_layers)} sliding_layers for {self.num_layers} layers")
        if wrong:
            problem = f"{count(len(wrong), 'size')} {'does' if len(wrong) == 1 else 'do'} not fit."
            raise JloraValueError("DecoderConfig", problem, wrong, "correct them, or pass head_dim.")

    @classmethod
    def from_hf(cls, config: Any, **switches: Any) -> DecoderConfig:
        """Reads transformers' config of Llama, Mistral, Qwen 2 and 3, Gemma 1 to 3.

        Args:
            config: transformers' config.
            switches: dtype, param_dtype, scan, remat.

        Raises:
            ValueError: values that ask for something this model does not compute, all of them listed.
        """
        kind, ropes = config.model_type, read_ropes(config)
        gemma = kind.startswith("gemma")
        types = tuple(getattr(config, "layer_types", None) or ()) if kind != "mistral" else ()
        offenders = [f"rope {name}: {reason}" for name, rope in ropes.items() for reason in unknown_rope(rope)]
        offenders += [f"layer type {name!r}" for name in sorted({*types} - {"full_attention", "sliding_attention"})]
        activation = config.hidden_activation if kind in ("gemma2", "gemma3_text") else config.hidden_act
        if activation not in ACTIVATIONS:
            offenders.append(f"activation {activation!r}, known: {', '.join(ACTIVATIONS)}")
        bidirectional = bool(getattr(config, "use_bidirectional_attention", None))
        if bidirectional and kind != "gemma3_text":
            offenders.append(f"use_bidirectional_attention is set, which is computed for gemma3_text only, not {kind}")
        if not getattr(config, "is_causal", True):
            offenders.append("is_causal is false: only causal attention is computed here")
        if offenders:
            problem, fix = "the config asks for another model.", "take a checkpoint without them."
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
        """Which layers see a window only."""
        if self.sliding_window is None:
            return (False,) * self.num_layers
        return self.sliding_layers or (True,) * self.num_layers


def read_ropes(config: Any) -> dict[str, dict[str, Any]]:
    """A config's rotary parameters by layer type; one for all stands under "full_attention"."""
    ropes = config.rope_parameters or {}
    nested = {name: rope for name, rope in ropes.items() if isinstance(rope, dict)}
    return nested or {"full_attention": ropes}


def unknown_rope(rope: dict[str, Any]) -> list[str]:
    """What a config's rotary parameters ask for that is not computed here."""
    offenders = []
    if rope.get("rope_type", "default") not in ROPES:
        offenders.append(f"rope_type {rope['rope_type']!r}, known: {', '.join(ROPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        offenders.append(f"partial_rotary_factor {rope['partial_rotary_factor']}: only whole heads are rotated")
    return offenders


def make_rope(rope: dict[str, Any] | None) -> Rope | None:
    """A config's rotary parameters as ours."""
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
    """Cosine, and sine with the sign of each half, of every position's rotation; one row serves all heads."""
    angle = positions[:, None, :, None] * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: Float[Array, "batch heads time width"], rope: tuple[Array, Array]) -> Array:
    """Rotates feature i with feature i + width / 2, as Hugging Face's checkpoints expect."""
    cos, sin = rope
    wide = x.astype(cos.dtype)
    # Rolling the input costs XLA's CPU backend less than concatenating two computed halves: 4 % of a block.
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; its keys and values are given back for the cache."""

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
    """Attention, then the MLP, each on a normed copy of the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], each: Any, views: Any
    ) -> tuple[Float[Array, "batch time d"], tuple[Array, Array]]:
        config = self.config
        kind, past = each

        def normed(name: str, y: Array) -> Array:
            return RMSNorm(config, name=name)(y)

        attention, mlp = Attention(config, name="self_attn"), MLP(config, name="mlp")
        y, pair = attention(normed("input_layernorm", x), past, choose(views, kind))
        if not config.post_norms:
            x = x + y
            return x + mlp(normed("post_attention_layernorm", x)), pair
        x = x + normed("post_attention_layernorm", y)
        y = mlp(normed("pre_feedforward_layernorm", x))
        return x + normed("post_feedforward_layernorm", y), pair


def choose(views: list[Any], kind: Any) -> Any:
    """The view of a layer's kind: by index where that is known, else by selection."""
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

    With `cache=model.init_cache(batch, length)` a call gives (logits, cache), and the next call goes on from there.

    Args:
        config: its shape.
        origin: the checkpoint it comes from, None for a model made by hand.
        head_type: "causal_lm" gives logits (batch, time, vocab); "classification" (batch, labels), read at each row's
            last token that is not padding; "token_classification" (batch, time, labels).
        num_labels: how many labels a classifier has.
        pad_token_id: what a classifier of texts takes for padding beside what the mask leaves out.

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
        """What `wrap` has to be told of the kernels: that those of scanned layers are stacked."""
        return {r"(?P<stack>layers)/.*/kernel": "sio"} if self.config.scan else None

    @property
    def label_module(self) -> str:
        """The module whose outputs are the labels' logits."""
        return "score"

    @property
    def pools_apart(self) -> bool:
        """Whether a classifier reads states that are pooled outside of torch's model."""
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
            # Its name and its bias are those of transformers' generic classifiers.
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
            ValueError: a model whose tokens see later ones.
        """
        config = self.config
        if not config.causal:
            fix = "use its hidden states, or a causal model to generate."
            raise JloraValueError("Decoder", "attention in both directions needs no cache.", (), fix)
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
        """The final hidden states (batch, time, d), normed: what the head multiplies. With a cache, that too."""
        config = self.config
        sight = look(input_ids, attention_mask, segment_ids, cache)
        sliding = sorted(set(config.slides))
        ropes = [(config.local_rope or config.rope) if slides else config.rope for slides in sliding]
        views = [
            (
                rope_table(sight.positions, rope.frequencies(config.head_width)),
                sight.bias(causal=config.causal, window=config.sliding_window if slides else None),
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
        return x if cache is None else (x, cache.write(new, sight.segments, after=x))

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
        """Logits of the head. With a cache, (logits, the cache with these tokens in it).

        Args:
            input_ids: token ids.
            attention_mask: 1 for a token, 0 for padding on either side.
            segment_ids: packed texts, each with a number of its own from 1; 0 for padding. Not for a classifier of
                texts.
            cache: from `init_cache` or from the call before. Not for a classifier of texts.
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
    """A family that differs from its kin in the config alone.

    Args:
        name: of its architectures, as in "LlamaForCausalLM".
        classifier: the architecture that classifies texts, where it is not named as the others.
        tokens: transformers has one that classifies tokens.
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
