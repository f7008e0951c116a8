"""The decoder against itself and torch's Llama, Mistral, Qwen and Gemma, from checkpoints that the tests create."""

import functools
import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jlora.hf.load import load_model, save_model
from jlora.models.decoder import Decoder, DecoderConfig, Rope

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
VOCABULARY, LAYERS, TIME = 96, 3, 17
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 700.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


FAMILIES = {
    "llama": ("Llama", {"rope_parameters": plain(500.0), "rms_norm_eps": 1e-3}),
    "llama biases": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama tied": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 12}),
    "llama linear": ("Llama", {"rope_parameters": plain(800.0) | {"rope_type": "linear", "factor": 3.0}}),
    "mistral": ("Mistral", {"rope_parameters": plain(300.0), "sliding_window": None}),
    "mistral window": ("Mistral", {"rope_parameters": plain(300.0), "sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": plain(900.0), "tie_word_embeddings": True}),
    "qwen2 window": (
        "Qwen2",
        {"rope_parameters": plain(900.0), "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"rope_parameters": plain(400.0), "head_dim": 16, "attention_bias": True}),
    "gemma": ("Gemma", {"rope_parameters": plain(600.0), "head_dim": 16}),
    "gemma2": (
        "Gemma2",
        {
            "rope_parameters": plain(600.0),
            "head_dim": 16,
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "rope_parameters": {
                "full_attention": plain(5000.0) | {"rope_type": "linear", "factor": 2.0},
                "sliding_attention": plain(100.0),
            },
            "head_dim": 16,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
        },
    ),
}


def make(family, seed=0, **changes):
    """A torch model with random biases and norms, scaled up until its logits spread."""
    kind, values = FAMILIES[family]
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config(**COMMON | values | changes)).eval()
    center = 0.0 if kind.startswith("Gemma") else 1.0
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(center - 0.5, center + 0.5)
            elif value.ndim == 1:
                value.uniform_(-0.3, 0.3)
            else:
                value.normal_(std=1.5 * value.shape[-1] ** -0.5)
    return model


def inputs(side, time=TIME):
    """Ids and mask of three texts, padded on one side or not at all."""
    ids = np.random.default_rng(1).integers(1, VOCABULARY, (3, time))
    mask = np.ones_like(ids)
    if side != "none":
        for row, length in enumerate((time, 9, 4)):
            mask[row, length:] = 0
        if side == "left":
            mask = mask[:, ::-1].copy()
    return ids * mask, mask


def run_torch(model, ids, mask):
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits.numpy()


def run_jax(loaded, *args, **options):
    with jax.default_matmul_precision("highest"):
        return jax.jit(loaded.model.apply)({"params": loaded.params}, *args, **options)


def run_cached(loaded, ids, mask, first=5, slots=TIME + 3):
    """The logits of a first chunk, then token by token, through the cache."""
    step = jax.jit(loaded.model.apply)
    cache, parts, start = loaded.model.init_cache(len(ids), slots), [], 0
    while start < ids.shape[1]:
        end = start + (first if start == 0 else 1)
        with jax.default_matmul_precision("highest"):
            logits, cache = step({"params": loaded.params}, ids[:, start:end], mask[:, start:end], cache=cache)
        parts.append(np.asarray(logits))
        start = end
    return np.concatenate(parts, axis=1)


def close(logits, expected, mask, tolerance=TOLERANCE):
    keep = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(logits)[keep], expected[keep], atol=tolerance, rtol=0)


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    """A family's checkpoint and its torch model."""
    folder = tmp_path_factory.mktemp("checkpoint")
    oracle = make(request.param)
    oracle.save_pretrained(folder)
    return folder, oracle


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_logits_equal_torch_with_any_padding_and_through_the_cache(checkpoint, scan):
    folder, oracle = checkpoint
    loaded = load_model(folder, scan=scan)
    for side in ("none", "left", "right"):
        ids, mask = inputs(side)
        expected = run_torch(oracle, ids, mask)
        assert expected[mask.astype(bool)].std() > 1
        close(run_jax(loaded, ids, mask), expected, mask)
        if side != "right":
            close(run_cached(loaded, ids, mask), expected, mask)
    ids, mask = inputs("none")
    close(run_jax(loaded, ids), run_torch(oracle, ids, mask), mask)


