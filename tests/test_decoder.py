"""The decoder against transformers' Llama in torch, and against itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jlora.models.decoder import Decoder, DecoderConfig

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_theta": 500.0,
    "norm_eps": 1e-6,
}


def random_params(model: Decoder, ids: jax.Array) -> dict:
    """Weights large enough that logits spread: at the usual initial size bugs hide."""
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [1.2 * leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def logits_of(model: Decoder, params: dict, *args: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, *args)


def stack(params: dict, layers: int) -> dict:
    """The unrolled tree's layers on one leading axis, as scan holds them."""
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    blocks = [params[f"layers_{n}"] for n in range(layers)]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


@pytest.fixture(scope="module")
def ids() -> jax.Array:
    return jax.random.randint(jax.random.key(2), (2, 17), 0, SIZES["vocab_size"])


def torch_llama(config: DecoderConfig, params: dict):
    """Llama of transformers with the same weights, mapped by hand."""
    torch = pytest.importorskip("torch", reason="torch is the oracle and is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle and is not installed")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    ).eval()
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    state = {}
    for path, leaf in traverse_util.flatten_dict(params, sep=".").items():
        name = re.sub(r"layers_(\d+)", r"layers.\1", path)
        module, _, kind = name.rpartition(".")
        name = f"{module}.weight" if module == "lm_head" else f"model.{module}.weight"
        state[name] = torch.tensor(np.asarray(leaf.T if kind == "kernel" else leaf))
    left, extra = model.load_state_dict(state, strict=False)
    assert not extra and set(left) <= {"lm_head.weight"}
    model.tie_weights()
    return torch, model


@pytest.mark.parametrize("head_dim", [None, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_transformers_llama(ids, tied, head_dim):
    config = DecoderConfig(**SIZES, tie_embeddings=tied, head_dim=head_dim)
    model = Decoder(config)
    params = random_params(model, ids)
    torch, oracle = torch_llama(config, params)
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor(np.asarray(ids)).long()).logits.numpy()
    assert expected.std() > 1
    np.testing.assert_allclose(logits_of(model, params, ids), expected, atol=2e-5, rtol=2e-5)


def test_right_padding_leaves_the_logits_of_real_tokens_alone(ids):
    model = Decoder(DecoderConfig(**SIZES))
    params = random_params(model, ids)
    mask = jnp.arange(ids.shape[1]) < 11
    padded = logits_of(model, params, jnp.where(mask, ids, 0), jnp.broadcast_to(mask, ids.shape))
    np.testing.assert_allclose(padded[:, :11], logits_of(model, params, ids[:, :11]), atol=2e-5)


def test_a_masked_token_is_invisible_to_all_that_follow(ids):
    model = Decoder(DecoderConfig(**SIZES))
    params = random_params(model, ids)
    mask = jnp.ones(ids.shape, bool).at[:, 3].set(False)
    one, other = (model.apply({"params": params}, ids.at[:, 3].set(token), mask).at[:, 3].set(0.0) for token in (5, 6))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_unrolled_and_so_do_their_gradients(ids, remat):
    unrolled, scanned = (Decoder(DecoderConfig(**SIZES, scan=scan, remat=remat)) for scan in (False, True))
    params = random_params(unrolled, ids)
    stacked = stack(params, SIZES["num_layers"])
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), ids)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)

    def loss(model):
        return lambda params: jnp.sin(model.apply({"params": params}, ids)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss(unrolled)))(params)
    other, scanned_grads = jax.jit(jax.value_and_grad(loss(scanned)))(stacked)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(logits_of(scanned, stacked, ids), logits_of(unrolled, params, ids), atol=2e-5, rtol=2e-5)
    close(other, value)
    jax.tree.map(close, scanned_grads, stack(grads, SIZES["num_layers"]))


def test_head_of_hidden_is_the_whole_model(ids):
    model = Decoder(DecoderConfig(**SIZES))
    params = random_params(model, ids)
    hidden = jax.jit(functools.partial(model.apply, method="hidden"))({"params": params}, ids)
    head = {"params": {"lm_head": params["lm_head"]}}
    logits = jax.jit(functools.partial(model.apply, method="head"))(head, hidden)
    np.testing.assert_allclose(logits, logits_of(model, params, ids), atol=1e-6, rtol=1e-6)


def test_bfloat16_compute_stays_near_float32(ids):
    config = DecoderConfig(**SIZES, dtype=jnp.bfloat16)
    exact = Decoder(DecoderConfig(**SIZES))
    params = random_params(exact, ids)
    logits, expected = logits_of(Decoder(config), params, ids), logits_of(exact, params, ids)
    assert logits.dtype == jnp.bfloat16
    assert jnp.abs(logits - expected).mean() < 0.03 * expected.std()


def test_sizes_that_do_not_fit_are_listed_together():
    with pytest.raises(ValueError) as error:
        DecoderConfig(vocab_size=8, hidden_size=10, intermediate_size=8, num_layers=1, num_heads=4, num_kv_heads=3)
    assert str(error.value) == (
        "DecoderConfig: 2 sizes do not fit.\n"
        "  hidden_size 10 is no multiple of num_heads 4\n"
        "  num_heads 4 is no multiple of num_kv_heads 3\n"
        "Fix: correct them, or pass head_dim."
    )
