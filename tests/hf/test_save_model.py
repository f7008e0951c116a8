"""Merged models written as Hugging Face folders: torch opens them with the adapted logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import jlora
from jlora.hf.load import load_model, save_model
from jlora.models.decoder import Decoder, DecoderConfig

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5
IDS = np.random.default_rng(0).integers(1, 90, (2, 11))
COMMON = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
GPT2 = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON, num_key_value_heads=2)),
    "qwen3 tied": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**COMMON, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
    ),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=16, sliding_window=4)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=4)
    ),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON, num_key_value_heads=2)),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(**COMMON, num_key_value_heads=2, head_dim=16)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**COMMON, num_key_value_heads=2, head_dim=16, sliding_window=4)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "bert classes": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**COMMON, num_labels=3)),
    "bert tokens": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**COMMON, num_labels=5)),
    "bert masked": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**COMMON)),
}


def make(folder, name="llama"):
    """A torch checkpoint, scaled up until its logits spread."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=1.5 * value.shape[-1] ** -0.5) if value.ndim > 1 else value.add_(0.2)
    model.save_pretrained(folder)
    return model


def adapted(loaded, key=1):
    """The model's parameters with adapters that do something."""
    targets, layout = loaded.model.lora_targets, loaded.model.lora_layout
    params = jlora.wrap(loaded.params, rank=4, targets=targets, layout=layout)

    def fill(path, leaf):
        name = path[-1].key
        return 0.2 * jax.random.normal(jax.random.key(key), leaf.shape) if name.endswith("_lora_b") else leaf

    return jax.tree_util.tree_map_with_path(fill, params)


def logits_of(model, params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(jlora.adapt(model.apply))({"params": params}, IDS))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", MODELS)
def test_torch_opens_a_saved_model_with_the_adapted_logits(tmp_path, name, scan):
    base = make(tmp_path / "base", name)
    loaded = load_model(tmp_path / "base", scan=scan)
    params = adapted(loaded)
    save_model(tmp_path / "merged", loaded.model, params, max_shard_size="20KB" if scan else "5GB")
    assert (len(list((tmp_path / "merged").glob("*.safetensors"))) > 1) == scan
    merged = type(base).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert type(merged).__name__ in merged.config.architectures
    with torch.no_grad():
        before, after = (model(torch.tensor(IDS)).logits.numpy() for model in (base, merged))
    logits = logits_of(loaded.model, params)
    assert np.abs(after - before).max() > 0.1 and after.std() > 0.3
    np.testing.assert_allclose(logits, after, atol=TOLERANCE * max(1, np.abs(after).max() / 4), rtol=0)
    assert load_model(tmp_path / "merged").model.config == load_model(tmp_path / "base").model.config


def test_a_base_saved_again_is_the_same_to_the_bit(tmp_path):
    make(tmp_path / "base")
    loaded = load_model(tmp_path / "base", dtype=jnp.bfloat16, scan=True)
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    loaded = load_model(tmp_path / "base", dtype=jnp.bfloat16, scan=True)
    save_model(tmp_path / "again", loaded.model, loaded.params)
    again = load_model(tmp_path / "again", dtype=jnp.bfloat16, scan=True)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, again.params)
    with safe_open(tmp_path / "again" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == {"eos_token_id": [7, 9]}


def test_a_smaller_model_saved_over_a_sharded_one_leaves_no_stale_shard(tmp_path):
    make(tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save_model(tmp_path / "out", loaded.model, loaded.params, max_shard_size="20KB")
    save_model(tmp_path / "out", loaded.model, loaded.params)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names - {"generation_config.json"} == {"config.json", "model.safetensors", "notes.txt"}
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "out").params, loaded.params)


def test_what_can_not_become_a_checkpoint_is_listed_and_nothing_is_written(tmp_path):
    make(tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    params = dict(loaded.params)
    params["extra"] = {"kernel": jnp.zeros((2, 2))}
    params["norm"] = {"scale": jnp.zeros(3)}
    del params["lm_head"]
    with pytest.raises(ValueError) as error:
        save_model(tmp_path / "out", loaded.model, params)
    text = str(error.value)
    assert text.startswith("save_model: this can't become a checkpoint.\n")
    assert "'lm_head/kernel' is missing" in text and "'extra/kernel' is not the model's" in text
    assert "'norm/scale' has shape (3,), the model (32,)" in text
    assert not (tmp_path / "out").exists()

    with pytest.raises(ValueError, match="is the folder that the base was loaded from"):
        save_model(tmp_path / "base", loaded.model, loaded.params)
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2}
    by_hand = Decoder(DecoderConfig(**sizes))
    with pytest.raises(ValueError, match=r"the model was made by hand, so there is no config\.json for it"):
        save_model(tmp_path / "out", by_hand, by_hand.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    make(tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    save_model(tmp_path / "out", loaded.model, loaded.params)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    class FullDisk:
        def save_pretrained(self, folder):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "out", loaded.model, jax.tree.map(jnp.zeros_like, loaded.params), FullDisk())
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_parameters_go_where_the_sharding_says(tmp_path):
    make(tmp_path / "base")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return device

    loaded = load_model(tmp_path / "base", sharding=place, scan=True)
    assert asked["layers/mlp/up_proj/kernel"] == (2, 32, 48)
    assert {leaf.sharding for leaf in jax.tree.leaves(loaded.params)} == {device}