def test_packed_texts_are_each_as_if_alone(tmp_path):
    oracle = make("gemma3")
    oracle.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    ids, mask = inputs("none", 8)
    alone = run_torch(oracle, ids, mask)
    packed = np.concatenate([ids[0], ids[1], [0, 0], ids[2]])[None]
    segments = np.repeat([1, 2, 0, 3], [8, 8, 2, 8])[None]
    logits = run_jax(loaded, packed, segment_ids=segments)[0]
    np.testing.assert_allclose(logits[segments[0] > 0].reshape(alone.shape), alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("rope", [plain(700.0), LLAMA3], ids=["default", "llama3"])
def test_older_and_newer_config_styles_are_equivalent(tmp_path, rope):
    oracle = make("llama", rope_parameters=rope)
    oracle.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config["rope_parameters"]["rope_theta"] == 700.0
    newer = load_model(tmp_path)
    scaling = {name: value for name, value in config.pop("rope_parameters").items() if name != "rope_theta"}
    config |= {"rope_theta": 700.0, "rope_scaling": None if scaling == {"rope_type": "default"} else scaling}
    file.write_text(json.dumps(config))
    assert load_model(tmp_path).model.config == newer.model.config
    ids, mask = inputs("none")
    close(run_jax(newer, ids), run_torch(oracle, ids, mask), mask)


@pytest.mark.parametrize("family", ["mistral window", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_the_older_config_of_every_family_is_equivalent_to_the_newer_one(tmp_path, family):
    make(family).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config, newer = json.loads(file.read_text()), load_model(tmp_path).model.config
    ropes = config.pop("rope_parameters")
    # Before version 5 the bases stood by themselves, that of Gemma 3's sliding layers under a name of its own.
    local, rope = ropes.get("sliding_attention"), ropes.get("full_attention", ropes)
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    config |= {"rope_local_base_freq": local["rope_theta"]} if local else {}
    file.write_text(json.dumps(config))
    assert load_model(tmp_path).model.config == newer


@pytest.mark.parametrize("shards", ["one shard", "several shards"])
def test_bfloat16_shards_are_read_to_the_bit(tmp_path, shards):
    model = make("llama tied").to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == "one shard" else "8KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "several shards")
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids, mask = inputs("none")
    expected = run_torch(oracle, ids, mask)
    close(run_jax(load_model(tmp_path), ids), expected, mask)
    stored = load_model(tmp_path, dtype=jnp.bfloat16, compute_dtype=jnp.float32, scan=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(jnp.bfloat16)}
    close(run_jax(stored, ids), expected, mask)


def random_params(model, ids):
    """Weights large enough that logits spread: at the usual initial size bugs hide."""
    params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [1.2 * leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def logits_of(model, params, *args):
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, *args)


def stack(params, layers):
    """The unrolled tree's layers on one leading axis, as scan holds them."""
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    blocks = [params[f"layers_{n}"] for n in range(layers)]
    return rest | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


@pytest.fixture(scope="module")
def ids():
    return jax.random.randint(jax.random.key(2), (2, TIME), 0, SIZES["vocab_size"])


@pytest.mark.parametrize("sliding", [(), (True, False)], ids=["alike", "alternating"])
@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_unrolled_and_so_do_their_gradients(ids, remat, sliding):
    values = SIZES | {"sliding_layers": sliding, "sliding_window": 4 if sliding else None}
    unrolled, scanned = (Decoder(DecoderConfig(**values, scan=scan, remat=remat)) for scan in (False, True))
    params = random_params(unrolled, ids)
    stacked = stack(params, SIZES["num_layers"])
    shapes = jax.eval_shape(scanned.init, jax.random.key(0), ids)["params"]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, shapes)

    def loss(model):
        return lambda params: jnp.sin(model.apply({"params": params}, ids)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss(unrolled)))(params)
    other, scanned_grads = jax.jit(jax.value_and_grad(loss(scanned)))(stacked)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-4)
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


