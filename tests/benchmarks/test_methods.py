"""The ways to fine-tune that `benchmarks/methods.py` compares: each is what its paper says, and trains that alone."""

import dataclasses
import math
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_job
from safetensors.numpy import load_file

from jlora.models.bert import Bert, BertConfig
from jlora.models.decoder import Decoder, DecoderConfig, rope_table, rotate
from jlora.models.layers import join_heads, split_heads
from jlora.training.step import TrainState, make_train_step
from jlora.tree.paths import flatten
from jlora.tree.splitting import join

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import methods
import tuning

LAYERS, WIDTH, INNER, VOCABULARY, LABELS, TOKENS = 1, 16, 24, 40, 3, 4
KINDS = ("bert", "decoder")

quick = tiny_job.quick


def make_model(kind, layers=LAYERS):
    """A random model whose hidden states differ, and its parameters."""
    if kind == "decoder":
        shape = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_layers": layers, "num_heads": 4}
        model = Decoder(DecoderConfig(vocab_size=VOCABULARY, num_kv_heads=2, **shape))
    else:
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=INNER,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
        model = Bert(config, head="classification", pooling="mean", num_labels=LABELS)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models():
    return {kind: make_model(kind) for kind in KINDS}


def texts(rows=5, time=9, short=6):
    """Ids and masks, one row padded."""
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (rows, time), dtype=np.int32)
    mask = np.ones_like(ids)
    mask[0, short:] = 0
    return jnp.asarray(ids), jnp.asarray(mask)


def batch_for(kind):
    ids, mask = texts()
    labels = ids[:, 0] % LABELS if kind == "bert" else jnp.roll(ids, -1, 1)
    weights = jnp.ones(len(ids)) if kind == "bert" else mask.astype(float)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "weights": weights}


TRAINED = [name for name in tuning.METHODS if name != "base"]


@pytest.fixture(scope="module")
def made(models):
    """Every method on every model."""
    return {
        (kind, name): build(*models[kind], jax.random.key(3))
        for kind in KINDS
        for name, build in tuning.METHODS.items()
    }


def run(method, ids, mask, tree=None):
    return jax.jit(method.apply)(method.tree if tree is None else tree, ids, mask)


def run_base(model, params, ids, mask):
    return jax.jit(model.apply)({"params": params}, ids, mask)


def close(left, right):
    np.testing.assert_allclose(left, right, atol=2e-5, rtol=2e-5)


def raw(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}


def sizes(tree, pattern):
    return sum(leaf.size for path, leaf in flatten(tree).items() if re.fullmatch(pattern, path))


@pytest.mark.parametrize("name", ["base", "full", "houlsby-8", "lora"])
def test_a_method_that_begins_neutral_begins_as_the_base(made, name, models, kind):
    model, params = models[kind]
    method, (ids, mask) = made[kind, name], texts()
    close(run(method, ids, mask), run_base(model, params, ids, mask))


def test_a_bottleneck_stands_between_the_projection_and_the_sum(models):
    """Oracle: the base's last layer by hand, from what its modules give."""
    model, params = models["bert"]
    model = model.clone(head=None)
    method, (ids, mask) = tuning.houlsby(model, params, jax.random.key(3), width=5), texts()
    last = f"encoder/layer_{LAYERS - 1}/output/dense"
    rng = np.random.default_rng(2)
    adapter = {
        "down": {"kernel": rng.normal(size=(WIDTH, 5)), "bias": rng.normal(size=5)},
        "up": {"kernel": rng.normal(size=(5, WIDTH)), "bias": rng.normal(size=WIDTH)},
    }
    added = method.tree["added"] | {last: jax.tree.map(jnp.asarray, adapter)}
    out = run(method, ids, mask, {**method.tree, "added": added})

    _, kept = jax.jit(partial(model.apply, capture_intermediates=True))({"params": params}, ids, mask)
    layer = kept["intermediates"]["encoder"][f"layer_{LAYERS - 1}"]
    y, residual = (np.asarray(layer[part]["__call__"][0], float) for part in ("intermediate", "attention"))
    own = params["encoder"][f"layer_{LAYERS - 1}"]["output"]
    y = y @ np.asarray(own["dense"]["kernel"], float) + np.asarray(own["dense"]["bias"], float)
    inner = y @ adapter["down"]["kernel"] + adapter["down"]["bias"]
    erf = np.vectorize(math.erf)
    y = y + 0.5 * inner * (1 + erf(inner / 2**0.5)) @ adapter["up"]["kernel"] + adapter["up"]["bias"]
    y = residual + y
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + model.config.layer_norm_eps)
    close(out, y * np.asarray(own["LayerNorm"]["scale"]) + np.asarray(own["LayerNorm"]["bias"]))


