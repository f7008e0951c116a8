"""Tiny random BERT checkpoints as Hugging Face folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from jlora.hf.families import FAMILIES, weights
from jlora.hf.load import load_model
from jlora.models.bert import Bert, BertConfig

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
LABELS = ("lost card", "late parcel", "refund")


def tensors(head="classification", seed=0):
    """A checkpoint's tensors under today's names, with random values."""
    rng = np.random.default_rng(seed)
    model = Bert(BertConfig(**SIZES), head=head, num_labels=len(LABELS))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    table = weights(FAMILIES["bert"], params)
    return {w.tensors[0]: rng.normal(size=w.tensor_shape).astype(np.float32) for w in table}


def write(folder, stored, *, architecture="BertForSequenceClassification", labels=LABELS, **changes):
    folder.mkdir(exist_ok=True)
    config = {"model_type": "bert", "architectures": [architecture], "type_vocab_size": 2, **SIZES}
    config["id2label"] = {str(i): label for i, label in enumerate(labels)}
    config["label2id"] = {label: i for i, label in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder):
    """Two shards and their index in the place of a single file."""
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(stored), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return names


def message(folder, **options):
    with pytest.raises(ValueError) as error:
        load_model(folder, **options)
    return str(error.value)


def equal(params, stored):
    """Every parameter is its tensor, in the other layout where it is a kernel."""
    for weight in weights(FAMILIES["bert"], params):
        array = np.asarray(flatten_dict(params, sep="/")[weight.path])
        np.testing.assert_array_equal(array.T if weight.transpose else array, stored[weight.tensors[0]])


def write_pooling(folder, values):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16} | values))
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
