"""PEFT folders as people have them: what was trained in full, other spellings, damage, and folders of other formats."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_peft
from safetensors.numpy import load_file
from test_peft import close, config_of, equal, fill, make, opened, run_jax, run_torch

import jlora
from jlora.cli.main import main
from jlora.core.paths import map_with_path
from jlora.interop.huggingface import load_model
from jlora.interop.peft import load_peft, save_peft

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
peft = pytest.importorskip("peft", reason="peft is the oracle, and is not installed")

pytestmark = test_peft.pytestmark
bases = test_peft.bases


def train(model):
    """Moves everything that PEFT trains away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "lora_" in path:
                value.normal_(std=0.15)
            elif value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    return model


def adapt_torch(base, **config):
    """A trained adapter of PEFT on a copy of the base."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False} | config)
    return train(peft.get_peft_model(copy.deepcopy(base), config)).eval()


FULL = {
    "modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]}, {}),
    "adapted biases": ("bert", {"target_modules": ["query"], "bias": "lora_only", "task_type": "SEQ_CLS"}, {}),
    "all biases": ("bert tokens", {"target_modules": ["query"], "bias": "all", "task_type": "TOKEN_CLS"}, {}),
    "some biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True}, {}),
}


@pytest.mark.parametrize("case", FULL)
def test_what_was_loaded_as_trained_in_full_is_written_back(case, bases, tmp_path):
    name, config, options = FULL[case]
    base, folder = bases(name)
    model = adapt_torch(base, **config)
    model.save_pretrained(tmp_path / "theirs", **options)
    theirs = run_torch(model)
    loaded = load_model(folder, scan=case != "modules")
    params = load_peft(tmp_path / "theirs", loaded.model, loaded.params)
    close(run_jax(loaded.model, params), theirs, run_torch(base))
    save_peft(tmp_path / "ours", loaded.model, params)
    np.testing.assert_allclose(run_torch(opened(base, tmp_path / "ours")), theirs, atol=test_peft.TOLERANCE)
    first, again = (config_of(tmp_path / side) for side in ("theirs", "ours"))
    assert again["bias"] == first["bias"]
    if case == "modules":
        assert again["modules_to_save"] == ["lm_head", "model.norm"]
    equal(load_peft(tmp_path / "ours", loaded.model, loaded.params), params)


def test_an_embedding_that_is_adapted_and_trained_is_written_as_pefts_base_layer(bases, tmp_path):
    base, folder = bases("llama")
    model = adapt_torch(base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    with torch.no_grad():
        for module in ("model.embed_tokens", "lm_head"):
            weight = model.base_model.model.get_submodule(module).base_layer.weight
            weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    loaded = load_model(folder)
    params = load_peft(tmp_path / "theirs", loaded.model, loaded.params)
    save_peft(tmp_path / "ours", loaded.model, params)
    theirs = run_torch(model)
    close(run_torch(opened(base, tmp_path / "ours")), theirs, run_torch(base))
    first, again = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert first.keys() == again.keys() and all(np.array_equal(first[key], again[key]) for key in first)


def test_an_adapted_embeddings_unchanged_copy_is_not_trained_in_full(bases, tmp_path, capsys):
    base, folder = bases("llama")
    model = adapt_torch(base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    assert any("base_layer" in key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    loaded = load_model(folder)
    params = load_peft(tmp_path / "theirs", loaded.model, loaded.params)
    assert params["lm_head"]["kernel"] is loaded.params["lm_head"]["kernel"]
    assert main(["inspect", str(tmp_path / "theirs"), "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["whole"] == []
    assert main(["export", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]) == 0
    assert config_of(tmp_path / "ours")["modules_to_save"] is None
    close(run_torch(opened(base, tmp_path / "ours")), run_torch(model), run_torch(base))


def test_a_leaf_that_differs_from_the_base_is_saved_or_named(bases, tmp_path):
    base, folder = bases("llama")
    loaded = load_model(folder, scan=True)
    params = fill(jlora.wrap(loaded.params, rank=2, targets=["q_proj"], layout=loaded.model.lora_layout))
    moved = map_with_path(lambda path, leaf: leaf + 0.2 if path == "norm/scale" else leaf, params)
    save_peft(tmp_path / "found", loaded.model, moved)
    assert config_of(tmp_path / "found")["modules_to_save"] == ["model.norm"]
    close(run_torch(opened(base, tmp_path / "found")), run_jax(loaded.model, moved), run_torch(base))
    for choice in ({"train": ()}, {"train": ["lm_head"]}, {"train": (), "base": loaded.params}):
        with pytest.raises(ValueError, match=r"\n  'norm/scale' differs from the base, and is not in train=\nFix: "):
            save_peft(tmp_path / "out", loaded.model, moved, **choice)
    assert not (tmp_path / "out").exists()
    # A base that was changed on purpose is passed.
    save_peft(tmp_path / "passed", loaded.model, moved, base=jlora.unwrap(moved), base_model="owner/changed")
    assert config_of(tmp_path / "passed")["modules_to_save"] is None
    # A tree that was rounded and widened again is still the base.
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    save_peft(tmp_path / "rounded", loaded.model, rounded)
    assert config_of(tmp_path / "rounded")["modules_to_save"] is None


def test_a_base_that_is_gone_is_named_unless_train_says_all(tmp_path):
    make("llama", tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    params = fill(jlora.wrap(loaded.params, rank=2, targets=["q_proj"]))
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"so the leaves trained in full can't be found\.\n.*\nFix: pass base="):
        save_peft(tmp_path / "out", loaded.model, params)
    assert not (tmp_path / "out").exists()
    save_peft(tmp_path / "out", loaded.model, params, train=())
    save_peft(tmp_path / "out", loaded.model, params, base=loaded.params)
    equal(load_peft(tmp_path / "out", loaded.model, loaded.params), params)
