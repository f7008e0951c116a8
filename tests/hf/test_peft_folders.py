"""PEFT folders as people have them: what was trained in full, other spellings, damage, and folders of other formats."""

import copy
import json
import re
import shutil
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import loopback_hub
import numpy as np
import peft_oracle
import pytest
import tiny_job
from peft_oracle import TOLERANCE, close, config_of, equal, fill, make, opened, peft, rewrite, run_jax, run_torch, torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import jlora
from jlora.cli.generate import load_adapter
from jlora.cli.main import main
from jlora.hf.load import load_model
from jlora.hf.peft import load_peft, read_config, read_tensors, save_peft
from jlora.tree.paths import flatten, map_with_path

pytestmark = peft_oracle.WARNINGS
bases = peft_oracle.bases


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
    np.testing.assert_allclose(run_torch(opened(base, tmp_path / "ours")), theirs, atol=TOLERANCE)
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
    compared = json.loads(capsys.readouterr().out)
    assert compared["whole"] == []
    # Without the base nobody can tell a copy from what was trained.
    assert main(["inspect", str(tmp_path / "theirs"), "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {leaf["path"]: leaf["trained"] for leaf in alone["whole"]} == {
        "model.embed_tokens.weight": None,
        "lm_head.weight": None,
    }
    assert alone["parameters"] == compared["parameters"]
    assert main(["inspect", str(tmp_path / "theirs")]) == 0
    shown = capsys.readouterr().out
    assert " full " not in shown and shown.count("copy?") == 3 and "--model" in shown
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


SPELLINGS = {
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "sharded": lambda key: re.sub(r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module.", key),
    "in parallel": lambda key: f"module.{key}",
    "in parallel inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "of a larger model": lambda key: key.replace("model.model.", "model.model.language_model."),
    "of an older larger model": lambda key: key.replace("base_model.model.", "base_model.model.language_model."),
    "without the prefix": lambda key: key.removeprefix("base_model.model."),
    "named modules_to_save": lambda key: re.sub(r"(norm|lm_head)\.weight", r"\1.modules_to_save.default.weight", key),
    "modules_to_save": lambda key: re.sub(r"(norm|lm_head)\.weight", r"\1.modules_to_save.weight", key),
}


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    """A Llama, an adapter for it with leaves trained in full, and its folder."""
    _, folder = bases("llama")
    loaded, out = load_model(folder), tmp_path_factory.mktemp("saved")
    params = fill(jlora.wrap(loaded.params, rank=2, targets=["q_proj", "down_proj", "embed_tokens"]))
    moved = lambda path, leaf: leaf + 0.2 if path in ("norm/scale", "lm_head/kernel") else leaf
    params = map_with_path(moved, params)
    save_peft(out, loaded.model, params)
    return loaded, params, out


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(saved[2], tmp_path / "adapter")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_of_wrapped_models_and_modules_are_read(spelling, saved, folder):
    loaded, params, _ = saved
    spelled = lambda tensors: {SPELLINGS[spelling](key): value for key, value in tensors.items()}
    rewrite(folder, spelled)
    equal(load_peft(folder, loaded.model, loaded.params), params)


def test_pefts_copies_of_the_base_and_repeated_values_are_left_out(saved, folder):
    loaded, params, _ = saved
    key = "base_model.model.lm_head"

    def more(tensors):
        value = tensors[f"{key}.weight"]
        return tensors | {f"{key}.original_module.weight": value * 2, f"{key}.modules_to_save.default.weight": value}

    rewrite(folder, more)
    equal(load_peft(folder, loaded.model, loaded.params), params)
    rewrite(folder, lambda tensors: tensors | {f"{key}.modules_to_save.weight": tensors[f"{key}.weight"] * 2})
    with pytest.raises(ValueError, match=r"lm_head[.\w]+' is there twice, under another spelling too"):
        load_peft(folder, loaded.model, loaded.params)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2], ids=["e4m3", "e5m2"])
