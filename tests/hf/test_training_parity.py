"""Ten steps of jlora and ten of PEFT on torch, from the same adapter over the same data, end at the same adapter."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jlora
from jlora.hf.load import load_model
from jlora.hf.peft import load_peft, save_peft

torch = pytest.importorskip("torch", reason="torch is the oracle, and is not installed")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is the oracle, and is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

STEPS, ROWS, TIME, VOCABULARY, CLASSES = 10, 4, 9, 60, 3
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES | {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"bos_token_id": 0, "eos_token_id": 0}),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES | {"num_labels": CLASSES}),
}
ADAPTERS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2}},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True},
    "bert": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
}
# Torch adds eps to the root of the second moment and shrinks parameters by lr * weight_decay, as optax does.
ADAMW = {"weight_decay": 0.1, "eps": 1e-8}
OPTIMIZERS = {
    "sgd": (functools.partial(torch.optim.SGD, lr=0.05), optax.sgd(0.05)),
    "adamw": (
        functools.partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.98), **ADAMW),
        optax.adamw(3e-3, b1=0.9, b2=0.98, **ADAMW),
    ),
}


def batches(name):
    """Ids padded on the right, their mask, and labels: a class, or the ids themselves with -100 for padding."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for _ in range(STEPS):
        ids = rng.integers(1, VOCABULARY, (ROWS, TIME))
        mask = (np.arange(TIME) < rng.integers(4, TIME + 1, (ROWS, 1))).astype(np.int64)
        labels = rng.integers(0, CLASSES, ROWS) if name == "bert" else np.where(mask == 1, ids, -100)
        yield {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="module", params=MODELS)
def start(request, tmp_path_factory):
    """A base's folder, and one with an adapter for it in which no B is zero."""
    kind, config, values = MODELS[request.param]
    folder, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    torch.manual_seed(0)
    base = getattr(transformers, kind)(getattr(transformers, config)(**values)).eval()
    with torch.no_grad():
        for value in base.parameters():
            if value.ndim > 1:
                value.normal_(std=value.shape[-1] ** -0.5)
    base.save_pretrained(folder)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **ADAPTERS[request.param])
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "lora_B" in path:
                value.normal_(std=0.1)
    model.save_pretrained(adapter)
    return request.param, folder, adapter


def train_torch(name, folder, adapter, optimizer, out):
    base = getattr(transformers, MODELS[name][0]).from_pretrained(folder, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    optimizer, losses = optimizer([value for value in model.parameters() if value.requires_grad]), []
    for batch in batches(name):
        optimizer.zero_grad()
        loss = model(**{key: torch.tensor(value) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(out)
    return losses


def make_loss(name, model):
    if name == "bert":
        classify = jlora.adapt(lambda params, batch: model.apply({"params": params}, *batch))

        def loss_fn(params, batch, key):
            logits = classify(params, (batch["input_ids"], batch["attention_mask"]))
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

        return loss_fn
    hidden = jlora.adapt(lambda params, *inputs: model.apply({"params": params}, *inputs, method="hidden"))
    head = jlora.adapt(lambda params, hidden: model.apply({"params": params}, hidden, method="head"))

    def loss_fn(params, batch, key):
        states, labels = hidden(params, batch["input_ids"], batch["attention_mask"]), batch["labels"]
        return jlora.cross_entropy(head, params, states[:, :-1], labels[:, 1:], labels[:, 1:] >= 0, chunk=16)

    return loss_fn


def train_jax(name, folder, adapter, tx, out, scan):
    loaded = load_model(folder, scan=scan)
    train = ("classifier",) if name == "bert" else ()
    adapters, base = jlora.split(load_peft(adapter, loaded.model, loaded.params), train)
    state = jlora.TrainState.create(adapters, tx, jax.random.key(0))
    step, losses = jlora.make_train_step(make_loss(name, loaded.model), tx), []
    with jax.default_matmul_precision("highest"):
        for batch in batches(name):
            state, metrics = step(state, base, jax.tree.map(jnp.asarray, batch))
            losses.append(float(metrics["loss"]))
    save_peft(out, loaded.model, jlora.join(state.adapters, base), train=train)
    return losses


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_give_torchs_losses_and_torchs_adapter(start, optimizer, tmp_path):
    name, folder, adapter = start
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    torch_optimizer, tx = OPTIMIZERS[optimizer]
    expected = train_torch(name, folder, adapter, torch_optimizer, theirs)
    losses = train_jax(name, folder, adapter, tx, ours, scan=optimizer == "sgd")
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0)

    before, after, trained = (load_file(path / "adapter_model.safetensors") for path in (adapter, theirs, ours))
    assert trained.keys() == after.keys() == before.keys()
    for key, value in after.items():
        moved = np.linalg.norm(value - before[key])
        assert moved > 1e-3 * np.linalg.norm(value), f"{key} was trained"
        # Of the way it went, and so all the more of the adapter itself.
        assert np.linalg.norm(trained[key] - value) < 1e-3 * moved, key
