"""The small files of a model's folder: whatever is wrong with one is one error that names the file and the field."""

import json
import os
from pathlib import Path

import pytest
import tiny_job
from bert_folders import equal, message, shard, tensors, write, write_pooling
from safetensors.numpy import load_file

from jlora.hf.folder import find_inside
from jlora.hf.load import INDEX, load_model

VALUES = (None, "x", -1, 0, 1.5, [], {}, True, [1], {"a": 1})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    made = {"llama": tiny_job.make_llama(folder / "llama"), "bert": tiny_job.make_model(folder / "bert")}
    # The tokenizer has a test file of its own, and takes time.
    for model in made.values():
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (model / name).unlink(missing_ok=True)
    return made


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_field_of_a_wrong_type_or_size_is_an_error_that_names_it_or_is_harmless(models, kind):
    file = models[kind] / "config.json"
    before = file.read_text()
    content = json.loads(before)
    fields = [*content, "dtype", "id2label", "label2id", "rope_parameters", "rope_scaling", "head_dim", "hidden_act"]
    named = 0
    try:
        for field in dict.fromkeys(fields):
            for value in VALUES:
                file.write_text(json.dumps(content | {field: value}))
                try:
                    load_model(file.parent, abstract=True)
                except ValueError as error:
                    assert "\nFix: " in str(error), (field, value, error)
                    named += field in str(error)
    finally:
        file.write_text(before)
    assert named > 100


@pytest.mark.parametrize(
    "field, value",
    [("hidden_size", "32"), ("num_attention_heads", 0), ("num_hidden_layers", 10**9), ("hidden_dropout_prob", "none")],
)
def test_the_error_of_a_field_names_file_field_and_value(models, tmp_path, field, value):
    content = json.loads((models["bert"] / "config.json").read_text()) | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    lines = message(tmp_path, abstract=True).splitlines()
    assert lines[0] == f"load_model: 1 field of {str(tmp_path / 'config.json')!r} can't be used."
    assert lines[1].startswith(f"  {field} is {value!r}") and lines[2].startswith("Fix: correct what is listed")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "modules.json", INDEX])
@pytest.mark.parametrize("content", [b"\xff\xfe{}", b"{", b"", b"3", b"[" * 100_000])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name, content):
    shard(write(tmp_path, tensors()))
    (tmp_path / name).write_bytes(content)
    text = message(tmp_path, num_labels=3)
    assert text.startswith(f"load_model: {str(tmp_path / name)!r} is no JSON ") and "\nFix: " in text


@pytest.mark.parametrize("tokens", ["</s>", 1.5, [2, "x"], {"a": 1}, True])
def test_stop_tokens_that_are_none_are_an_error(tmp_path, tokens):
    write(tmp_path, tensors())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))
    assert f"eos_token_id is {tokens!r}  expected: a token id, or a list of them" in message(tmp_path)


@pytest.mark.parametrize(
    "modules", [[3], [{"type": 3, "path": ""}], [{"type": "a.Pooling"}], [{"type": "a.Pooling", "path": ".."}]]
)
def test_modules_without_a_type_or_a_path_inside_are_an_error(tmp_path, modules):
    write_pooling(write(tmp_path, tensors(None), architecture="BertModel"), {"pooling_mode_mean_tokens": True})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    text = message(tmp_path, num_labels=2)
    assert f"1 field of {str(tmp_path / 'modules.json')!r} can't be used" in text and "module 0 is" in text


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"bert.pooler.dense.bias": 3}])
def test_an_index_without_names_of_files_is_an_error(tmp_path, weight_map):
    shard(write(tmp_path, tensors()))
    (tmp_path / INDEX).write_text(json.dumps({} if weight_map is None else {"weight_map": weight_map}))
    text = message(tmp_path)
    assert f"1 field of {str(tmp_path / INDEX)!r} can't be used" in text and "weight_map" in text


def test_an_index_names_no_file_outside_its_folder(tmp_path):
    stored = tensors()
    outside = write(tmp_path / "outside", stored)
    folder = write(tmp_path / "model", stored)
    name = shard(folder)[0]
    index = json.loads((folder / INDEX).read_text())
    own = index["weight_map"][name]
    (folder / "link.safetensors").symlink_to(outside / "model.safetensors")
    (folder / "links").symlink_to(outside)
    places = [str(outside / "model.safetensors"), "../outside/model.safetensors", f"a/../{own}", "link.safetensors"]
    for place in [*places, "links/model.safetensors", "a\0b"]:
        index["weight_map"][name] = place
        (folder / INDEX).write_text(json.dumps(index))
        (line,) = message(folder).splitlines()[1:-1]
        assert line.startswith(f"  weight_map: {name} is ") and line.endswith("  expected: a file inside the folder")
    # A link to another file of the folder stays inside.
    (folder / "same.safetensors").symlink_to(own)
    index["weight_map"][name] = own
    index["weight_map"] = {
        tensor: "same.safetensors" if file == own else file for tensor, file in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))
    equal(load_model(folder).params, stored)


def test_links_of_the_hubs_cache_are_inside(tmp_path):
    stored = tensors()
    source = write(tmp_path / "source", stored)
    shard(source)
    cache = tmp_path / "models--owner--model"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for n, file in enumerate(sorted(source.iterdir())):
        os.replace(file, cache / "blobs" / str(n))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(n))
    equal(load_model(snapshot).params, stored)
    (tmp_path / "short").symlink_to(snapshot)
    equal(load_model(tmp_path / "short").params, stored)
    assert find_inside(snapshot, "../../blobs/0") is None
    assert sum(len(load_file(file)) for file in snapshot.glob("*.safetensors")) == len(stored)