def test_adapters_of_8_bits_are_read_as_float32(dtype, saved, folder):
    loaded, params, _ = saved
    rewrite(folder, lambda tensors: {key: value.astype(dtype) for key, value in tensors.items()})
    again = load_peft(folder, loaded.model, loaded.params)
    rounded = lambda path, leaf: leaf.astype(dtype).astype(leaf.dtype)
    expected, found = (flatten(tree) for tree in (map_with_path(rounded, params), again))
    for path in ("layers_0/self_attn/q_proj/kernel_lora_a", "norm/scale", "embed_tokens/embedding_lora_b"):
        np.testing.assert_array_equal(found[path], expected[path])
        assert found[path].dtype == jnp.float32


IDS_WITH_ROWS = np.array([[3, 7, 50, 5, 59, 0, 4, 6, 1]])
ROWS = {
    "llama": ("llama", [3, 7, 50]),
    "by name": ("llama", {"embed_tokens": [3, 7], "lm_head": [5]}),
    "qwen3 tied": ("qwen3 tied", [3, 7, 50]),
    "tied by name": ("qwen3 tied", {"embed_tokens": [3, 7], "lm_head": [3, 7]}),
    "gpt2": ("gpt2", [59, 0]),
    "gemma": ("gemma", [3, 50]),
    "bert": ("bert", {"word_embeddings": [4, 5, 6]}),
}


@pytest.mark.parametrize("case", ROWS)
def test_trainable_token_indices_replace_rows_as_in_peft(case, bases, tmp_path):
    name, indices = ROWS[case]
    base, folder = bases(name)
    targets = {"gpt2": ["c_attn"], "bert": ["query"]}.get(name, ["q_proj"])
    model = adapt_torch(base, target_modules=targets, trainable_token_indices=indices, fan_in_fan_out=name == "gpt2")
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "trainable_tokens_delta" in path:
                value.add_(torch.randn_like(value))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=case == "llama")
    loaded = load_model(folder)
    params = load_peft(tmp_path / "theirs", loaded.model, loaded.params)
    theirs = run_torch(model, IDS_WITH_ROWS)
    ours = jax.jit(loaded.model.apply)({"params": jlora.merge(params)}, IDS_WITH_ROWS)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert np.abs(theirs - run_torch(base, IDS_WITH_ROWS)).max() > (0.03 if name == "bert" else 0.3)
    save_peft(tmp_path / "ours", loaded.model, params)
    equal(load_peft(tmp_path / "ours", loaded.model, loaded.params), params)
    if "lm_head" not in indices:
        np.testing.assert_allclose(run_torch(opened(base, tmp_path / "ours"), IDS_WITH_ROWS), theirs, atol=5e-5)


def test_rows_that_can_not_be_placed_are_named(saved, folder):
    loaded, _, _ = saved
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.zeros((2, 32), np.float32)}
    rewrite(folder, trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match="are given, but the file has no trainable_tokens_delta"):
        load_peft(folder, loaded.model, loaded.params)
    for indices in ([1, 60], [1, 2, 3]):
        rewrite(folder, lambda tensors: tensors | rows, trainable_token_indices=indices)
        with pytest.raises(ValueError, match=r"'model.embed_tokens' has trainable_tokens_delta \(2, 32\) for"):
            load_peft(folder, loaded.model, loaded.params)
    rewrite(folder, trainable_token_indices=[1, -2])
    with pytest.raises(ValueError, match=r"trainable_token_indices = \[1, -2\], not lists of token ids"):
        load_peft(folder, loaded.model, loaded.params)


