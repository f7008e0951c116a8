"""The adapter that a run starts from."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.models.bert import Bert, BertConfig
from jlora.models.decoder import Decoder, DecoderConfig
from jlora.models.gpt2 import Gpt2, Gpt2Config
from jlora.runs.config import Adapter, Config, Data, Model, Output
from jlora.runs.folder import wrap_base
from jlora.tree.paths import flatten

SIZES = {"vocab_size": 32, "hidden_size": 8}
MODELS = {
    "decoder": (Decoder, DecoderConfig(**SIZES, intermediate_size=16, num_layers=3, num_heads=2)),
    "gpt2": (Gpt2, Gpt2Config(**SIZES, num_layers=3, num_heads=2, num_positions=16)),
    "bert": (
        Bert,
        BertConfig(**SIZES, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("targets", [None, ("dense", "q_proj", "c_attn")], ids=["default", "names"])
def test_scanned_and_unrolled_models_start_from_the_same_adapter(name, targets):
    kind, config = MODELS[name]
    job = Config(model=Model(name="m"), data=Data(train="a"), output=Output(folder="b"))
    trees = {}
    for scan in (False, True):
        model = kind(replace(config, scan=scan))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), int))["params"]
        loaded = SimpleNamespace(model=model, params=jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes))
        names = targets and tuple(n for n in targets if any(f"/{n}/" in path for path in flatten(shapes)))
        trees[scan] = flatten(wrap_base(replace(job, adapter=Adapter(rank=2, targets=names)), loaded))
    stacked = {path: leaf for path, leaf in trees[True].items() if path.endswith("_lora_a") and leaf.ndim == 3}
    assert stacked
    for path, leaf in stacked.items():
        for n in range(3):
            single = re.sub("^(layers|h|encoder/layer)/", rf"\1_{n}/", path)
            np.testing.assert_array_equal(leaf[n], trees[False][single])