def test_default_targets_are_the_layers_kernels_and_not_the_head(ids):
    for scan in (False, True):
        params = jax.eval_shape(Decoder(DecoderConfig(**SIZES, scan=scan)).init, jax.random.key(0), ids)["params"]
        paths = ["/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        chosen = {path for path in paths if re.fullmatch(Decoder.lora_targets, path)}
        assert chosen == {path for path in paths if path.endswith("kernel")} - {"lm_head/kernel"}


def test_sizes_that_do_not_fit_are_listed_together():
    with pytest.raises(ValueError) as error:
        DecoderConfig(
            vocab_size=8,
            hidden_size=10,
            intermediate_size=8,
            num_layers=1,
            num_heads=4,
            num_kv_heads=3,
            sliding_window=0,
            sliding_layers=(True, False),
        )
    assert str(error.value) == (
        "DecoderConfig: 4 sizes do not fit.\n"
        "  hidden_size 10 is not a multiple of num_heads 4\n"
        "  num_heads 4 is not a multiple of num_kv_heads 3\n"
        "  a sliding_window of 0 tokens includes no token\n"
        "  2 sliding_layers for 1 layers\n"
        "Fix: correct them, or pass head_dim."
    )


def test_an_unknown_rope_or_activation_is_an_error():
    with pytest.raises(
        ValueError, match=r"Rope: 1 unknown value\.\n  kind is 'llama4', known: default, linear, llama3"
    ):
        Rope(kind="llama4")
    with pytest.raises(ValueError, match="activation is 'swish2', known: gelu"):
        DecoderConfig(**SIZES, activation="swish2")


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0, "factor": 2.0}},
            "rope_type 'yarn', known: default",
        ),
        ({"rope_parameters": {"rope_type": "llamma3", "rope_theta": 9.0}}, "rope_type 'llamma3', known: default"),
        ({"hidden_act": "prelu"}, "activation 'prelu', known: gelu"),
        ({"rope_parameters": plain(9.0) | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ],
)
def test_a_config_with_unsupported_settings_is_an_error(tmp_path, changes, words):
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError) as error:
        load_model(tmp_path)
    assert words in str(error.value) and "\nFix: " in str(error.value)