def test_rows_of_a_head_whose_bias_peft_leaves_out_are_refused(bases, tmp_path):
    base, folder = bases("bert masked")
    model = adapt_torch(base, target_modules=["query"], trainable_token_indices={"word_embeddings": [3, 7]})
    model.save_pretrained(tmp_path)
    without, loaded = copy.deepcopy(base), load_model(folder)
    with torch.no_grad():
        without.cls.predictions.decoder.bias.zero_()
    untrained = peft.LoraConfig(target_modules=["query"], trainable_token_indices={"word_embeddings": [3, 7]})
    theirs = run_torch(peft.get_peft_model(copy.deepcopy(base), untrained))
    np.testing.assert_allclose(theirs, run_torch(without), atol=1e-5)
    with pytest.raises(ValueError, match=r"'cls.predictions.decoder' has a bias, which PEFT leaves out where"):
        load_peft(tmp_path, loaded.model, loaded.params)


def test_an_adapter_of_a_resized_base_names_the_option_that_loads_it(bases, tmp_path):
    base, folder = bases("llama")
    grown = copy.deepcopy(base)
    grown.resize_token_embeddings(64)
    model = adapt_torch(grown, target_modules=["q_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = load_model(folder)
    with pytest.raises(ValueError) as error:
        load_peft(tmp_path, loaded.model, loaded.params)
    text = str(error.value)
    assert "'model.embed_tokens.weight' has shape (64, 32), the model (60, 32)" in text
    assert text.endswith(
        "\nFix: load the base with as many tokens as the adapter's had: load_model(..., vocab_size=64), or with "
        "--vocab-size 64 on the command line (jlora train: --model.vocab-size 64)."
    )
    loaded = load_model(folder, vocab_size=64)
    params = load_peft(tmp_path, loaded.model, loaded.params)
    close(run_jax(loaded.model, params), run_torch(model), run_torch(grown))


def test_a_flipped_byte_in_either_file_is_one_error(saved, folder, capsys):
    loaded, params, _ = saved
    with safe_open(folder / "adapter_model.safetensors", framework="np") as file:
        assert file.metadata().keys() == {"format", "jlora_tensors_sha256", "jlora_config_sha256"}
    config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    detected = harmless = 0
    for file in (config, tensors):
        whole = file.read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        rng = np.random.default_rng(0)
        places = range(len(whole)) if file == config else [*range(0, header, 7), *rng.integers(header, len(whole), 20)]
        for place in places:
            spoilt = bytearray(whole)
            spoilt[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(spoilt)
            try:
                found = read_all(folder)
            except ValueError as error:
                assert str(error).startswith("load_peft: ") and "\nFix: " in str(error), (file.name, place)
                detected += 1
            else:
                assert found == read_all(saved[2]), (file.name, place)
                harmless += 1
        file.write_bytes(whole)
    with capsys.disabled():
        print(f"\nPEFT folder, flipped: {detected} detected, {harmless} harmless, 0 unseen")
    assert harmless == 0
    equal(load_peft(folder, loaded.model, loaded.params), params)
    config.write_text(json.dumps(config_of(folder), indent=None, sort_keys=True))
    equal(load_peft(folder, loaded.model, loaded.params), params)
    config.write_text(json.dumps(config_of(folder) | {"lora_alpha": 99}))
    with pytest.raises(ValueError, match=r"adapter_config.json' was changed after jlora wrote it\.\nFix: fetch"):
        load_peft(folder, loaded.model, loaded.params)
    # What the fix says works.
    save_file(load_file(tensors), tensors, metadata={"format": "pt"})
    load_peft(folder, loaded.model, loaded.params)


def read_all(folder):
    """What load_peft reads, before it is put on a base."""
    config = read_config(folder)
    return config, {name: value.tobytes() for name, value in read_tensors(folder).items()}


# Python's own `re` needs years for it.
SLOW = r"(?:.|..|...)+(?<=!)"


def spoil(file, damage):
    """Damages a file: cuts it, empties it, deletes it, or flips one bit of the byte at a fraction of it."""
    whole = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    elif damage in ("cut", "emptied"):
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    else:
        place = int(damage * (len(whole) - 1))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_the_commands_name_every_damage_without_a_traceback(name, saved, folder, tmp_path, capsys):
    whole, outcomes = (saved[2] / name).read_bytes(), []
    for damage in ("cut", "emptied", "deleted", 0, 0.001, 0.01, 0.1, 0.3, 0.7, 0.9, 1):
        (folder / name).write_bytes(whole)
        spoil(folder / name, damage)
        for command in (["inspect", str(folder)], ["merge", str(folder), "--out", str(tmp_path / "out")]):
            assert main(command) == 2, (damage, command)
            shown = capsys.readouterr().err
            assert "\nFix: " in shown and "Traceback" not in shown, (damage, command)
            outcomes.append(damage)
    with capsys.disabled():
        print(f"\nPEFT folder, {name}: {len(outcomes)} detected, 0 harmless, 0 unseen")
    assert len(outcomes) == 22 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {SLOW: 2}),
        ("alpha_pattern", {r"(x{900}){900}": 2}),
        ("target_modules", SLOW),
        ("exclude_modules", SLOW),
        ("rank_pattern", {"(": 2}),
        ("target_modules", "a" * 300_000),
    ],
)
def test_a_pattern_that_is_slow_or_wrong_is_an_error_and_no_hang(field, value, saved, folder, monkeypatch):
    loaded, _, _ = saved
    monkeypatch.setattr("jlora.hf.patterns.SECONDS", 0.3)
    rewrite(folder, **{field: value})
    start = time.process_time()
    with pytest.raises(ValueError, match=rf"load_peft: .*{field}.* has a pattern that (takes too long|is no regular)"):
        load_peft(folder, loaded.model, loaded.params)
    assert time.process_time() - start < 10
    rewrite(folder, **{"rank_pattern": {r"((\w|[a-z_.])+)+0": 7}, "target_modules": r".*\.(\w+|\w+)*proj|embed_tokens"})
    rewrite(folder, target_modules=["q_proj", "down_proj", "embed_tokens"], exclude_modules=None, alpha_pattern={})
    load_peft(folder, loaded.model, loaded.params)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"r": 0}, "r = 0, not a number above 0"),
        ({"r": True}, "r = true, not a number"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern = .*, not numbers above 0 by pattern"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern = .*, not numbers above 0 by pattern"),
        ({"target_modules": 3}, "target_modules = 3, not a pattern or a list of names"),
        ({"modules_to_save": "lm_head"}, 'modules_to_save = "lm_head", not a list of names'),
        ({"layers_to_transform": "1"}, 'layers_to_transform = "1", not numbers of layers'),
        (
            {"init_lora_weights": "OLoRA"},
            r"'OLoRA', which changed the base: .*path_initial_model_for_weight_conversion",
        ),
        ({"init_lora_weights": "loftq"}, r"'loftq', which changed the base: merge it in PEFT"),
    ],
)
def test_fields_of_another_kind_are_named(config, reason, saved, folder):
    loaded, _, _ = saved
    rewrite(folder, **config)
    with pytest.raises(ValueError, match=reason):
        load_peft(folder, loaded.model, loaded.params)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_is_read_after_the_conversion_that_the_error_names(bases, tmp_path):
    base, folder = bases("llama")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    train(model).save_pretrained(tmp_path / "own")
    loaded = load_model(folder)
    with pytest.raises(ValueError, match=r"save_pretrained\(\.\.\., path_initial_model_for_weight_conversion=FOLDER\)"):
        load_peft(tmp_path / "own", loaded.model, loaded.params)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    params = load_peft(tmp_path / "plain", loaded.model, loaded.params)
    close(run_jax(loaded.model, params), run_torch(model.eval()), run_torch(base))


