"""GPT-2 against torch's, from a checkpoint made on the spot, and against itself."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jlora
from jlora.models.gpt2 import Gpt2, Gpt2Config

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle, and is not installed")

TOLERANCE = 2e-5
VOCAB, TIME, SHORT = 97, 13, 8


def make(seed=0, **changes):
    """A torch model whose biases and norms are random too, scaled up until its logits spread."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20, "n_inner": 48}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | tokens | changes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.uniform_(-0.3, 0.3)
            else:
                value.normal_(std=0.3)
    return model


def run_torch(model, ids, mask):
    """Logits with positions that count from each row's first token."""
    positions = np.clip(np.cumsum(mask, axis=1) - 1, 0, None)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return model(**{name: torch.tensor(value) for name, value in inputs.items()}).logits.numpy()


def texts():
    """Ids and mask of three rows: one without padding, one padded on the left, one on the right."""
    ids, mask = np.random.default_rng(1).integers(1, VOCAB, (3, TIME)), np.ones((3, TIME), np.int64)
    mask[1, : TIME - SHORT] = mask[2, SHORT:] = 0
    return ids * mask, mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder of several shards, and torch's logits for `texts`."""
    folder, oracle = tmp_path_factory.mktemp("gpt2"), make()
    oracle.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = run_torch(oracle, *texts())
    assert expected.std() > 1
    return folder, expected


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def loaded(request, checkpoint):
    return jlora.load_model(checkpoint[0], scan=request.param)


def run(model, params, *inputs, **options):
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, *inputs, **options)


def through_cache(forward, model, params, ids, mask, chunks):
    """The logits of ids fed to the model chunk by chunk."""
    cache, step, parts, start = model.init_cache(len(ids), ids.shape[1] + 2), jax.jit(forward), [], 0
    for length in chunks:
        part = slice(start, start + length)
        with jax.default_matmul_precision("highest"):
            logits, cache = step({"params": params}, ids[:, part], mask[:, part], cache=cache)
        parts.append(logits)
        start += length
    return np.concatenate(parts, axis=1)


def wrapped(params, model):
    """Adapters on every target, their b not zero."""
    layout = jlora.infer_layout(lambda params, ids: model.apply({"params": params}, ids), params, texts()[0])
    params = jlora.wrap(params, rank=3, alpha=6, targets=model.lora_targets, layout=layout)
    rng = np.random.default_rng(3)
    flat = {
        path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) if path.endswith("_lora_b") else leaf
        for path, leaf in flatten_dict(params, sep="/").items()
    }
    return unflatten_dict(flat, sep="/")


def close(one, other, tolerance):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=tolerance, rtol=tolerance), one, other)


def test_logits_equal_torch_with_padding_on_either_side(loaded, checkpoint):
    (ids, mask), expected = texts(), checkpoint[1]
    logits = np.asarray(run(loaded.model, loaded.params, ids, mask))
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=TOLERANCE, rtol=0)
    unmasked = np.asarray(run(loaded.model, loaded.params, ids[:1]))
    np.testing.assert_allclose(unmasked, expected[:1], atol=TOLERANCE, rtol=0)