def rewrite(folder, **changes):
    """Adds tensors to a checkpoint's single file, or drops those given as None."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_tensors_that_a_decoder_does_not_know_or_lacks_are_in_one_error(tmp_path):
    make("llama").save_pretrained(tmp_path)
    frequencies, stray = "model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.q_norm.weight"
    rewrite(tmp_path, **{"lm_head.weight": None, frequencies: np.ones(4, np.float32), stray: np.ones(8, np.float32)})
    rewrite(tmp_path, **{"model.norm.weight": np.ones(31, np.float32)})
    for scan in (False, True):
        with pytest.raises(ValueError) as error:
            load_model(tmp_path, scan=scan)
        text = str(error.value)
        assert text.startswith("load_model: 3 tensors in ") and f"{stray!r} is not used by the model" in text
        assert "'lm_head.weight' is missing" in text and frequencies not in text
        assert "'model.norm.weight' has shape (31,), the model (32,)" in text


def test_a_tied_head_stored_twice_is_read_once_and_stays_apart_where_it_differs(tmp_path):
    oracle = make("llama tied")
    oracle.save_pretrained(tmp_path)
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, **{"lm_head.weight": table})
    ids, mask = inputs("none")
    expected = run_torch(oracle, ids, mask)
    close(run_jax(load_model(tmp_path), ids), expected, mask)
    rewrite(tmp_path, **{"model.embed_tokens.weight": None})
    close(run_jax(load_model(tmp_path), ids), expected, mask)
    rewrite(tmp_path, **{"lm_head.weight": table, "model.embed_tokens.weight": table[::-1].copy()})
    apart = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    loaded = load_model(tmp_path)
    assert loaded.params["lm_head"]["kernel"].shape == (32, VOCABULARY)
    close(run_jax(loaded, ids), run_torch(apart, ids, mask), mask)


@pytest.mark.parametrize("family", ["llama tied", "gemma3"])
def test_an_untied_head_starts_as_the_table_and_is_saved_apart(family, tmp_path):
    oracle = make(family)
    oracle.save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base", untie=True)
    ids, mask = inputs("left")
    close(run_jax(loaded, ids, mask), run_torch(oracle, ids, mask), mask)
    table = np.asarray(loaded.params["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(loaded.params["lm_head"]["kernel"], table.T)
    shapes = load_model(tmp_path / "base", untie=True, abstract=True).params
    assert shapes["lm_head"]["kernel"].shape == (32, VOCABULARY)

    params = loaded.params | {"lm_head": {"kernel": loaded.params["lm_head"]["kernel"][:, ::-1]}}
    save_model(tmp_path / "apart", loaded.model, params)
    again = type(oracle).from_pretrained(tmp_path / "apart", dtype=torch.float32).eval()
    close(run_jax(replace(loaded, params=params), ids, mask), run_torch(again, ids, mask), mask)
    close(run_jax(load_model(tmp_path / "apart"), ids, mask), run_torch(again, ids, mask), mask)
    # Untying what is untied changes nothing.
    kept = load_model(tmp_path / "apart", untie=True).params["lm_head"]["kernel"]
    np.testing.assert_array_equal(kept, params["lm_head"]["kernel"])


@pytest.mark.parametrize("untie", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("size", [VOCABULARY - 6, VOCABULARY + 8])
def test_a_resized_vocabulary_has_the_shapes_and_logits_of_transformers(untie, size, tmp_path):
    make("llama tied").save_pretrained(tmp_path)
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    mean = oracle.model.embed_tokens.weight.detach().mean(0)
    oracle.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        oracle.model.embed_tokens.weight[VOCABULARY:] = mean
    loaded = load_model(tmp_path, vocab_size=size, untie=untie)
    assert loaded.config.vocab_size == loaded.model.config.vocab_size == size
    ids, mask = inputs("none")
    ids = np.minimum(ids, size - 1)
    ids[:, 0] = size - 1
    close(run_jax(loaded, ids), run_torch(oracle, ids, mask), mask)
    save_model(tmp_path / "resized", loaded.model, loaded.params)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "resized").eval()
    assert again.config.vocab_size == size and again.config.tie_word_embeddings is not untie
    close(run_jax(loaded, ids), run_torch(again, ids, mask), mask)
    with pytest.raises(ValueError, match=r"load_model: vocab_size is 0\."):
        load_model(tmp_path, vocab_size=0)


def test_a_bare_models_tensors_are_found_without_their_prefix(tmp_path):
    oracle = make("llama tied")
    oracle.model.save_pretrained(tmp_path)
    assert "layers.0.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    ids, mask = inputs("none")
    close(run_jax(load_model(tmp_path), ids), run_torch(oracle, ids, mask), mask)


def test_a_tokenizer_may_have_more_tokens_than_the_model_has_rows(tmp_path):
    make("llama").save_pretrained(tmp_path)
    words = {f"word{i}": i for i in range(VOCABULARY + 4)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="word0").save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert len(loaded.tokenizer) == VOCABULARY + 4 and loaded.config.vocab_size == VOCABULARY
    assert load_model(tmp_path, vocab_size=VOCABULARY + 4).params["lm_head"]["kernel"].shape == (32, VOCABULARY + 4)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_attention_in_both_directions_equals_torch(scan, tmp_path):
    oracle = make("gemma3", use_bidirectional_attention=True)
    oracle.save_pretrained(tmp_path / "base")
    loaded = load_model(tmp_path / "base", scan=scan)
    for side in ("none", "left", "right"):
        ids, mask = inputs(side)
        expected = run_torch(oracle, ids, mask)
        close(run_jax(loaded, ids, mask), expected, mask)
        with torch.no_grad():
            hidden = oracle.model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
        states = functools.partial(loaded.model.apply, method="hidden")
        with jax.default_matmul_precision("highest"):
            close(jax.jit(states)({"params": loaded.params}, ids, mask), hidden, mask)
    # The window is stored as it was before transformers halves it.
    save_model(tmp_path / "again", loaded.model, loaded.params)
    again = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    np.testing.assert_allclose(run_torch(again, ids, mask), expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(ValueError, match="a model with attention in both directions has no cache"):
        loaded.model.init_cache(1, 8)


def test_unsupported_attention_is_refused(tmp_path):
    make("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"is_causal": False}))
    with pytest.raises(ValueError, match="is_causal is false"):
        load_model(tmp_path)


def test_remote_code_is_never_run(tmp_path):
    make("llama").save_pretrained(tmp_path)
    file, trace = tmp_path / "config.json", tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config:\n    pass\n")
    config = json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}
    file.write_text(json.dumps(config))
    load_model(tmp_path)
    file.write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match="unknown model_type"):
        load_model(tmp_path)
    assert not trace.exists()


def test_an_abstract_model_needs_no_weights(tmp_path):
    make("gemma2").save_pretrained(tmp_path)
    whole = load_model(tmp_path, scan=True, dtype=jnp.bfloat16)
    (tmp_path / "model.safetensors").unlink()
    bare = load_model(tmp_path, scan=True, dtype=jnp.bfloat16, abstract=True)
    assert bare.model == whole.model
    jax.tree.map(
        lambda leaf, shape: np.testing.assert_equal((leaf.shape, leaf.dtype), (shape.shape, shape.dtype)),
        whole.params,
        bare.params,
    )
    assert {type(leaf) for leaf in jax.tree.leaves(bare.params)} == {jax.ShapeDtypeStruct}
