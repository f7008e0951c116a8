"""A Llama-style decoder in Flax linen, plain enough to be read by a transform.

Module and parameter names are those of the Hugging Face checkpoint (`layers_0/self_attn/q_proj/kernel` for
`model.layers.0.self_attn.q_proj.weight`), every projection is a two-axis kernel `(in, out)`, and the final
hidden states are to be had apart from the logits, for a loss that never holds the logits of a whole batch.

Source:
    Touvron et al. 2023, "Llama 2" (arXiv:2307.09288); Su et al. 2021, RoPE (arXiv:2104.09864);
    Ainslie et al. 2023, grouped-query attention (arXiv:2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from jlora.core.errors import complain, count


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
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every RMSNorm.
        tie_embeddings: the output head is the embedding table, transposed.
        dtype: what the matmuls are computed in; norms, softmax and rotations use float32 at least.
        param_dtype: what `init` makes the parameters in.
        scan: one compiled block for all layers, parameters stacked on axis 0 under `layers`.
        remat: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: sizes that do not divide, listed together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.head_dim is None and self.hidden_size % self.num_heads:
            wrong.append(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
        if self.num_heads % self.kv_heads:
            wrong.append(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.kv_heads}")
        if not wrong and self.head_width % 2:
            wrong.append(f"a head's width {self.head_width} is odd, but its halves are rotated in pairs")
        if wrong:
            problem = f"{count(len(wrong), 'size')} {'does' if len(wrong) == 1 else 'do'} not fit."
            raise ValueError(complain("DecoderConfig", problem, wrong, "correct them, or pass head_dim."))

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim


class RMSNorm(nn.Module):
    """Divides by the root mean square over the features, in float32 at least, and scales."""

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        y = x.astype(wide)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(self.dtype)


def rope_table(
    positions: Int[Array, "batch time"], width: int, theta: float
) -> tuple[Float[Array, "batch 1 time width"], Float[Array, "batch 1 time width"]]:
    """Cosine, and sine with the sign of each half, of every position's rotation; one row serves all heads."""
    frequency = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angle = positions[:, None, :, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(x: Float[Array, "batch heads time width"], rope: tuple[Array, Array]) -> Array:
    """Rotates feature i with feature i + width / 2, as Hugging Face's checkpoints expect."""
    cos, sin = rope
    wide = x.astype(cos.dtype)
    # Rolling the input costs XLA's CPU backend less than concatenating two computed halves: 4 % of a block.
    return (wide * cos + jnp.roll(wide, x.shape[-1] // 2, axis=-1) * sin).astype(x.dtype)


def causal_bias(attention_mask: Bool[Array, "batch time"] | None, time: int) -> Float[Array, "b 1 t s"]:
    """What is added to the scores: 0 where a query may look, a large negative number where not."""
    visible = jnp.tril(jnp.ones((time, time), bool))[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.astype(bool)[:, None, None, :]
    return jnp.where(visible, 0.0, -1e30).astype(jnp.float32)


def attend(
    q: Float[Array, "batch heads time width"],
    k: Float[Array, "batch kv time width"],
    v: Float[Array, "batch kv time width"],
    bias: Float[Array, "b 1 time source"],
) -> Float[Array, "batch heads time width"]:
    """Softmax attention, heads before time.

    Batch and heads stay the leading axes of both contractions, which is the only order XLA's CPU backend
    multiplies without transposing first.
    """
    batch, heads, time, width = q.shape
    kv = k.shape[1]
    q = q.reshape(batch, kv, (heads // kv) * time, width) if heads != kv else q
    scores = jnp.einsum("bhtd,bhsd->bhts", q * width**-0.5, k, preferred_element_type=bias.dtype)
    scores = scores.reshape(batch, heads, time, -1) + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, kv, -1, scores.shape[-1])
    return jnp.einsum("bhts,bhsd->bhtd", weights, v).reshape(batch, heads, time, width)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"], rope: tuple[Array, Array], bias: Array) -> Array:
        config = self.config
        batch, time, _ = x.shape

        def heads(name: str, count: int) -> Float[Array, "batch heads time width"]:
            y = dense(config, count * config.head_width, name)(x)
            return y.reshape(batch, time, count, config.head_width).swapaxes(1, 2)

        q = rotate(heads("q_proj", config.num_heads), rope)
        k = rotate(heads("k_proj", config.kv_heads), rope)
        y = attend(q, k, heads("v_proj", config.kv_heads), bias)
        y = y.swapaxes(1, 2).reshape(batch, time, config.num_heads * config.head_width)
        return dense(config, config.hidden_size, "o_proj")(y)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch time d"]) -> Float[Array, "batch time d"]:
        config = self.config
        gate = dense(config, config.intermediate_size, "gate_proj")(x)
        up = dense(config, config.intermediate_size, "up_proj")(x)
        return dense(config, config.hidden_size, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """Attention, then the MLP, each on a normed copy of the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time d"], rope: tuple[Array, Array], bias: Array
    ) -> tuple[Float[Array, "batch time d"], None]:
        config = self.config
        x = x + Attention(config, name="self_attn")(norm(config, "input_layernorm")(x), rope, bias)
        return x + MLP(config, name="mlp")(norm(config, "post_attention_layernorm")(x)), None


class Decoder(nn.Module):
    """Token ids to logits; `hidden` and `head` are its two halves.

    >>> config = DecoderConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
    >>> model, ids = Decoder(config), jnp.zeros((1, 4), jnp.int32)
    >>> params = model.init(jax.random.key(0), ids)["params"]
    >>> model.apply({"params": params}, ids).shape
    (1, 4, 32)
    >>> model.apply({"params": params}, ids, method="hidden").shape
    (1, 4, 8)
    """

    config: DecoderConfig

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = nn.Embed(
            config.vocab_size, config.hidden_size, dtype=config.dtype, param_dtype=config.param_dtype
        )
        block = nn.remat(Block, prevent_cse=not config.scan) if config.remat else Block
        if config.scan:
            stacked = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
            )
            layers: Any = stacked(config)
        else:
            layers = [block(config) for _ in range(config.num_layers)]
        self.layers = layers
        self.norm = norm(config)
        if not config.tie_embeddings:
            self.lm_head = dense(config, config.vocab_size)

    def hidden(
        self, input_ids: Int[Array, "batch time"], attention_mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time d"]:
        """The final hidden states, normed: what the head multiplies."""
        config = self.config
        time = input_ids.shape[1]
        positions = jnp.arange(time)[None]
        rope = rope_table(positions, config.head_width, config.rope_theta)
        bias = causal_bias(attention_mask, time)
        x = self.embed_tokens(input_ids)
        if config.scan:
            x, _ = self.layers(x, rope, bias)
        else:
            for layer in self.layers:
                x, _ = layer(x, rope, bias)
        return self.norm(x)

    def head(self, hidden: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """Logits of hidden states, in the compute dtype."""
        return self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden)

    def __call__(
        self, input_ids: Int[Array, "batch time"], attention_mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time vocab"]:
        return self.head(self.hidden(input_ids, attention_mask))


def dense(config: DecoderConfig, features: int, name: str | None = None) -> nn.Dense:
    """A projection without bias."""
    return nn.Dense(features, use_bias=False, dtype=config.dtype, param_dtype=config.param_dtype, name=name)


def norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.norm_eps, config.dtype, config.param_dtype, name=name)