def test_a_prompt_of_real_words_is_those_words_before_the_text(models, kind):
    model, params = models[kind]
    method, (ids, mask) = tuning.prompt(model, params, jax.random.key(3), tokens=TOKENS), texts()
    words = jnp.array([[7, 2, 9, 4]] * len(ids))
    table = flatten(params)[f"{tuning.sites_of(model).words}/embedding"]
    tree = {**method.tree, "added": {"embedding": table[words[0]]}}
    whole = jnp.concatenate([words, ids], 1), jnp.concatenate([jnp.ones_like(words), mask], 1)
    expected = run_base(model, params, *whole)
    close(run(method, ids, mask, tree), expected if kind == "bert" else expected[:, TOKENS:])


def test_a_prefix_of_the_keys_and_values_of_real_words_is_those_words(kind):
    """The words stand after BERT's text, whose places stay as they are then, and before the decoder's."""
    model, params = make_model(kind, layers=2)
    model = model.clone(head=None) if kind == "bert" else model
    method = tuning.prefix(model, params, jax.random.key(3), tokens=TOKENS)
    ids, mask = texts()
    ids, mask = ids[1:2], mask[1:2]
    words = jnp.array([[7, 2, 9, 4]])
    order = (lambda a, b: [b, a]) if kind == "bert" else (lambda a, b: [a, b])
    whole = jnp.concatenate(order(words, ids), 1)
    place = slice(ids.shape[1], None) if kind == "bert" else slice(TOKENS)
    added = jax.tree.map(lambda leaf: leaf[place], tuning.keys_and_values(model, params, whole))
    if kind == "decoder":
        # Rotated to the places before the text's first.
        config = model.config
        rope = rope_table(jnp.arange(-TOKENS, 0)[None], config.rope.frequencies(config.head_width))
        for pair in added.values():
            pair["keys"] = join_heads(rotate(split_heads(pair["keys"][None], config.kv_heads), rope))[0]
    assert jax.tree.structure(added) == jax.tree.structure(method.tree["added"])
    expected = run_base(model, params, whole, jnp.ones_like(whole))
    expected = expected[:, : ids.shape[1]] if kind == "bert" else expected[:, TOKENS:]
    close(run(method, ids, mask, {**method.tree, "added": added}), expected)


def test_padding_sees_no_difference_where_there_is_a_prefix_or_a_prompt(made, kind):
    for name in ("prefix", "prompt"):
        method, (ids, mask) = made[kind, name], texts()
        full, cut = (run(method, ids[:1, :time], mask[:1, :time]) for time in (9, 6))
        close(full if kind == "bert" else full[:, :6], cut)


@pytest.mark.parametrize("name", TRAINED)
def test_each_method_learns_and_leaves_the_rest_bit_identical(name, made, kind):
    method, batch = made[kind, name], batch_for(kind)
    trained, frozen = method.split()
    before, start = raw(frozen), raw(trained)
    tx = tuning.optimizer(method, 1e-2, 1e-2, 40)
    step = make_train_step(tuning.loss_fn(method), tx)
    state, losses = TrainState.create(trained, tx, jax.random.key(0)), []
    for _ in range(15):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.97 * losses[0]
    assert raw(frozen) == before
    after = raw(state.adapters)
    # What no token of the batch reads can't learn.
    assert {path for path in start if after[path] == start[path]} <= {
        path for path in start if path.endswith("token_type_embeddings/embedding")
    }
    tree = join(state.adapters, frozen)
    assert jax.tree.structure(tree) == jax.tree.structure(method.tree)


def test_a_new_head_trains_in_every_method_at_a_rate_of_its_own(made):
    for name in TRAINED:
        method = made["bert", name]
        trained, _ = method.split()
        assert sizes(trained, method.head) == WIDTH * LABELS + LABELS
        tx = tuning.optimizer(method, 1e-3, 5e-2, 10)
        grads, state, update = jax.tree.map(jnp.ones_like, trained), tx.init(trained), jax.jit(tx.update)
        for _ in range(2):
            updates, state = update(grads, state, trained)
        flat = flatten(updates)
        head, own = (
            [float(np.abs(flat[path]).max()) for path in flat if bool(re.fullmatch(method.head, path)) is out]
            for out in (True, False)
        )
        np.testing.assert_allclose(max(head) / max(own), 50, rtol=1e-5)