def test_a_pair_of_two_ranks_is_named_without_its_base(folder, capsys):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    rewrite(folder, lambda tensors: tensors | {key: np.zeros((32, 4), np.float32)})
    assert main(["inspect", str(folder)]) == 2
    assert "q_proj' has A (2, 32) and B (32, 4), which are not of one rank" in capsys.readouterr().err


def lay(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


OTHERS = {
    "hub": ((), "owner/name", r"'owner/name' is not a local folder\.\nFix: .*snapshot_download\('owner/name'\)"),
    "missing": ((), "./no/such/folder", r"'no/such/folder' does not exist"),
    "mlx": (("adapters.safetensors", "adapter_config.json"), "", r"holds an adapter of mlx-lm\.\nFix: fuse it"),
    "model": (("config.json", "model.safetensors"), "", r"holds a whole model, not an adapter\.\nFix: .*load_model"),
    "gguf": (("lora.gguf",), "", r"holds a GGUF file, the format of llama.cpp\.\nFix: pass the PEFT folder"),
    "gguf file": (("lora.gguf",), "lora.gguf", r"holds a GGUF file, the format of llama.cpp\."),
    "own": (("adapter.json",), "", r"holds an adapter of jlora.save_adapter\.\nFix: .*restore_adapter"),
    "run": (("adapter/adapter.json",), "", r"holds a run of `jlora train`\.\nFix: .*jlora export"),
    "file": (("adapter_model.safetensors",), "adapter_model.safetensors", r"is a file, not a folder\.\nFix: pass its"),
    "pickle": (
        ("adapter_config.json", "adapter_model.bin"),
        "",
        r"has no adapter_model.safetensors\.\n  adapter_model.bin .*\nFix: convert it where you trust it",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_folders_of_other_formats_get_their_own_advice(case, saved, tmp_path, monkeypatch):
    files, name, message = OTHERS[case]
    lay(tmp_path, *files)
    if case == "pickle":
        shutil.copy(saved[2] / "adapter_config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_peft(name or tmp_path, saved[0].model, saved[0].params)


@pytest.mark.parametrize("command", ["merge", "inspect", "generate"])
def test_the_commands_give_the_advice_too(command, saved, tmp_path, capsys):
    lay(tmp_path, "adapters.safetensors", "adapter_config.json")
    options = {"merge": ["--out", str(tmp_path / "out")], "inspect": []}
    for name, words in ((str(tmp_path), "holds an adapter of mlx-lm."), ("owner/name", "snapshot_download")):
        if command != "generate":
            assert main([command, name, *options[command]]) == 2
            shown = capsys.readouterr().err
            assert words in shown and "\nFix: " in shown and "Traceback" not in shown
        else:
            with pytest.raises(ValueError, match=words):
                load_adapter(Path(name), saved[0])


REVISIONS = """
import json, sys
from pathlib import Path
from jlora.hf.peft import save_peft
from jlora.runs.config import parse
from jlora.runs.inspection import load_adapted
from jlora.runs.folder import load_base
adapted = load_adapted(Path(sys.argv[1]))
save_peft(sys.argv[2], adapted.loaded.model, adapted.params)
print(json.loads((Path(sys.argv[2]) / "adapter_config.json").read_text())["revision"])
model, data = {"name": "owner/model", "revision": "v3"}, {"task": "causal_lm", "train": "x.txt", "max_length": 32}
values = {"model": model, "data": data, "output": {"folder": "run"}}
config = parse(values, source="job", folder=Path(sys.argv[2]))
print(load_base(config, ()).model.origin.revision)
"""


def test_the_revision_in_a_config_is_asked_of_the_hub(tmp_path):
    served = tiny_job.make_llama(tmp_path / "served")
    loaded = load_model(served)
    save_peft(tmp_path / "adapter", loaded.model, fill(jlora.wrap(loaded.params, rank=2, targets=["q_proj"])))
    rewrite(tmp_path / "adapter", base_model_name_or_path="owner/model", revision="v2")
    handler = type("Served", (loopback_hub.Hub,), {"folder": served, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "JAX_PLATFORMS": "cpu",
    }
    try:
        found = loopback_hub.run_python(REVISIONS, tmp_path / "adapter", tmp_path / "again", **environment)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert found.returncode == 0, found.stderr
    assert found.stdout == "v2\nv3\n"
    revisions = {path.split("/revision/")[1] for path in handler.asked if "/revision/" in path}
    assert revisions == {"v2", "v3"}
