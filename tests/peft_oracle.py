"""Tiny torch models, adapters that PEFT reads, and comparisons with what jlora computes."""

import copy
import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.tree.paths import flatten, map_with_path

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is the oracle, and is not installed")

# Of PEFT, about itself, about transformers and about heads that are tied to their tables.
WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to"),
    pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:You have requested .ensure_weight_tying"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
]

TOLERANCE = 2e-5
IDS = np.random.default_rng(0).integers(1, 60, (2, 9))
SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 60,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": 3}),
    "bert tokens": ("BertForTokenClassification", "BertConfig", SIZES | {"num_labels": 5}),
    "bert masked": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert bare": ("BertModel", "BertConfig", SIZES),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3 tied": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "mistral tied": ("MistralForCausalLM", "MistralConfig", GROUPED | {"tie_word_embeddings": True}),
    "qwen2 tied": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED | {"tie_word_embeddings": True}),
}
TIED = ("llama tied", "mistral tied", "qwen2 tied", "qwen3 tied", "gemma", "gemma2", "gemma3", "gpt2", "bert masked")
TABLES = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings", "qwen3 tied": "embed_tokens"}


def make(name, folder=None):
    """A torch model with random biases and norms, scaled up until its logits spread."""
    model, config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**values)).eval()
    center = 0.0 if name.startswith("gemma") else 1.0
    with torch.no_grad():
        for path, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(std=1.2 * value.shape[-1] ** -0.5)
            else:
                value.uniform_(-0.2, 0.2).add_(center if "norm" in path.lower() or "ln_" in path else 0)
    if folder is not None:
        model.save_pretrained(folder)
    return model


def run_torch(model, ids=IDS):
    with torch.no_grad():
        out = model(torch.tensor(ids))
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


@functools.lru_cache
def forward(model):
    return jax.jit(model.apply)


def run_jax(model, params):
    """Logits with the adapters merged in: one compile serves every adapter of a model."""
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(model)({"params": jlora.merge(params)}, IDS))


def run_adapted(model, params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(jlora.adapt(model.apply))({"params": params}, IDS))


def opened(base, folder):
    """The folder, as PEFT opens it on a copy of the base."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def fill(params, scale=0.2):
    """Every B random; of a stack each layer with a scaling of its own."""

    def change(path, leaf):
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        if path.endswith("_lora_b"):
            return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)
        if path.endswith("_lora_scaling") and leaf.ndim:
            return leaf * jnp.arange(1, 1 + leaf.size, dtype=leaf.dtype)
        return leaf

    return map_with_path(change, params)


def wrapped(loaded, table=True):
    """Adapters of several ranks and scalings, on the word table too."""
    targets = {
        r".*(q_proj|query|c_fc)/kernel": jlora.Rule(rank=5, alpha=2.5),
        r".*(o_proj|self/value|attn/c_proj)/kernel": jlora.Rule(rank=2, alpha=7**0.5),
        loaded.model.lora_targets: jlora.Rule(rank=3, alpha=4),
    }
    if table:
        targets[r".*(embed_tokens|wte|word_embeddings)/embedding"] = 4
    layout = jlora.infer_layout(lambda params: loaded.model.apply({"params": params}, IDS), loaded.params)
    return fill(jlora.wrap(loaded.params, targets=targets, layout=layout))


def equal(one, other):
    one, other = flatten(one), flatten(other)
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        np.testing.assert_array_equal(leaf, other[path], err_msg=path)


def close(ours, theirs, base=None):
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)
    assert theirs.std() > 0.3
    if base is not None:
        assert np.abs(theirs - base).max() > 0.3


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def rewrite(folder, tensors=dict, **config):
    """Changes a folder: its config, and its tensors by a function of their dict; it has no digests then."""
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | config))
    file = folder / "adapter_model.safetensors"
    save_file(tensors(load_file(file)), file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Torch models with their folders, made once each."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("base")
            made[name] = make(name, folder), folder
        return made[name]

    return get