def test_what_is_trained_agrees_with_arithmetic(made, models, kind):
    d, square = WIDTH, (2 if kind == "decoder" else 4)
    counts = {name: made[kind, name].split()[0] for name in tuning.METHODS}
    # Square kernels; the decoder's keys and values have half the heads. Then the feed-forward's.
    narrow = 2 * (d + d // 2) * 8 if kind == "decoder" else 0
    feed_forward = (3 if kind == "decoder" else 2) * (d + INNER) * 8
    assert sizes(counts["lora"], ".*_lora_[ab]") == LAYERS * (square * 2 * d * 8 + narrow + feed_forward)
    for width in (8, 64):
        trained = counts[f"houlsby-{width}"]
        assert sizes(trained, "added/.*/kernel") == LAYERS * 2 * (2 * d * width)
        assert sizes(trained, "added/.*/bias") == LAYERS * 2 * (d + width)
        norms = (2 * LAYERS + 1) * d * (1 if kind == "decoder" else 2)
        assert sizes(trained, "model/(?!classifier).*") == norms
    kv = d // 2 if kind == "decoder" else d
    assert sizes(counts["prefix"], "added/.*") == LAYERS * tuning.TOKENS * 2 * kv
    assert sizes(counts["prompt"], "added/.*") == tuning.TOKENS * d
    assert sizes(counts["full"], ".*") == sum(leaf.size for leaf in jax.tree.leaves(models[kind][1]))


def test_a_bottleneck_of_64_has_eight_times_the_parameters_of_lora_at_a_square_kernel(made):
    site = "encoder/layer_0/attention/output/dense"
    houlsby, lora = (flatten(made["bert", name].tree) for name in ("houlsby-64", "lora"))
    wide = sum(leaf.size for path, leaf in houlsby.items() if re.fullmatch(f"added/{site}/.*/kernel", path))
    narrow = sum(leaf.size for path, leaf in lora.items() if re.fullmatch(f"model/{site}/kernel_lora_[ab]", path))
    assert wide == 8 * narrow == 2 * WIDTH * 64


def test_merged_lora_costs_the_bases_forward_pass_and_every_other_addition_more(made, models, kind):
    ids, mask = texts()
    cost = {name: methods.forward_flops(made[kind, name], ids, mask) for name in tuning.METHODS}
    base = cost["base"]
    model, _ = models[kind]
    method = tuning.merged(model, turned(made[kind, "lora"]).tree)
    assert methods.forward_flops(method, ids, mask) == base == cost["full"]
    assert all(cost[name] > base for name in ("houlsby-64", "houlsby-8", "prefix", "prompt", "lora"))
    assert cost["houlsby-64"] > cost["houlsby-8"]


def turned(method):
    """The method with every B away from zero."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.1 if path[-1].key.endswith("_lora_b") else leaf, method.tree
    )
    return dataclasses.replace(method, tree=tree)


def test_merged_lora_gives_what_lora_gives(made, models, kind):
    method, (ids, mask) = turned(made[kind, "lora"]), texts()
    merged = tuning.merged(models[kind][0], method.tree)
    base = run_base(*models[kind], ids, mask)
    out = run(method, ids, mask)
    assert np.abs(out - base).max() > 1e-2
    close(run(merged, ids, mask), out)


def test_what_is_written_is_what_a_method_adds_to_the_base(made, kind, tmp_path):
    for name in TRAINED:
        method = made[kind, name]
        size = methods.write_adapter(method, tmp_path / "adapter.safetensors")
        stored = load_file(tmp_path / "adapter.safetensors")
        trained = flatten(method.split()[0])
        assert stored.keys() == {path for path in trained if not re.fullmatch(method.head, path)}
        assert all(np.array_equal(stored[path], trained[path]) for path in stored)
        assert size == (tmp_path / "adapter.safetensors").stat().st_size


def test_a_merged_model_is_written_whole(models, made, kind, tmp_path):
    method = tuning.merged(models[kind][0], made[kind, "lora"].tree)
    methods.write_adapter(method, tmp_path / "merged.safetensors")
    stored = {path.removeprefix("model/") for path in load_file(tmp_path / "merged.safetensors")}
    assert stored == {path for path in flatten(models[kind][1]) if not path.startswith("classifier")}


def test_the_score_is_over_all_rows_and_targets(made, kind):
    """Oracle: NumPy, row by row without padding."""
    from jlora.data.batches import Row

    rng = np.random.default_rng(5)
    rows = []
    for length in (3, 17, 17, 3, 17):
        ids = rng.integers(1, VOCABULARY, length).astype(np.int32)
        targets = np.array(length % LABELS) if kind == "bert" else np.roll(ids, -1)
        weights = np.ones(targets.shape, np.float32)
        if kind == "decoder":
            weights[-1] = 0
        rows.append(Row(ids, targets.astype(np.int32), weights))
    method = made[kind, "full"]
    found = methods.score(method, method.tree, rows, batch_size=2, max_length=32, pad_id=0)
    losses, right = [], []
    for row in rows:
        logits = np.asarray(run(method, row.ids[None], np.ones_like(row.ids)[None]), float)[0]
        logits, targets = logits.reshape(-1, logits.shape[-1]), row.targets.reshape(-1)
        chosen = row.weights.reshape(-1) > 0
        loss = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
        losses += loss[chosen].tolist()
        right += (logits.argmax(-1) == targets)[chosen].tolist()
    close(found["loss"], np.mean(losses))
    close(found["accuracy"], np.mean(right))


def test_the_optimizer_keeps_two_moments_of_what_trains(made, kind):
    for name in tuning.METHODS:
        method = made[kind, name]
        trained, _ = method.split()
        state = tuning.optimizer(method, 1e-3, 1e-2, 10).init(trained)
        counters = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
        moments = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(trained))
        assert methods.bytes_of(state) == moments + sum(leaf.nbytes for leaf in counters)