def test_packed_texts_have_the_logits_of_each_alone(loaded, checkpoint):
    ids, expected = texts()[0], checkpoint[1]
    # Longer than the number of positions, which count within each text.
    row = np.concatenate([ids[2, :SHORT], [0], ids[0], [0, 0]])[None]
    segments = np.array([2] * SHORT + [0] + [1] * TIME + [0, 0])[None]
    assert row.shape[1] > loaded.model.config.num_positions
    logits = np.asarray(run(loaded.model, loaded.params, row, segment_ids=segments))[0]
    np.testing.assert_allclose(logits[segments[0] == 2], expected[2, :SHORT], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(logits[segments[0] == 1], expected[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("chunks", [[1] * TIME, [5] + [1] * (TIME - 5)], ids=["token by token", "prefill of 5"])
def test_logits_through_the_cache_equal_torch(loaded, checkpoint, chunks):
    (ids, mask), expected = texts(), checkpoint[1]
    logits = through_cache(loaded.model.apply, loaded.model, loaded.params, ids, mask, chunks)
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=TOLERANCE, rtol=0)


def test_every_other_switch_of_the_config_equals_torch(tmp_path):
    switches = {
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "activation_function": "relu",
        "layer_norm_epsilon": 1e-2,
        "n_inner": None,
        "attn_implementation": "eager",
    }
    oracle = make(**switches)
    oracle.save_pretrained(tmp_path)
    ids, mask = texts()
    expected = run_torch(oracle, ids, mask)
    assert expected.std() > 1
    scanned, unrolled = (jlora.load_model(tmp_path, scan=scan) for scan in (True, False))
    assert "lm_head" in scanned.params and unrolled.params["h_0"]["mlp"]["c_fc"]["kernel"].shape == (32, 128)
    for form in (scanned, unrolled):
        logits = np.asarray(run(form.model, form.params, ids, mask))
        np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=TOLERANCE, rtol=0)


def test_default_targets_are_the_kernels_of_the_blocks(loaded):
    paths = flatten_dict(loaded.params, sep="/")
    chosen = {path for path in paths if re.fullmatch(loaded.model.lora_targets, path)}
    blocks = ["h"] if loaded.model.config.scan else ["h_0", "h_1"]
    kernels = ["attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj"]
    assert chosen == {f"{block}/{kernel}/kernel" for block in blocks for kernel in kernels}
    assert paths[f"{blocks[-1]}/attn/c_attn/kernel"].shape[-2:] == (32, 96)


def test_adapted_equals_merged_through_the_cache_too(loaded):
    model, params, (ids, mask) = loaded.model, wrapped(loaded.params, loaded.model), texts()
    merged, adapted = jlora.merge(params), jlora.adapt(model.apply)
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(adapted)({"params": params}, ids, mask))
    expected = np.asarray(run(model, merged, ids, mask))
    assert np.abs(expected - run(model, loaded.params, ids, mask)).max() > 1
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], atol=TOLERANCE, rtol=0)
    cached = through_cache(adapted, model, params, ids, mask, [5, *[1] * (TIME - 5)])
    np.testing.assert_allclose(cached[mask == 1], expected[mask == 1], atol=TOLERANCE, rtol=0)


def test_remat_leaves_logits_and_gradients_as_they_are(loaded, checkpoint):
    again = jlora.load_model(checkpoint[0], scan=loaded.model.config.scan, remat=True)
    ids, mask = texts()

    def loss(model):
        return lambda params: jnp.sin(model.apply({"params": params}, ids, mask)).mean()

    with jax.default_matmul_precision("highest"):
        one, other = (jax.jit(jax.value_and_grad(loss(model)))(loaded.params) for model in (loaded.model, again.model))
    close(other, one, 2e-6)

    def kept(model):
        residuals = jax.eval_shape(lambda params: jax.vjp(loss(model), params)[1], loaded.params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept(again.model) < 0.5 * kept(loaded.model)


def test_head_of_hidden_is_the_whole_model_in_bfloat16_near_torch(loaded, checkpoint):
    model, (ids, mask) = jlora.load_model(checkpoint[0], compute_dtype=jnp.bfloat16).model, texts()
    params = jlora.load_model(checkpoint[0]).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    hidden = jax.jit(functools.partial(model.apply, method="hidden"))({"params": params}, ids, mask)
    logits = jax.jit(functools.partial(model.apply, method="head"))({"params": params}, hidden)
    assert hidden.dtype == logits.dtype == jnp.bfloat16
    error, expected = np.asarray(logits, np.float32) - checkpoint[1], checkpoint[1]
    assert np.abs(error[mask == 1]).mean() < 0.03 * expected.std()


def test_more_tokens_than_positions_is_an_error():
    model = Gpt2(Gpt2Config(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2, num_positions=8))
    message = r"^Gpt2: the input has 9 tokens, but the model has 8 positions\.\nFix: truncate"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
    with pytest.raises(ValueError, match=message):
        model.init_cache(1, 9)


def test_values_that_do_not_define_a_gpt2_are_listed_in_one_error():
    with pytest.raises(ValueError) as error:
        Gpt2Config(vocab_size=11, hidden_size=10, num_layers=1, num_heads=3, activation="gelly")
    assert "activation is 'gelly', known: gelu, gelu_new, " in str(error.value)
    assert "hidden_size 10 is not a multiple of num_heads 3" in str(error.value)
    with pytest.raises(ValueError) as error:
        Gpt2Config.from_hf(transformers.GPT2Config(add_cross_attention=True, activation_function="prelu"))
    assert "add_cross_attention is set" in str(error.value) and "activation_function 'prelu'" in str(error.value)
